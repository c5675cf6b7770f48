#!/usr/bin/env bash
# Several processes on one machine, as a rehearsal of several hosts: no accelerator needed.
#
#   launch/local_multiprocess.sh [PROCESSES] [DEVICES] -- FLAGS, such as
#   launch/local_multiprocess.sh 2 4 -- --config=configs/quickstart.py \
#       --config.mesh.data=-1 --config.group_size=4
#
# Starts PROCESSES (default 2) copies of `python -m dinov2_jax.train` with DEVICES (default 4) CPU
# devices each, which find each other on loopback. Arguments after -- go to all of them. Exits with
# the first code that is not 0. PYTHON and PORT may be set.
set -euo pipefail

processes=2 devices=4
if [[ $# -gt 0 && $1 != -- ]]; then processes=$1 && shift; fi
if [[ $# -gt 0 && $1 != -- ]]; then devices=$1 && shift; fi
if [[ ${1:-} != -- || $# -lt 2 || ! "$processes $devices" =~ ^[1-9][0-9]*\ [1-9][0-9]*$ ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
shift

export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
# One that nobody listens on, below those that Linux takes for connections, 32768 and up.
port=${PORT:-}
while [[ -z $port ]]; do
    port=$((20000 + RANDOM % 12000))
    if (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then port=; fi
done
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port
export JAX_NUM_PROCESSES=$processes

# What nobody writes: reading it is waiting, without the child that `sleep` would be.
pipe=$(mktemp -u)
mkfifo -m 600 "$pipe"
exec 3<>"$pipe"
rm "$pipe"

pids=() stop=
trap 'stop=1' TERM INT # passed on below, when all have started
for ((i = 0; i < processes; i++)); do
    JAX_PROCESS_ID=$i "${PYTHON:-python}" -m dinov2_jax.train "$@" 3<&- &
    pids+=($!)
done

# A look every second: `wait -n` may lose a process that ends when a signal comes.
code=0 running=("${pids[@]}")
while ((${#running[@]} > 0)); do
    read -r -t 1 -u 3 || true
    if [[ -n $stop ]]; then # the processes save and stop
        stop=
        kill -TERM "${running[@]}" 2>/dev/null || true
    fi
    left=()
    for pid in "${running[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            left+=("$pid")
            continue
        fi
        status=0
        wait "$pid" || status=$?
        if [[ $code -eq 0 ]]; then code=$status; fi
        # Stopped by a signal, they all save and stop; after a failure the others would only wait.
        if [[ $status -ne 0 && $status -ne 143 && $status -ne 130 ]]; then
            kill -KILL "${pids[@]}" 2>/dev/null || true
        fi
    done
    running=(${left[@]+"${left[@]}"}) # an empty one is unbound before bash 4.4, as on macOS
done
exit "$code"

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
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-$((20000 + RANDOM % 20000))}
export JAX_NUM_PROCESSES=$processes

pids=()
for ((i = 0; i < processes; i++)); do
    JAX_PROCESS_ID=$i "${PYTHON:-python}" -m dinov2_jax.train "$@" &
    pids+=($!)
done
# The processes save and stop.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

code=0 left=$processes
while ((left > 0)); do
    status=0 ended=
    wait -n -p ended || status=$?
    if [[ -z $ended ]]; then continue; fi # a signal has ended the wait, and no process
    left=$((left - 1))
    if [[ $code -eq 0 ]]; then code=$status; fi
    # Stopped by a signal, they all save and stop; after a failure the others would only wait.
    if [[ $status -ne 0 && $status -ne 143 && $status -ne 130 ]]; then
        kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
done
exit "$code"

#!/usr/bin/env bash
# Trains on Cloud TPU virtual machines: a slice of any size, on demand or as a spot reservation.
#
#   launch/tpu_vm.sh create            asks for the slice and waits until it is there
#   launch/tpu_vm.sh setup             copies the last commit to every host and installs it
#   launch/tpu_vm.sh run FLAGS         starts, or resumes, the run on every host; needs --config
#   launch/tpu_vm.sh logs              follows the first host's output, to which every run adds
#   launch/tpu_vm.sh stop              SIGTERM: all hosts save together and stop
#   launch/tpu_vm.sh delete
#
# Set in the environment: NAME (of the slice), ZONE, ACCELERATOR (such as v5litepod-256), WORKDIR
# (gs://bucket/folder, which all hosts can write). Optional: PROJECT, VERSION (of the software; the
# default goes by ACCELERATOR), SPOT=1, QUEUED=1 (ask by a queued resource),
# DINOV2_JAX_TAR_INDEX (where all hosts keep the index of tar shards; default WORKDIR/tar_index),
# JAX_COMPILATION_CACHE_DIR (where they keep compiled programs; default WORKDIR/compiled).
# FLAGS go to `python -m dinov2_jax.train`. After a preemption: delete, create, setup, run. On
# v5litepod-256 a device gets 12 of ViT-L's 3072 images, so groups must divide 12; FLAGS there:
#   --config=configs/vitl14.py --config.group_size=12 --config.mesh.fsdp=16 \
#       --config.data.path='gs://bucket/images/*.tar'
set -euo pipefail

usage() {
    sed -n '2,20s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
if [[ $# -eq 0 || $1 == -* ]]; then usage; fi
: "${NAME:?set NAME to the name of the slice}" "${ZONE:?set ZONE, such as us-west4-a}"
repository=$(cd "$(dirname "$0")/.." && pwd)
where=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})

# Runs a command on every host of the slice.
everywhere() {
    gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command "$1"
}

case ${1:-} in
create)
    : "${ACCELERATOR:?set ACCELERATOR, such as v5litepod-256}"
    # cloud.google.com/tpu/docs/runtimes; Cloud TPU's own interface has no tpu7x.
    case $ACCELERATOR in
    v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version= ;;
    esac
    version=${VERSION:-$version}
    if [[ -z $version ]]; then
        echo "no software is known for ACCELERATOR=$ACCELERATOR: set VERSION to one of" \
            "cloud.google.com/tpu/docs/runtimes (TPU7x: use GKE, launch/jobset.yaml)" >&2
        exit 2
    fi
    if [[ -n ${QUEUED:-} ]]; then
        gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" "${where[@]}" \
            --accelerator-type "$ACCELERATOR" --runtime-version "$version" ${SPOT:+--spot}
        while true; do
            state=$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
                --format 'value(state.state)')
            case $state in
            ACTIVE) break ;;
            FAILED | SUSPENDING | SUSPENDED | DELETING)
                echo "$NAME is $state and will not come; see why by gcloud compute tpus" \
                    "queued-resources describe, then delete it and create it again" >&2
                exit 1
                ;;
            esac
            sleep 30
        done
    else
        gcloud compute tpus tpu-vm create "$NAME" "${where[@]}" \
            --accelerator-type "$ACCELERATOR" --version "$version" ${SPOT:+--spot}
    fi
    ;;
setup)
    if [[ -n $(git -C "$repository" status --porcelain) ]]; then
        echo "warning: what is not committed is not copied" >&2
    fi
    archive=$(mktemp -d)/dinov2_jax.tar.gz
    trap 'rm -r "$(dirname "$archive")"' EXIT
    git -C "$repository" archive --format tar.gz --prefix dinov2_jax/ --output "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:dinov2_jax.tar.gz" "${where[@]}" --worker=all
    # The images are Ubuntu 22.04, whose python3 is 3.10: too old. uv brings its own.
    everywhere "tar xzf dinov2_jax.tar.gz && python3 -m pip install --quiet --user uv &&
        ~/.local/bin/uv venv --quiet --allow-existing --python 3.11 ~/venv &&
        ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python \
            -e './dinov2_jax[gcs,data,quickstart,tpu]'"
    ;;
run)
    shift
    if [[ $# -eq 0 ]]; then usage; fi
    : "${WORKDIR:?set WORKDIR to gs://bucket/folder}"
    flags=$(printf ' %q' "$@")
    # In the background of every host, so that a lost connection does not end the run.
    index=${DINOV2_JAX_TAR_INDEX:-${WORKDIR%/}/tar_index}
    compiled=${JAX_COMPILATION_CACHE_DIR-${WORKDIR%/}/compiled}
    everywhere "cd dinov2_jax && DINOV2_JAX_TAR_INDEX=$(printf %q "$index") \
        JAX_COMPILATION_CACHE_DIR=$(printf %q "$compiled") nohup \
        ~/venv/bin/python -m dinov2_jax.train --distributed=on \
        --workdir=$(printf %q "$WORKDIR")$flags >> ~/train.log 2>&1 < /dev/null & sleep 5; tail -n 3 ~/train.log"
    ;;
logs)
    gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=0 --command 'tail -n 50 -F ~/train.log'
    ;;
stop)
    # In brackets, or the pattern would find the shell that it is given to.
    everywhere 'pkill -TERM -f "[d]inov2_jax.train" || true'
    ;;
delete)
    if [[ -n ${QUEUED:-} ]]; then
        gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
    else
        gcloud compute tpus tpu-vm delete "$NAME" "${where[@]}" --quiet
    fi
    ;;
*) usage ;;
esac

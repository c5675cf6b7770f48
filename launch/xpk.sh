#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster by xpk 0.7.0 or later (github.com/AI-Hypercomputer/xpk).
#
#   launch/xpk.sh --config=configs/vitg14.py --config.mesh.fsdp=16 \
#       --config.data.path='gs://bucket/images/*.tar' ...
#
# Set in the environment: CLUSTER, TPU_TYPE (such as v5litepod-256), WORKDIR (gs://bucket/folder).
# Optional: WORKLOAD (its name), NUM_SLICES (default 1), IMAGE (a pushed image of launch/Dockerfile;
# without it this folder is put on top of BASE_IMAGE), PROJECT, ZONE, PRIORITY, DINOV2_JAX_TAR_INDEX
# (where all hosts keep the index of tar shards; default WORKDIR/tar_index) and
# JAX_COMPILATION_CACHE_DIR (where they keep compiled programs; default WORKDIR/compiled). The same
# command under a new WORKLOAD goes on from the last checkpoint.
set -euo pipefail

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
: "${CLUSTER:?set CLUSTER}" "${TPU_TYPE:?set TPU_TYPE, such as v5litepod-256}"
: "${WORKDIR:?set WORKDIR to gs://bucket/folder}"
slices=${NUM_SLICES:-1}

if [[ -n ${IMAGE:-} ]]; then
    image=(--docker-image "$IMAGE")
else
    image=(--base-docker-image "${BASE_IMAGE:-dinov2_jax:tpu}" --script-dir "$(dirname "$0")/..")
fi
flags=$(printf ' %q' --distributed=on "--workdir=$WORKDIR" "$@")

# Code 1 is what a restart may cure. xpk adds it to its own, 42 and 127 to 255: lost, killed, stopped.
xpk workload create \
    --cluster "$CLUSTER" \
    --workload "${WORKLOAD:-dinov2-$(date +%m%d-%H%M)}" \
    --tpu-type "$TPU_TYPE" \
    --num-slices "$slices" \
    --max-restarts 20 \
    --restart-on-exit-codes 1 \
    --termination-grace-period-seconds 300 \
    --env "DINOV2_JAX_TAR_INDEX=${DINOV2_JAX_TAR_INDEX:-${WORKDIR%/}/tar_index}" \
    --env "JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-${WORKDIR%/}/compiled}" \
    ${PRIORITY:+--priority "$PRIORITY"} ${PROJECT:+--project "$PROJECT"} ${ZONE:+--zone "$ZONE"} \
    "${image[@]}" \
    --command "python -m dinov2_jax.train$flags"

#!/usr/bin/env bash
# Start the ranks of one node; run it once on each node, as srun does, or by hand.
#
#   node.sh eva_train --data /shared/texts --out /shared/runs/my-run --resume
#
# Variables, all with defaults for Slurm:
#   EVA_ENDPOINT  host:port at which the nodes meet (default: the first node of the Slurm job)
#   EVA_PORT      port of that endpoint, where none is given (default: 29500)
#   EVA_JOB       a name that the nodes of this job share (default: number of the Slurm job)
#   EVA_NODES     number of nodes, or least:most for a run that goes on with fewer (default: all)
#   EVA_RANKS     ranks on this node (default: its GPUs, or 1)
#   EVA_RESTARTS  times that all ranks start again after one is lost (default: 3)
#   EVA_ADDRESS   address of this node that all others reach (default: what its name resolves to)
#   EVA_WAIT      seconds to wait for the other nodes (default: 600)
#   EVA_STOP      seconds that the ranks have to save and end after a signal (default: 100)
set -euo pipefail

fail() { echo "node.sh: $1" >&2; exit 1; }

[ $# -gt 0 ] || fail 'no command: give the command of a rank, such as eva_train --data DIR --out DIR --resume'
if [ -z "${EVA_ENDPOINT:-}" ]; then
    [ -n "${SLURM_JOB_NODELIST:-}" ] || fail 'EVA_ENDPOINT: not set, and this is no Slurm job: set it to host:port of the first node'
    hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    EVA_ENDPOINT="${hosts%%$'\n'*}:${EVA_PORT:-29500}" # the first line
fi
job="${EVA_JOB:-${SLURM_JOB_ID:-}}"
[ -n "$job" ] || fail 'EVA_JOB: not set, and this is no Slurm job: set it to one name on all nodes'
ranks="${EVA_RANKS:-${SLURM_GPUS_ON_NODE:-1}}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${EVA_STOP:-100}"

exec python -m eva.distributed.launch \
    --nnodes "${EVA_NODES:-${SLURM_JOB_NUM_NODES:-1}}" --nproc-per-node "$ranks" \
    --max-restarts "${EVA_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$EVA_ENDPOINT" --rdzv-id "$job" \
    --rdzv-conf "join_timeout=${EVA_WAIT:-600}" \
    ${EVA_ADDRESS:+--local-addr "$EVA_ADDRESS"} \
    --no-python "$@"

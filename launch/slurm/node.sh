#!/usr/bin/env bash
# One torchrun on this node, started by srun (see job.sh):
#   node.sh NODES RANKS_PER_NODE ENDPOINT LOG_FOLDER ARGUMENT...
set -euo pipefail
num_nodes=$1 ranks_per_node=$2 endpoint=$3 log_folder=$4
shift 4

# is_host and local-addr are explicit, because torchrun would compare host names as this machine resolves them (torch 2.13).
# --max-restarts=0: attempts share the rendezvous store, and a restarted attempt fails in gloo's connectFullMesh.
exec python -m torch.distributed.run \
    --nnodes="$num_nodes" --nproc-per-node="$ranks_per_node" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-conf="is_host=$((SLURM_NODEID == 0))" \
    --local-addr="$(address "$SLURMD_NODENAME")" \
    --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --log-dir="$log_folder/torchrun_$SLURMD_NODENAME" --tee=3 \
    "$(dirname "$0")/../pretrain_gkd.py" "$@"

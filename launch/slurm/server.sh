#!/usr/bin/env bash
# One SGLang server on this node, started by srun (see servers.sh):
#   server.sh ADDRESS:PORT,... LOG_NAME OPTION...
# The endpoints are those of all nodes of the group in order; the options are passed to launch/serve.py.
set -euo pipefail
IFS=, read -ra endpoints <<<"$1"
endpoint=${endpoints[SLURM_NODEID]}
log_file=$2_$SLURMD_NODENAME.log
shift 2

exec python "$(dirname "$0")/../serve.py" --host "${endpoint%:*}" --port "${endpoint##*:}" \
    --api-key-env MEGATRON_GKD_SGLANG_KEY --tp "$SLURM_GPUS_ON_NODE" --log-file "$log_file" "$@"

# SGLang servers of a heterogeneous job, one on each node of a group; sourced after job.sh.
MEGATRON_GKD_SGLANG_KEY=$(python -c "import secrets; print(secrets.token_hex(32))")
export MEGATRON_GKD_SGLANG_KEY
server_pids=() server_groups=()

# endpoints GROUP: address:port of its servers, in the order of its nodes, with commas between
endpoints() {
    local nodelist="SLURM_JOB_NODELIST_HET_GROUP_$1" node found=()
    for node in $(scontrol show hostnames "${!nodelist}"); do
        found+=("$(address "$node"):$(port $(($1 * 100 + ${#found[@]})))")
    done
    (IFS=, && echo "${found[*]}")
}

# urls GROUP: as a list in YAML
urls() {
    echo "[$(endpoints "$1" | sed 's#[^,]*#http://&#g')]"
}

# host GROUP, first_port GROUP: of its first server
host() {
    local all first
    all=$(endpoints "$1")
    first=${all%%,*}
    echo "${first%:*}"
}
first_port() {
    local all first
    all=$(endpoints "$1")
    first=${all%%,*}
    echo "${first##*:}"
}

# start_servers GROUP NAME MODEL CONTEXT OPTION...: tokens of the longest sequence, options of launch/serve.py; an address is
# in logs/NAME_<node>.url once it answers
start_servers() {
    rm -f "$run_folder/logs/$2"_*.url
    srun --het-group="$1" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
        --output="$run_folder/logs/$2_%N.url" --error="$run_folder/logs/$2_%N.err" --open-mode=truncate \
        bash "$code/launch/slurm/server.sh" "$(endpoints "$1")" "$run_folder/logs/$2" \
        --model "$3" --context-length "$4" --config "$resolved" "${@:5}" &
    server_pids+=($!) server_groups+=("$1 $2")
}

# require_servers: fails when those of a group have ended; kill -0 succeeds if any of its processes lives, so each is asked
require_servers() {
    local i group name
    for i in "${!server_pids[@]}"; do
        if ! kill -0 "${server_pids[i]}" 2>/dev/null; then
            read -r group name <<<"${server_groups[i]}"
            echo "error: the $name server of group $group ended before the training began; see" \
                "$run_folder/logs/${name}_*.log and .err" >&2
            return 1
        fi
    done
}

# await_servers GROUP NAME: until all of them answer; fails when one of any group ends first
await_servers() {
    local num_servers num_ready=0
    num_servers=$(endpoints "$1" | tr , '\n' | wc -l)
    while ((num_ready < num_servers)); do
        require_servers || return 1
        sleep 1
        num_ready=$(cat "$run_folder/logs/$2"_*.url 2>/dev/null | grep -c ^http || true)
    done
}

# stop_servers GROUP...: in order; srun itself would kill them at once
stop_servers() {
    local group job
    for group in "$@"; do
        job="SLURM_JOB_ID_HET_GROUP_$group"
        scancel --signal=TERM "${!job}" || true
    done
    wait "${server_pids[@]}" || true
}

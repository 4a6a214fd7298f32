# SGLang servers of a heterogeneous job, one per node of a group; sourced after job.sh.
MEGATRON_GKD_SGLANG_KEY=$(python -c "import secrets; print(secrets.token_hex(32))")
export MEGATRON_GKD_SGLANG_KEY
server_pids=() server_groups=()

# endpoints GROUP: comma-separated address:port of its servers, in node order
endpoints() {
    local nodelist="SLURM_JOB_NODELIST_HET_GROUP_$1" node found=()
    for node in $(scontrol show hostnames "${!nodelist}"); do
        found+=("$(address "$node"):$(port $(($1 * 100 + ${#found[@]})))")
    done
    (IFS=, && echo "${found[*]}")
}

# urls GROUP: the endpoints as a YAML list of URLs
urls() {
    echo "[$(endpoints "$1" | sed 's#[^,]*#http://&#g')]"
}

# host GROUP, first_port GROUP: address and port of its first server
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

# start_servers GROUP NAME MODEL CONTEXT_LENGTH OPTION...: start one server per node, with options of launch/serve.py; each
# writes logs/NAME_<node>.url when it is ready
start_servers() {
    rm -f "$run_folder/logs/$2"_*.url
    srun --het-group="$1" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
        --output="$run_folder/logs/$2_%N.url" --error="$run_folder/logs/$2_%N.err" --open-mode=truncate \
        bash "$code/launch/slurm/server.sh" "$(endpoints "$1")" "$run_folder/logs/$2" \
        --model "$3" --context-length "$4" --config "$resolved" "${@:5}" &
    server_pids+=($!) server_groups+=("$1 $2")
}

# require_servers: fail if the servers of a group have ended. Each pid is checked by itself, because kill -0 with several
# pids succeeds if one of them is alive
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

# await_servers GROUP NAME: wait until all of them are ready; fail if servers of any group end first
await_servers() {
    local num_servers num_ready=0
    num_servers=$(endpoints "$1" | tr , '\n' | wc -l)
    while ((num_ready < num_servers)); do
        require_servers || return 1
        sleep 1
        num_ready=$(cat "$run_folder/logs/$2"_*.url 2>/dev/null | grep -c ^http || true)
    done
}

# stop_servers GROUP...: send SIGTERM and wait; killing srun would SIGKILL the servers
stop_servers() {
    local group job
    for group in "$@"; do
        job="SLURM_JOB_ID_HET_GROUP_$group"
        scancel --signal=TERM "${!job}" || true
    done
    wait "${server_pids[@]}" || true
}

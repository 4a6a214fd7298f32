# What the job files of this folder share; they source it. Their arguments are those of launch/pretrain_gkd.py.
#
# MEGATRON_GKD_CODE is the copy of the code that launch/submit.py made. A job given to sbatch itself runs the code of the folder
# it was submitted from, as that is when the job starts.
set -euo pipefail

if [[ -z ${MEGATRON_GKD_CODE:-} ]]; then
    echo "warning: not submitted with launch/submit.py: later edits in $SLURM_SUBMIT_DIR reach this job" >&2
fi
code=$(realpath "${MEGATRON_GKD_CODE:-$SLURM_SUBMIT_DIR}")
export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
attempt=${SLURM_RESTART_COUNT:-0}
is_making_room=false
arguments=()

# prepare NODES RANKS_PER_NODE ARGUMENT...: check the configuration before any node does anything
prepare() {
    num_nodes=$1 ranks_per_node=$2 arguments=("${@:3}")
    python "$code/launch/pretrain_gkd.py" "${arguments[@]}" --check --world-size $((num_nodes * ranks_per_node))
    run_folder=$(realpath -m "$(value train.output_dir)")
    resolved=$run_folder/logs/slurm_${SLURM_JOB_ID}_$attempt.yaml
    mkdir -p "$run_folder/logs"
    value >"$resolved"
    arguments=(--config "$resolved")
    trap make_room USR1
}

# value [KEY]: of the configuration; without a key all of it
value() {
    python "$code/launch/pretrain_gkd.py" "${arguments[@]}" --show "$@"
}

# require_value KEY VALUE ELSE: end the job unless the configuration has it
require_value() {
    local found
    found=$(value "$1")
    if [[ $found != "$2" ]]; then
        echo "error: this job needs $1=$2, not $found; set it, $3" >&2
        exit 2
    fi
}

# SLURM sends USR1 ahead of the time limit (--signal), people by: scancel --batch --signal=USR1 JOB
make_room() {
    is_making_room=true
    echo "SLURM job $SLURM_JOB_ID got USR1; it is requeued and goes on" >"$run_folder/stop"
}

# address NODE: where SLURM itself reaches it; its name may mean another network, or nothing, to the others
address() {
    scontrol show node "$1" --oneliner | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}
export -f address # node.sh calls it on every node

# port OFFSET: each job and attempt has a range of its own, below the ephemeral ports
port() {
    echo $((20000 + (SLURM_JOB_ID * 8 + attempt) * 97 % 10000 + $1))
}

# train NODELIST SRUN_OPTION... -- section.key=value...: one torchrun per node; returns its exit code
train() {
    local head options=()
    if [[ $is_making_room == true ]]; then
        echo "error: USR1 came before the training began; raise --time, or lower the seconds of --signal" >&2
        is_making_room=false
        return 1
    fi
    head=$(scontrol show hostnames "$1" | head -n 1)
    shift
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    srun "${options[@]}" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
        --open-mode=append --output="$run_folder/logs/slurm_%j_%N.log" \
        bash "$code/launch/slurm/node.sh" \
        "$num_nodes" "$ranks_per_node" "$(address "$head"):$(port 0)" "$run_folder/logs" "${arguments[@]}" "$@" &
    wait_for $!
}

# wait_for PID: its exit code; bash's own wait ends early when a signal is handled, with a code that the process may have, too
wait_for() {
    local exit_code
    while kill -0 "$1" 2>/dev/null; do
        wait "$1" || true
    done
    exit_code=0
    wait "$1" || exit_code=$? # bash remembers the code of a process that has ended
    return "$exit_code"
}

# finish EXIT_CODE: requeue a run that made room, else end with the code
finish() {
    local state=""
    if [[ -f $run_folder/status.json ]]; then
        state=$(sed -n 's/.*"state": "\([a-z]*\)".*/\1/p' "$run_folder/status.json")
    fi
    echo "attempt $attempt of the run in $run_folder: ${state:-no status.json}"
    if [[ $is_making_room == true && $state == stopped ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$1"
}

# Functions shared by the job files of this folder, which source it. Their arguments are those of launch/pretrain_gkd.py.
#
# MEGATRON_GKD_CODE is the snapshot of the code made by launch/submit.py. A job submitted with sbatch directly runs the code in
# the folder it was submitted from, in its state when the job starts.
set -euo pipefail

if [[ -z ${MEGATRON_GKD_CODE:-} ]]; then
    echo "warning: not submitted with launch/submit.py: later edits in $SLURM_SUBMIT_DIR reach this job" >&2
fi
code=$(realpath "${MEGATRON_GKD_CODE:-$SLURM_SUBMIT_DIR}")
export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
attempt=${SLURM_RESTART_COUNT:-0}
is_making_room=false
arguments=()

# prepare NODES RANKS_PER_NODE ARGUMENT...: check the configuration before anything starts on any node
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

# value [KEY]: print the key's value in the resolved configuration, or the whole configuration
value() {
    python "$code/launch/pretrain_gkd.py" "${arguments[@]}" --show "$@"
}

# require_value KEY VALUE ALTERNATIVE: end the job unless the key has this value
require_value() {
    local found
    found=$(value "$1")
    if [[ $found != "$2" ]]; then
        echo "error: this job needs $1=$2, not $found; set it, $3" >&2
        exit 2
    fi
}

# SLURM sends USR1 before the time limit (--signal); by hand: scancel --batch --signal=USR1 JOB.
# The stop file is used because torchrun kills its workers 30 s after a signal, and a large checkpoint takes longer.
make_room() {
    is_making_room=true
    echo "SLURM job $SLURM_JOB_ID got USR1; it is requeued and goes on" >"$run_folder/stop"
}

# address NODE: the address that SLURM uses for it; other nodes may resolve the name to another network, or not at all
address() {
    scontrol show node "$1" --oneliner | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}
export -f address # node.sh calls it on every node

# port OFFSET: a port in the range of this job and attempt, below the ephemeral ports
port() {
    echo $((20000 + (SLURM_JOB_ID * 8 + attempt) * 97 % 10000 + $1))
}

# train NODELIST SRUN_OPTION... -- section.key=value...: run one torchrun per node; returns the exit code of srun
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

# wait_for PID: return its exit code. bash's wait returns early when a trap runs, with a code (128 + signal) that the process
# itself could return, so it is repeated until the process is gone
wait_for() {
    local exit_code
    while kill -0 "$1" 2>/dev/null; do
        wait "$1" || true
    done
    exit_code=0
    wait "$1" || exit_code=$? # bash keeps the exit code of an ended child
    return "$exit_code"
}

# finish EXIT_CODE: requeue the job if it was stopped by USR1, otherwise exit with the code
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

# Functions of the training scripts, to be sourced: positional arguments, checks, the launcher and the log.
#
#   PYTHON       the interpreter (default: that of .venv, else python3)
#   NUM_GPUS     processes on this machine (default: one, or all GPUs, by script; without a GPU one)
#   HOSTFILE     DeepSpeed hostfile for several nodes (default: /job/hostfile where there is one)
#   MASTER_PORT  port of the first process (default: one that is free)
#
# Started by torchrun or srun, once a process, a script runs that process alone.
set -euo pipefail

source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"

FOUR_SETS=(
    Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets
)
SIX_SETS=("${FOUR_SETS[@]}" openai/webgpt_comparisons stanfordnlp/SHP)
PLANNED_NODES=8 PLANNED_GPUS=8 # what --dry_run plans for where neither GPUs nor NUM_GPUS say more

# positional NAME=DEFAULT ... -- "$@": sets the variables, and REST to all from the first word that begins with "-".
# A NAME without default must be given; an empty word takes the default.
positional() {
    local specs=() usage spec name value
    while [[ "$1" != -- ]]; do
        specs+=("$1")
        shift
    done
    shift
    usage="usage: bash $(basename -- "$0")"
    for spec in "${specs[@]+"${specs[@]}"}"; do
        if [[ "$spec" == *=* ]]; then usage+=" [${spec%%=*}]"; else usage+=" $spec"; fi
    done
    usage+=" [flags of main.py]"
    for spec in "${specs[@]+"${specs[@]}"}"; do
        name="${spec%%=*}" value=""
        if [[ "$spec" == *=* ]]; then value="${spec#*=}"; fi
        if (($#)) && [[ "$1" != -* ]]; then
            value="${1:-$value}"
            shift
        fi
        [[ -n "$value" ]] || fail "$name is missing. $usage"
        printf -v "$name" '%s' "$value"
    done
    if (($#)) && [[ "$1" != -* ]]; then
        fail "too many positional arguments: '$1' has no place. $usage"
    fi
    REST=("$@")
}

# launch STEP WHERE FLAGS...: run the main of step 1, 2, dpo or 3 with FLAGS, and REST after them, on "one" GPU, on "all"
# of this machine, or on several "nodes". Everything is shown, and kept in training.log in the output folder.
launch() {
    local step="$1" where="$2" main log processes status earlier
    local words=("${@:3}" "${REST[@]+"${REST[@]}"}")
    case "$step" in
        2) step=2_reward_model ;;
        dpo) step=2_dpo ;;
    esac
    main="$(echo "$ROOT"/training/step"$step"_*/main.py)"
    find_python
    if has_word --help "${words[@]}" || has_word -h "${words[@]}"; then exec "$PYTHON" "$main" --help; fi
    if has_word --dry_run "${words[@]}"; then
        processes="$(planned_processes "$where")"
        WORLD_SIZE="$processes" exec "$PYTHON" "$main" "${words[@]}"
    fi
    OUTPUT="$(flag_value --output_dir "${words[@]}")"
    check_output "$OUTPUT"
    log="$OUTPUT/training.log"
    launcher "$where"
    [[ "${TASK_RANK:-0}" == 0 ]] || log="$OUTPUT/training.rank$TASK_RANK.log"
    status=0 earlier=0
    if [[ -f "$log" ]]; then earlier="$(wc -c <"$log")"; fi
    run_logged "$log" "${LAUNCHER[@]}" "$main" "${words[@]}" || status=$?
    if ((SIGNALS)) && ((status)); then
        say "" "stopped by a signal; see the last lines above. Whole log: $log"
        exit $((128 + 15))
    fi
    ((status == 0)) || report_failure "$status" "$log" "$earlier"
}

# run_logged LOG COMMAND...: its output on the screen and after what LOG holds. Ctrl-C or SIGTERM here asks all its processes
# to save and stop, and this script waits for that; a second one ends them.
SIGNALS=0
run_logged() {
    local log="$1" screen tee child
    exec {screen}> >(trap '' INT TERM HUP && exec tee -a -- "$log")
    tee=$! child=""
    trap 'hand_on "$child"' INT TERM HUP
    set -m # a process group of its own, to which the terminal's Ctrl-C does not go
    "${@:2}" </dev/null >&"$screen" 2>&1 {screen}>&- &
    child=$!
    set +m
    exec {screen}>&-
    ((SIGNALS == 0)) || kill -TERM -- "-$child" || true # one that came before there was a child to hand it to
    # Processes may outlive the one that started them: all are gone when tee has nothing left to read.
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    while kill -0 "$tee" 2>/dev/null; do wait "$tee" || true; done
    trap - INT TERM HUP
    wait "$child"
}
hand_on() {
    SIGNALS=$((SIGNALS + 1))
    [[ -z "$1" ]] || kill "-$( ((SIGNALS == 1)) && echo TERM || echo KILL)" -- "-$1" 2>/dev/null || true
}

# evaluate FILE FLAGS...: run a program below training/ with FLAGS and REST, in one process.
evaluate() {
    find_python
    exec "$PYTHON" "$ROOT/training/$1" "${@:2}" "${REST[@]+"${REST[@]}"}"
}

# switch NAME FLAGS...: adds FLAGS to SWITCHED where the variable NAME is true.
SWITCHED=()
switch() {
    case "${!1}" in
        true) SWITCHED+=("${@:2}") ;;
        false) ;;
        *) fail "$1=${!1}: true or false." ;;
    esac
}

# sweep_run POSITIONAL...: run_single.sh beside the script, with REST after it. sweep_end: which of them failed.
SWEEP_FAILED=()
sweep_run() {
    say "" "--- ${*: -1}"
    bash "$(dirname -- "$0")/run_single.sh" "$@" "${REST[@]+"${REST[@]}"}" || SWEEP_FAILED+=("${*: -1}")
}
sweep_end() {
    ((${#SWEEP_FAILED[@]} == 0)) ||
        fail "${#SWEEP_FAILED[@]} run(s) failed: ${SWEEP_FAILED[*]}; see training.log in each folder"
}

has_word() {
    local wanted="$1" word
    shift
    for word in "$@"; do [[ "$(spelled "$word")" != "$wanted" ]] || return 0; done
    return 1
}

# A word as flags are written here: the mains take --zero-stage for --zero_stage, too.
spelled() {
    local name="${1%%=*}" words
    if [[ "$name" != --* ]]; then
        printf '%s' "$1"
        return
    fi
    words="${name#--}"
    printf '%s' "--${words//-/_}${1#"$name"}"
}

# The value of the last "FLAG value" or "FLAG=value".
flag_value() {
    local flag="$1" value="" before="" word
    shift
    for word in "$@"; do
        if [[ "$before" == "$flag" ]]; then value="$word"; fi
        word="$(spelled "$word")"
        if [[ "$word" == "$flag="* ]]; then value="${word#*=}"; fi
        before="$word"
    done
    printf '%s' "$value"
}

find_python() {
    if [[ -z "${PYTHON:-}" && -x "$VENV_PYTHON" ]]; then
        activate
        PYTHON="$VENV_PYTHON"
    fi
    PYTHON="${PYTHON:-python3}"
    command -v -- "$PYTHON" >/dev/null ||
        fail "no $PYTHON here. Run scripts/quickstart.sh or scripts/test.sh once, or set PYTHON."
    "$PYTHON" -c 'import sys; from importlib.util import find_spec as f; sys.exit(not (f("torch") and f("deepspeed")))' ||
        fail "PYTHON has no torch and deepspeed. Run scripts/quickstart.sh or scripts/test.sh once, or set it ($PYTHON) to one that has."
    export PYTHON PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
}

check_output() {
    [[ -n "$1" ]] || fail "--output_dir has no value. Give a folder."
    mkdir -p -- "$1" 2>/dev/null && [[ -d "$1" && -w "$1" ]] ||
        fail "--output_dir $1: no folder that can be written. Give another as OUTPUT, or by --output_dir."
    # Before its log is touched; dschat/runtime/lock.py holds this file while a run lasts. The tasks of one run look at the
    # same time: a shared lock meets a run's own, but not another task's.
    "$PYTHON" - "$1/.lock" <<'PYTHON' || fail "--output_dir $1: another run writes to it. Give another, or wait for its end."
import fcntl, os, sys
try:
    fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_SH | fcntl.LOCK_NB)
except (BlockingIOError, PermissionError):
    sys.exit(1)
except OSError:
    pass
PYTHON
}

num_visible_gpus() {
    if ! has_gpu; then
        echo 0
    elif [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        # CUDA stops at the first number that is none of a GPU.
        awk -F, '{ for (n = 0; n < NF && $(n + 1) !~ /^-/; n++); print n }' <<<"$CUDA_VISIBLE_DEVICES"
    else
        nvidia-smi -L | grep -c '^GPU '
    fi
}

check_num_gpus() {
    [[ "${NUM_GPUS-1}" =~ ^[1-9][0-9]*$ ]] || fail "NUM_GPUS=$NUM_GPUS: expected a number, at least 1."
}

# LAUNCHER: the command in front of a main.
launcher() {
    local where="$1" visible wanted port
    if ((${SLURM_STEP_NUM_TASKS:-1} > 1)); then TASK_RANK="${SLURM_PROCID:-}"; fi
    TASK_RANK="${RANK:-${TASK_RANK:-}}"
    if [[ -n "$TASK_RANK" ]]; then
        LAUNCHER=("$PYTHON" -u)
        return
    fi
    port="$(master_port)"
    LAUNCHER=("$PYTHON" -m deepspeed.launcher.runner --master_port "$port")
    if [[ "$where" == nodes ]]; then
        LAUNCHER+=(--hostfile "$(several_hosts)")
        return
    fi
    LAUNCHER+=(--hostfile "") # else it takes /job/hostfile, where there is one, and with it other machines
    visible="$(num_visible_gpus)"
    wanted="${NUM_GPUS:-$([[ "$where" == one ]] && echo 1 || echo "$visible")}"
    check_num_gpus
    if ((visible)); then
        ((wanted >= 1 && wanted <= visible)) ||
            fail "NUM_GPUS=$wanted: $visible GPU(s) to be seen here. Give as many at most, or look at CUDA_VISIBLE_DEVICES."
        if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then # with --num_gpus the launcher would take others
            wanted="$(cut -d, -f "1-$wanted" <<<"$CUDA_VISIBLE_DEVICES")"
            [[ "$wanted" =~ ^[0-9]+(,[0-9]+)*$ ]] ||
                fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: DeepSpeed's launcher knows GPUs by their numbers alone. Give" \
                    "numbers, or start by torchrun."
            LAUNCHER+=(--include "localhost:$wanted")
        else
            LAUNCHER+=(--num_gpus "$wanted")
        fi
    else
        say "no GPU here: ${NUM_GPUS:-1} process(es) on the CPU"
        LAUNCHER+=(--num_accelerators "${NUM_GPUS:-1}")
    fi
}

# The hostfile of several nodes.
several_hosts() {
    local file="${HOSTFILE:-/job/hostfile}" hosts
    [[ -f "$file" ]] ||
        fail "$(basename -- "$0") needs several nodes: set HOSTFILE to a DeepSpeed hostfile, a line \"HOST slots=8\" for" \
            "each ($file is none), or start it by srun or torchrun, once a process."
    hosts="$(grep -cE '^[^#[:space:]]+[[:space:]]+slots=[0-9]+' -- "$file" || true)"
    ((hosts > 1)) ||
        fail "HOSTFILE $file names $hosts node(s); $(basename -- "$0") needs several, a line \"HOST slots=8\" for each."
    command -v pdsh >/dev/null ||
        fail "pdsh is not installed, by which DeepSpeed reaches other nodes. Install it, or start by srun or torchrun."
    printf '%s' "$file"
}

master_port() {
    local errors=/dev/stderr
    [[ -z "${MASTER_PORT:-}" ]] || errors=/dev/null # what is wrong with it is said below
    "$PYTHON" -c 'import sys; from dschat.runtime.ports import free_port as f; print(f(int(sys.argv[1])))' "${MASTER_PORT:-0}" \
        2>"$errors" || fail "MASTER_PORT=${MASTER_PORT:-}: in use, or no port. Leave it out."
}

# How many processes a dry run plans for.
planned_processes() {
    local visible
    check_num_gpus
    visible="${NUM_GPUS:-$(num_visible_gpus)}"
    case "$1" in
        one) echo "${NUM_GPUS:-1}" ;;
        all) echo "$((visible > 0 ? visible : PLANNED_GPUS))" ;;
        nodes) echo "$((PLANNED_NODES * (visible > 0 ? visible : PLANNED_GPUS)))" ;;
    esac
}

# The last lines of a failed run: the cause, the flag to change, the log, which this run began after BYTES.
report_failure() {
    local status="$1" log="$2" said cause flags
    said="$(tail -c "+$(($3 + 1))" -- "$log")" # what came before is of earlier runs
    cause="$(tac <<<"$said" | awk '{ print } /^error \(rank/ { found = 1; exit } END { exit !found }' | tac || true)"
    if ! grep -q '^error (rank' <<<"$cause"; then
        cause="error: exit status $status"
        if ((status == 137)) || grep -qE 'return code = -9|SIGKILL' <<<"$said"; then
            cause="error: a process was killed, most often because the host's memory ran out. Leave --offload out, lower"
            cause+=" --per_device_train_batch_size (step 3: --per_device_training_batch_size), or run fewer processes."
        elif grep -qE '^[A-Za-z.]+Error: ' <<<"$said"; then # of the launcher, or of a library
            cause="error: $(grep -E '^[A-Za-z.]+Error: ' <<<"$said" | tail -n 1)"
        fi
    fi
    flags="$(grep -oE -e '--[a-z][a-z0-9_]+' <<<"$cause" | awk '!seen[$0]++' | head -n 6 | paste -sd ' ' || true)"
    {
        [[ "$said" == *"$cause" ]] || printf '\n%s\n' "$cause" # else it is the last on the screen already
        printf 'flags to look at: %s\n' "${flags:---help lists them}"
        printf 'whole log: %s\n' "$log"
    } >&2
    exit 1
}

# Functions of the training scripts, to be sourced: positional arguments, checks, launcher and log.
#
#   PYTHON       the interpreter (default: that of .venv, else python3)
#   NUM_GPUS     ranks on this machine (default: one, or all GPUs, by script; without a GPU one)
#   HOSTFILE     DeepSpeed hostfile for several nodes (default: /job/hostfile if there is one)
#   MASTER_PORT  port of rank 0 (default: a free one)
#
# torchrun and srun start a script once for each rank; it then runs only that rank.
set -euo pipefail

source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"

FOUR_SETS=(
    Dahoas/rm-static Dahoas/full-hh-rlhf
    Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets
)
SIX_SETS=("${FOUR_SETS[@]}" openai/webgpt_comparisons stanfordnlp/SHP)
# --dry_run plans for these if there are no GPUs and NUM_GPUS is not set.
PLANNED_NODES=8
PLANNED_GPUS=8

# positional NAME=DEFAULT ... -- "$@": set the variables from the positional arguments, and REST to
# all words from the first that begins with "-". A NAME without default must be given; an empty word
# takes the default.
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

# launch STEP WHERE FLAGS...: run the main of step 1, 2, dpo or 3 with FLAGS and REST. WHERE is "one"
# for one GPU, "all" for all GPUs of this machine, or "nodes" for several nodes. The output is shown
# and appended to training.log in the output folder.
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

# Lines of DeepSpeed's launcher that say nothing to act on: in the log, but not on the screen.
NOISE='^\[[-0-9]{10} [0-9:,]+\] \[(INFO|WARNING)\] \[(runner|launch|real_accelerator)\.py|^DeepSpeed deepspeed\.ops'

# run_logged LOG COMMAND...: run a command, show its output and append it to LOG. Ctrl-C or SIGTERM
# asks all its processes to save and stop, and this script waits for that; a second one kills them.
SIGNALS=0
run_logged() {
    local log="$1" screen tee child
    exec {screen}> >(trap '' INT TERM HUP && tee -a -- "$log" | grep --line-buffered -vE "$NOISE")
    tee=$! child=""
    trap 'forward_signal "$child"' INT TERM HUP
    set -m # a separate process group, which the terminal's Ctrl-C does not reach
    "${@:2}" </dev/null >&"$screen" 2>&1 {screen}>&- &
    child=$!
    set +m
    exec {screen}>&-
    # Forward a signal that came before there was a child.
    ((SIGNALS == 0)) || kill -TERM -- "-$child" || true
    # Processes may outlive the one that started them. All have ended once tee has nothing to read.
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    while kill -0 "$tee" 2>/dev/null; do wait "$tee" || true; done
    trap - INT TERM HUP
    wait "$child"
}

# forward_signal CHILD: send SIGTERM to the child's process group; after the first signal, SIGKILL.
forward_signal() {
    local signal=TERM
    SIGNALS=$((SIGNALS + 1))
    if ((SIGNALS > 1)); then signal=KILL; fi
    [[ -z "$1" ]] || kill "-$signal" -- "-$1" 2>/dev/null || true
}

# evaluate FILE FLAGS...: run a program in training/ with FLAGS and REST, in one process.
evaluate() {
    find_python
    exec "$PYTHON" "$ROOT/training/$1" "${@:2}" "${REST[@]+"${REST[@]}"}"
}

# switch NAME FLAGS...: add FLAGS to SWITCHED if the variable NAME is true.
SWITCHED=()
switch() {
    case "${!1}" in
        true) SWITCHED+=("${@:2}") ;;
        false) ;;
        *) fail "$1=${!1}: expected true or false." ;;
    esac
}

# sweep_run POSITIONAL...: run the run_single.sh next to the script, with REST.
SWEEP_FAILED=()
sweep_run() {
    say "" "--- ${*: -1}"
    bash "$(dirname -- "$0")/run_single.sh" "$@" "${REST[@]+"${REST[@]}"}" || SWEEP_FAILED+=("${*: -1}")
}

# sweep_end: fail if runs of the sweep failed, and name them.
sweep_end() {
    ((${#SWEEP_FAILED[@]} == 0)) ||
        fail "${#SWEEP_FAILED[@]} run(s) failed: ${SWEEP_FAILED[*]}; see training.log in each folder"
}

# has_word WORD WORDS...: succeed if WORD is among WORDS.
has_word() {
    local wanted="$1" word
    shift
    for word in "$@"; do [[ "$(spelled "$word")" != "$wanted" ]] || return 0; done
    return 1
}

# spelled WORD: print a flag with underscores. The mains take --zero-stage for --zero_stage, too.
spelled() {
    local name="${1%%=*}" words
    if [[ "$name" != --* ]]; then
        printf '%s' "$1"
        return
    fi
    words="${name#--}"
    printf '%s' "--${words//-/_}${1#"$name"}"
}

# flag_value FLAG WORDS...: print the value of the last "FLAG value" or "FLAG=value".
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

# find_python: set PYTHON, check its packages, and prepare its environment.
find_python() {
    local code='import sys; from importlib.util import find_spec
sys.exit(not (find_spec("torch") and find_spec("deepspeed")))'
    if [[ -z "${PYTHON:-}" && -x "$VENV_PYTHON" ]]; then
        activate
        PYTHON="$VENV_PYTHON"
    fi
    PYTHON="${PYTHON:-python3}"
    command -v -- "$PYTHON" >/dev/null ||
        fail "no $PYTHON here. Run scripts/quickstart.sh or scripts/test.sh once, or set PYTHON."
    "$PYTHON" -c "$code" ||
        fail "PYTHON has no torch and deepspeed. Run scripts/quickstart.sh or scripts/test.sh once, or" \
            "set it (now $PYTHON) to an interpreter that has them."
    export PYTHON PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
}

# check_output FOLDER: make the output folder, and check that it is writable and not in use.
check_output() {
    [[ -n "$1" ]] || fail "--output_dir has no value. Give a folder."
    mkdir -p -- "$1" 2>/dev/null && [[ -d "$1" && -w "$1" ]] ||
        fail "--output_dir $1: no folder that can be written. Give another as OUTPUT or --output_dir."
    # Checked before the log is touched. A run holds this file's lock (dschat/runtime/lock.py). The
    # tasks of one run check at the same time: a shared lock conflicts with a run's exclusive one, but
    # not with another task's.
    "$PYTHON" - "$1/.lock" <<'PYTHON' ||
import fcntl, os, sys
try:
    fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_SH | fcntl.LOCK_NB)
except (BlockingIOError, PermissionError):
    sys.exit(1)
except OSError:
    pass
PYTHON
        fail "--output_dir $1: another run writes to it. Give another, or wait for its end."
}

num_visible_gpus() {
    if ! has_gpu; then
        echo 0
    elif [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        # CUDA stops at the first negative number.
        awk -F, '{ for (n = 0; n < NF && $(n + 1) !~ /^-/; n++); print n }' <<<"$CUDA_VISIBLE_DEVICES"
    else
        nvidia-smi -L | grep -c '^GPU '
    fi
}

check_num_gpus() {
    [[ "${NUM_GPUS-1}" =~ ^[1-9][0-9]*$ ]] || fail "NUM_GPUS=$NUM_GPUS: expected a number, at least 1."
}

# launcher WHERE: set LAUNCHER to the command that starts a main.
launcher() {
    local where="$1" visible wanted port
    if ((${SLURM_STEP_NUM_TASKS:-1} > 1)); then TASK_RANK="${SLURM_PROCID:-}"; fi
    TASK_RANK="${RANK:-${TASK_RANK:-}}"
    if [[ -n "$TASK_RANK" ]]; then
        LAUNCHER=("$PYTHON" -u)
        return
    fi
    port="$(master_port)"
    LAUNCHER=("$PYTHON" -m dschat.engine.deepspeed_runner --master_port "$port")
    if [[ "$where" == nodes ]]; then
        LAUNCHER+=(--hostfile "$(several_hosts)")
        return
    fi
    LAUNCHER+=(--hostfile "") # else it uses /job/hostfile, if there is one, and so other machines
    visible="$(num_visible_gpus)"
    wanted="${NUM_GPUS:-$([[ "$where" == one ]] && echo 1 || echo "$visible")}"
    check_num_gpus
    if ((visible)); then
        ((wanted >= 1 && wanted <= visible)) ||
            fail "NUM_GPUS=$wanted: $visible GPU(s) are visible. Give at most as many, or check" \
                "CUDA_VISIBLE_DEVICES."
        if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then # with --num_gpus the launcher would use other GPUs
            wanted="$(cut -d, -f "1-$wanted" <<<"$CUDA_VISIBLE_DEVICES")"
            [[ "$wanted" =~ ^[0-9]+(,[0-9]+)*$ ]] ||
                fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: DeepSpeed's launcher knows GPUs by their" \
                    "numbers alone. Give numbers, or start by torchrun."
            LAUNCHER+=(--include "localhost:$wanted")
        else
            LAUNCHER+=(--num_gpus "$wanted")
        fi
    else
        say "no GPU here: ${NUM_GPUS:-1} rank(s) on the CPU"
        LAUNCHER+=(--num_accelerators "${NUM_GPUS:-1}")
    fi
}

# several_hosts: check the hostfile and print its path.
several_hosts() {
    local file="${HOSTFILE:-/job/hostfile}" hosts
    [[ -f "$file" ]] ||
        fail "$(basename -- "$0") needs several nodes: set HOSTFILE to a DeepSpeed hostfile with a line" \
            "\"HOST slots=8\" for each ($file does not exist), or start the script by srun or torchrun, once" \
            "for each rank."
    hosts="$(grep -cE '^[^#[:space:]]+[[:space:]]+slots=[0-9]+' -- "$file" || true)"
    ((hosts > 1)) ||
        fail "HOSTFILE $file names $hosts node(s); $(basename -- "$0") needs several. Give each a line" \
            "\"HOST slots=8\"."
    command -v pdsh >/dev/null ||
        fail "pdsh is not installed; DeepSpeed needs it to reach other nodes. Install it, or start by srun" \
            "or torchrun."
    printf '%s' "$file"
}

# master_port: print MASTER_PORT, or a free port if it is not set.
master_port() {
    local errors=/dev/stderr
    local code='import sys; from dschat.runtime.ports import free_port
print(free_port(int(sys.argv[1])))'
    [[ -z "${MASTER_PORT:-}" ]] || errors=/dev/null # the message below says enough
    "$PYTHON" -c "$code" "${MASTER_PORT:-0}" 2>"$errors" ||
        fail "MASTER_PORT=${MASTER_PORT:-}: in use, or no port number. Leave it unset for a free port."
}

# planned_processes WHERE: print the number of ranks that a dry run plans for.
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

# report_failure STATUS LOG BYTES: print the cause of a failure, the flags to look at and the log, and
# exit. Only what comes after the first BYTES of the log is of this run.
report_failure() {
    local status="$1" log="$2" said cause flags
    said="$(tail -c "+$(($3 + 1))" -- "$log")"
    cause="$(tac <<<"$said" | awk '{ print } /^error \(rank/ { found = 1; exit } END { exit !found }' | tac || true)"
    if ! grep -q '^error (rank' <<<"$cause"; then
        cause="error: exit status $status"
        if ((status == 137)) || grep -qE 'return code = -9|SIGKILL' <<<"$said"; then
            cause="error: a process was killed, most often because the host's memory ran out."
            cause+=" Leave --offload out, lower --per_device_train_batch_size"
            cause+=" (step 3: --per_device_training_batch_size), or run fewer ranks."
        elif grep -qE '^[A-Za-z.]+Error: ' <<<"$said"; then # of the launcher, or of a library
            cause="error: $(grep -E '^[A-Za-z.]+Error: ' <<<"$said" | tail -n 1)"
        fi
    fi
    flags="$(grep -oE -e '--[a-z][a-z0-9_]+' <<<"$cause" | awk '!seen[$0]++' | head -n 6 | paste -sd ' ' || true)"
    {
        # Not repeated if it is already the last text on the screen.
        [[ "$said" == *"$cause" ]] || printf '\n%s\n' "$cause"
        printf 'flags to look at: %s\n' "${flags:---help lists them}"
        printf 'whole log: %s\n' "$log"
    } >&2
    exit 1
}

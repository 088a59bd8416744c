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
# NAME! has no default and must be given.
positional() {
    local names=() usage="" spec name value
    for spec in "$@"; do
        [[ "$spec" == -- ]] && break
        names+=("$spec")
        usage+=" ${spec%%[!=]*}"
    done
    shift $((${#names[@]} + 1))
    usage=""
    for spec in "${names[@]+"${names[@]}"}"; do usage+=" [${spec%%[!=]*}]"; done
    usage="usage: bash $(basename -- "$0")${usage} [flags of main.py]"
    for spec in "${names[@]+"${names[@]}"}"; do
        name="${spec%%[!=]*}"
        value="${spec#*=}"
        if (($#)) && [[ "$1" != -* ]]; then
            [[ -z "$1" ]] || value="$1"
            shift
        fi
        if [[ "$spec" != *=* ]]; then
            [[ "$value" != "$spec" ]] || fail "$name is missing. $usage"
        fi
        printf -v "$name" '%s' "$value"
    done
    if (($#)) && [[ "$1" != -* ]]; then
        fail "too many positional arguments: '$1' has no place. $usage"
    fi
    REST=("$@")
}

# launch STEP GPUS FLAGS...: run the main of step 1, 2 or 3 with FLAGS and REST behind them, on "one" GPU, on "all" of this
# machine, or on several "nodes". Everything is shown, and kept in training.log in the output folder.
launch() {
    local step="$1" where="$2" main log status
    local words=("${@:3}" "${REST[@]+"${REST[@]}"}")
    main="$(echo "$ROOT"/training/step"$step"_*/main.py)"
    find_python
    if has_word --dry_run "${words[@]}"; then
        WORLD_SIZE="$(planned_processes "$where")" exec "$PYTHON" "$main" "${words[@]}"
    fi
    OUTPUT="$(flag_value --output_dir "${words[@]}")"
    check_output "$OUTPUT"
    log="$OUTPUT/training.log"
    launcher "$where"
    [[ "${RANK:-0}" == 0 ]] || log="$OUTPUT/training.rank$RANK.log"
    status=0
    "${LAUNCHER[@]}" "$main" "${words[@]}" 2>&1 | tee -- "$log" || status="${PIPESTATUS[0]}"
    ((status == 0)) || report_failure "$status" "$log"
}

has_word() {
    local wanted="$1" word
    shift
    for word in "$@"; do [[ "$word" != "$wanted" ]] || return 0; done
    return 1
}

# The value of the last "FLAG value" or "FLAG=value".
flag_value() {
    local flag="$1" value="" before="" word
    shift
    for word in "$@"; do
        if [[ "$before" == "$flag" ]]; then value="$word"; fi
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
    export PYTHON PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
}

check_output() {
    [[ -n "$1" ]] || fail "--output_dir has no value. Give a folder."
    mkdir -p -- "$1" 2>/dev/null && [[ -d "$1" && -w "$1" ]] ||
        fail "--output_dir $1: not a folder that can be written. Give another as OUTPUT, or by --output_dir."
}

num_visible_gpus() {
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        tr -cd , <<<"$CUDA_VISIBLE_DEVICES," | wc -c
    elif has_gpu; then
        nvidia-smi -L | grep -c '^GPU '
    else
        echo 0
    fi
}

# Functions of the other scripts, to be sourced: the virtual environment .venv of the repository.
#
#   PYTHON        the interpreter that makes it (default: python3; 3.10 or later)
#   DSCHAT_TORCH  the requirement for torch, if none is installed yet
#   DSCHAT_CACHE  the folder for what can be made again (default: ~/.cache/dschat)

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
CACHE="${DSCHAT_CACHE:-${XDG_CACHE_HOME:-${HOME:-$ROOT/.venv}/.cache}/dschat}"
VENV="$ROOT/.venv"
if [[ "$ROOT" == *[[:space:]]* ]]; then
    # torch passes the path of its libraries to the linker unquoted. .venv is then a link.
    VENV="$CACHE/venv/$(printf '%s' "$ROOT" | cksum | tr -d ' ')"
fi
VENV_PYTHON="$VENV/bin/python"
INSTALL_LOG="$VENV/install.log"
CPU_TORCH="torch==2.13.0"

say() { printf '%s\n' "$*"; }

fail() {
    printf '\nerror: %s\n' "$*" >&2
    exit 1
}

# prepare_venv EXTRA: activate an environment with what the extra (demo or test) of setup.py needs;
# make it and install what is missing.
prepare_venv() {
    local extra="$1" wanted
    wanted="$(install_key)"
    if is_installed "$extra" "$wanted"; then
        say "[1/3] environment: $VENV" \
            "(complete${PYTHON:+; PYTHON is ignored, remove .venv to change it})"
        activate
        return
    fi
    make_venv
    check_compiler
    install_torch
    say "[3/3] dschat and its dependencies: installing; log in $INSTALL_LOG"
    pip_install --editable "$ROOT[$extra]"
    printf '%s\n' "$wanted" >"$VENV/.installed-$extra"
    activate
}

# install_key: print a line that changes if the installation has to be checked again. The root is part
# of it, since neither an environment nor an editable installation can be moved.
install_key() {
    printf '%s %s' "$(cat -- "$ROOT/setup.py" "$ROOT/requirements.txt" | cksum)" "$ROOT"
}

# is_installed EXTRA KEY: succeed if the extra was installed under this key.
is_installed() {
    local stamp
    # The extra test includes demo.
    for stamp in "$VENV/.installed-$1" "$VENV/.installed-test"; do
        if [[ -x "$VENV_PYTHON" && -f "$stamp" && "$(cat -- "$stamp")" == "$2" ]]; then
            return 0
        fi
    done
    return 1
}

# make_venv: make the environment, unless there is one.
make_venv() {
    local python="${PYTHON:-python3}" options=()
    if [[ -f "$VENV/.dschat" && "$(cat -- "$VENV/.dschat")" == "$ROOT" ]] &&
        "$VENV_PYTHON" -m pip --version &>/dev/null; then
        say "[1/3] environment: $VENV (there already)"
        return
    fi
    # Only a folder that this function made, and that is unfinished or was moved, is replaced.
    if [[ -e "$VENV" && ! -f "$VENV/.dschat" ]]; then
        fail "$VENV exists and was not made by this script. Move it away, and start again."
    fi
    command -v -- "$python" >/dev/null ||
        fail "no $python here. Install Python 3.10 or later, or set PYTHON to its path."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$python is $("$python" --version 2>&1); 3.10 or later is needed. Set PYTHON to the path of one."
    # Use the torch of the system's interpreter, such as that of a GPU image: it is built for the
    # machine. One inside a virtual environment is not visible from another.
    if "$python" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)' &&
        torch_in_range "$python" &>/dev/null; then
        options=(--system-site-packages)
    fi
    say "[1/3] environment: $VENV (new, $("$python" --version 2>&1)${options:+, with the torch of $python})"
    rm -rf -- "$VENV"
    mkdir -p -- "$VENV"
    if [[ "$VENV" != "$ROOT/.venv" && ! -d "$ROOT/.venv" ]]; then
        ln -sfn -- "$VENV" "$ROOT/.venv"
    fi
    printf '%s\n' "$ROOT" >"$VENV/.dschat"
    "$python" -m venv "${options[@]+"${options[@]}"}" "$VENV" >"$INSTALL_LOG" 2>&1 ||
        fail "$python cannot make a virtual environment (on Debian and Ubuntu, install python3-venv):" \
            "$(tail -n 3 -- "$INSTALL_LOG")"
}

# torch_in_range PYTHON: print the version of the interpreter's torch; succeed if requirements.txt
# allows it.
torch_in_range() {
    "$1" - "$ROOT/requirements.txt" <<'PYTHON'
import re, sys
line = next(line for line in open(sys.argv[1]) if line.startswith("torch>="))
low, high = ([int(n) for n in bound.split(".")] for bound in re.findall(r"[<>]=?([0-9.]+)", line))
try:
    import torch
except ImportError:
    sys.exit(1)
print(torch.__version__)
sys.exit(not low <= [int(n) for n in torch.__version__.split(".")[:2]] < high)
PYTHON
}

# install_torch: install torch, unless there is one that requirements.txt allows.
install_torch() {
    local requirement version
    if version="$(torch_in_range "$VENV_PYTHON" 2>/dev/null)"; then
        say "[2/3] torch $version (there already)"
        return
    fi
    if has_gpu; then
        requirement="${DSCHAT_TORCH:-$(grep '^torch>=' -- "$ROOT/requirements.txt")}"
        say "[2/3] torch: installing $requirement; log in $INSTALL_LOG"
    else
        # If pip's indexes have a CPU build of this version, its local version label ranks above the
        # plain version.
        requirement="${DSCHAT_TORCH:-$CPU_TORCH}"
        say "[2/3] torch: installing $requirement for the CPU; log in $INSTALL_LOG" \
            "(if pip finds no CPU build, it installs several GB with CUDA: see README.md, Installation)"
    fi
    pip_install "$requirement"
}

# check_compiler: fail early if DeepSpeed could not compile its CPU op at its first start without a GPU.
check_compiler() {
    local reason="DeepSpeed compiles a part of itself on a machine without a GPU" header compiler
    read -r compiler _ <<<"${CXX:-c++}" # CXX="ccache g++" is two words
    if has_gpu; then
        return
    fi
    command -v -- "$compiler" >/dev/null ||
        fail "no C++ compiler (${CXX:-c++}): $reason. Install one (on Debian and Ubuntu, build-essential)."
    header="$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
    [[ -f "$header" ]] || fail "no $header: $reason. Install Python's headers (on Debian and Ubuntu, python3-dev)."
    [[ "$CACHE" != *[[:space:]]* ]] ||
        fail "the cache folder $CACHE has a space in its name: $reason, which fails there. Set" \
            "DSCHAT_CACHE to another."
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi &>/dev/null; }

# pip_install ARGUMENTS...: run pip install, and show the end of the log if it fails.
pip_install() {
    if ! "$VENV_PYTHON" -m pip install --disable-pip-version-check --no-input "$@" >>"$INSTALL_LOG" 2>&1; then
        printf '\n' >&2
        tail -n 25 -- "$INSTALL_LOG" >&2
        fail "pip install $* failed; the whole log is in $INSTALL_LOG"
    fi
}

# activate: put the environment's programs (deepspeed, ninja) on PATH, and set the folder that keeps
# compiled DeepSpeed operators for later runs.
activate() {
    local version
    export PATH="$VENV/bin:$PATH"
    if [[ -z "${TORCH_EXTENSIONS_DIR:-}" ]]; then
        # torch separates builds by version only in its default folder.
        version="$("$VENV_PYTHON" -c '
import importlib.metadata, sys
print("torch" + importlib.metadata.version("torch"), "python{}.{}".format(*sys.version_info), sep="-")')"
        export TORCH_EXTENSIONS_DIR="$CACHE/torch_extensions/$version"
    fi
}

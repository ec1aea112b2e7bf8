# Sourced by the other scripts: `prepare EXTRA` makes .venv at the repository root ready, and returns at once when it is.
#
# What it promises: works from any folder; keeps a torch that is already there; never pulls CUDA packages onto a machine
# without an NVIDIA driver; running it twice does the work once. Set PYTHON to choose the interpreter.

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"

_say() { printf '%s\n' "$*" >&2; }

_has_torch() { "$1" -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)' 2>/dev/null; }

_find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    _say "error: no Python 3.10 or newer found; set PYTHON to one"
    return 1
}

_make_venv() {
    local python flags=()
    python="$(_find_python)" || return 1
    # Keep an installed torch: it may be a vendor's build that no index offers.
    if _has_torch "$python"; then
        flags+=(--system-site-packages)
    fi
    _say "making $VENV with $("$python" --version)"
    if ! "$python" -m venv ${flags[@]+"${flags[@]}"} "$VENV" >/dev/null 2>&1; then
        # Debian splits ensurepip into a package of its own. An environment without pip is enough where the outer pip
        # can install into it.
        rm -rf "$VENV"
        "$python" -m venv --without-pip ${flags[@]+"${flags[@]}"} "$VENV" || return 1
    fi
    if ! "$VENV_PYTHON" -c 'import pip' 2>/dev/null; then
        "$python" -m pip --python "$VENV_PYTHON" install --quiet pip || return 1
    fi
    # --system-site-packages means those of the base interpreter. When $python is itself in an environment, its own
    # packages are not among them, so they are named here.
    if [ "${#flags[@]}" -gt 0 ] && ! _has_torch "$VENV_PYTHON"; then
        "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
            >"$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer-environment.pth"
    fi
}

_pip_install() {
    local log status=0
    log="$(mktemp)"
    "$VENV_PYTHON" -m pip install --disable-pip-version-check --no-input "$@" >"$log" 2>&1 || status=$?
    if [ "$status" -ne 0 ]; then
        _say "error: pip install $* failed:"
        tail -n 40 "$log" >&2
    fi
    rm -f "$log"
    return "$status"
}

_install() {
    local extra="$1"
    if ! _has_torch "$VENV_PYTHON"; then
        if [ -e /proc/driver/nvidia/version ] || nvidia-smi >/dev/null 2>&1; then
            _say "installing torch"
            _pip_install torch || return 1
        else
            _say "installing torch (no NVIDIA driver: the CPU build is enough)"
            _pip_install torch==2.13.0 || return 1
        fi
    fi
    _say "installing gemini-memory[$extra]"
    _pip_install -e "$ROOT[$extra]"
}

# The stamp holds all that decides what is installed; it lies inside .venv, so deleting that folder starts afresh.
_stamp() {
    {
        cat "$ROOT/pyproject.toml"
        printf '%s\n' "$1"
        readlink -f "$VENV_PYTHON"
    } | cksum
}

prepare() {
    local extra="$1" stamp="$VENV/.gemini-memory-$1"
    if [ -x "$VENV_PYTHON" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(_stamp "$extra")" ]; then
        return 0
    fi
    # Two scripts started together must not install into one environment at once.
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$ROOT/.venv.lock"
        flock 9
    fi
    if [ ! -x "$VENV_PYTHON" ]; then
        _make_venv || return 1
    fi
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$(_stamp "$extra")" ]; then
        _install "$extra" || return 1
        _stamp "$extra" >"$stamp"
    fi
    if command -v flock >/dev/null 2>&1; then
        exec 9>&-
    fi
}

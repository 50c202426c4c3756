# Sourced by run_llama_train.sh and test/run.sh. Sets PYTHON to an interpreter that has what is needed: the current
# one, or else the repository's own virtual environment, which is made and filled where it does not exist yet.
# TORCHTRAIN_VENV names another place for it, and then the current interpreter is not considered.

# use_python ROOT EXTRA MODULE...: EXTRA is the project's optional dependency group, or empty.
use_python() {
    local root=$1 extra=$2 venv=${TORCHTRAIN_VENV:-$1/.venv}
    shift 2
    if [ -z "${TORCHTRAIN_VENV:-}" ] && has_modules python3 "$@"; then
        PYTHON=python3
        return
    fi
    PYTHON=$venv/bin/python
    if has_modules "$PYTHON" "$@"; then
        return
    fi
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "torchtrain needs Python 3.10 or newer; python3 is $(python3 --version 2>&1 || echo missing)" >&2
        return 2
    fi
    echo "This Python lacks what torchtrain needs: installing it once into $venv (a few minutes)" >&2
    # Some distributions ship venv without ensurepip; then the outer pip installs into it.
    local pip=("$PYTHON" -m pip)
    if ! python3 -m venv "$venv" 2>/dev/null; then
        python3 -m venv --without-pip "$venv"
        pip=(python3 -m pip --python "$PYTHON")
    fi
    "${pip[@]}" install --quiet --editable "$root${extra:+[$extra]}"
}

# has_modules PYTHON MODULE...: whether PYTHON is new enough, and has every module and the right torch, importing none.
has_modules() {
    local python=$1
    shift
    command -v "$python" >/dev/null && "$python" - "$@" <<'PY'
import importlib.metadata
import importlib.util
import sys

if sys.version_info < (3, 10) or any(importlib.util.find_spec(name) is None for name in sys.argv[1:]):
    sys.exit(1)
version = tuple(int(part) for part in importlib.metadata.version("torch").split(".")[:2])
sys.exit(not (2, 11) <= version < (2, 14))
PY
}

RUN_MODULES=(torch numpy tomli pydantic sentencepiece tensorboard)

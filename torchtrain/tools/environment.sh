# shellcheck shell=bash
# Sourced by run_llama_train.sh, test/run.sh and test/gpu.sh. Sets PYTHON to an interpreter that has what pyproject.toml
# asks for: the current one, or else the repository's own virtual environment, which is made and filled where it does
# not exist yet. TORCHTRAIN_VENV names another place for it, and then the current interpreter is not considered.

# use_python ROOT EXTRA [OPTION...]: EXTRA is the project's optional dependency group, or empty; the OPTIONs are those of
# `python3 -m venv` for an environment that does not exist yet.
use_python() {
    local root=$1 extra=$2 venv=${TORCHTRAIN_VENV:-$1/.venv}
    shift 2
    if [ -z "${TORCHTRAIN_VENV:-}" ] && has_dependencies python3 "$root" "$extra"; then
        PYTHON=python3
        return
    fi
    PYTHON=$venv/bin/python
    if has_dependencies "$PYTHON" "$root" "$extra"; then
        return
    fi
    if ! command -v python3 >/dev/null; then
        echo "torchtrain needs Python 3.10 or newer, and there is no python3 on the PATH" >&2
        return 2
    fi
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "torchtrain needs Python 3.10 or newer, and python3 is $(python3 --version 2>&1)" >&2
        return 2
    fi
    echo "This Python lacks what torchtrain needs: installing it once into $venv (a few minutes)" >&2
    local pip=("$PYTHON" -m pip)
    if ! "${pip[@]}" --version >/dev/null 2>&1 && ! python3 -m venv "$@" "$venv" 2>/dev/null; then
        # Some distributions ship venv without ensurepip; then the outer pip installs into it.
        python3 -m venv "$@" --without-pip "$venv"
        pip=(python3 -m pip --python "$PYTHON")
    fi
    "${pip[@]}" install --quiet --editable "$root${extra:+[$extra]}"
    echo "To use it for other commands (python, torchrun, tensorboard): source $venv/bin/activate" >&2
}

# has_dependencies PYTHON ROOT EXTRA: whether PYTHON is new enough and has the packages that ROOT/pyproject.toml asks
# for, in the versions that it allows. Imports none of them.
has_dependencies() {
    command -v "$1" >/dev/null && "$1" - "$2" "$3" <<'PY'
import importlib.metadata
import operator
import re
import sys

if sys.version_info < (3, 10):
    sys.exit(1)
try:
    import tomllib
except ImportError:  # Python 3.10; tomli is one of the dependencies
    try:
        import tomli as tomllib
    except ImportError:
        sys.exit(1)

# Imported only by runs that read such files, so that a bare GPU image can do without them; some tests do read them.
OPTIONAL = ("datasets", "tokenizers")
COMPARE = {">=": operator.ge, "<": operator.lt}


def numbers(version):
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


root, extra = sys.argv[1:]
with open(root + "/pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
wanted = project["dependencies"]
if extra != "dev":
    wanted = [text for text in wanted if not text.startswith(OPTIONAL)]
if extra:
    wanted += project["optional-dependencies"][extra]
for text in wanted:
    name = re.match(r"[\w-]+", text).group()
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        sys.exit(1)
    for sign, bound in re.findall(r"(>=|<)([\d.]+)", text):
        if not COMPARE[sign](numbers(version), numbers(bound)):
            sys.exit(1)
PY
}

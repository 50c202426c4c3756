#!/usr/bin/env bash
# Every check, on a machine with Python and nothing else: set-up with the development extras, ruff, mypy, all tests.
# Arguments go to pytest: ./test/run.sh -m "not slow" for the quick part.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/torchtrain/tools/environment.sh"
use_python "$root" dev
cd "$root"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
export OMP_NUM_THREADS=1  # three workers and their ranks share the cores as it is
unset PYTHONDONTWRITEBYTECODE  # what is compiled for one worker or rank serves all others
exec "$PYTHON" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"

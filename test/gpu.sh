#!/usr/bin/env bash
# The smoke run of a machine with GPUs: what no CPU can show, in about ten minutes on one card. docs/gpu.md says what each
# check shows. It ends with a summary that can be pasted into an issue.
#
#   ./test/gpu.sh                   on every visible GPU
#   ./test/gpu.sh --device cpu      a dry run: the checks themselves, small, on two CPU ranks over gloo
#   ./test/gpu.sh -k ring           other arguments go to pytest
#
# A system's Python that has PyTorch with CUDA is used as it is, or, where the rest is missing, seen by the virtual
# environment that is made; TORCHTRAIN_VENV names another one.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
device=cuda
case "${1:-}" in
    --device=*)
        device=${1#--device=}
        shift
        ;;
    --device)
        device=${2:-}
        shift $(($# > 1 ? 2 : 1))
        ;;
esac
if [ "$device" != cuda ] && [ "$device" != cpu ]; then
    echo "--device '$device': must be cuda or cpu" >&2
    exit 2
fi
source "$root/torchtrain/tools/environment.sh"
use_python "$root" gpu --system-site-packages
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export TORCHTRAIN_TEST_DEVICE=$device
unset PYTHONDONTWRITEBYTECODE  # what is compiled for one start serves all others
exec "$PYTHON" -m pytest --override-ini addopts=--strict-markers --quiet -p no:cacheprovider test/gpu "$@"

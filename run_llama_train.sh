#!/usr/bin/env bash
# Train a Llama on every visible GPU, or on 2 CPU processes where there is none:
#
#   ./run_llama_train.sh [trainer options]          e.g. ./run_llama_train.sh --training.steps 20
#
# Environment: NGPU (processes on this node), CONFIG_FILE (default train_configs/debug_model.toml), LOG_RANK (default 0),
# MAX_RESTARTS (default 0), CHECK_MEMORY (0: start also what does not fit into GPUs); for several nodes torchrun's
# variables, NNODES=MIN:MAX where they may come and go, see torchtrain/tools/launch.py. The exit status is that of the run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/torchtrain/tools/environment.sh"
use_python "$root" ""
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m torchtrain.tools.launch "$@"

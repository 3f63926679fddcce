#!/usr/bin/env bash
# From a trained MoE to an answer out of `vllm serve --quantization moeq`.
#
#   examples/quickstart.sh                       trains a small model first (two minutes)
#   examples/quickstart.sh MODEL [OPTION ...]    MODEL: folder or hub id; OPTIONs go to
#                                                `moeq quantize`, as in --group-size 64
#
# MOEQ_BASELINE=0 skips the run of the 16-bit model, for models that do not fit in memory.
# Everything it makes is below build/quickstart; logs of the servers too.
set -euo pipefail
set -m # each server gets a process group of its own, so that its workers end with it

cd "$(dirname "$0")/.."
. examples/env.sh

export HF_HUB_DISABLE_TELEMETRY=1 VLLM_NO_USAGE_STATS=1
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
work=build/quickstart
server=
address=

stop_server() {
  [ -n "$server" ] || return 0
  kill -TERM -- "-$server" 2>/dev/null || true
  for _ in $(seq 100); do
    kill -0 -- "-$server" 2>/dev/null || break
    sleep 0.2
  done
  kill -KILL -- "-$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
  server=
}
trap stop_server EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# start_server MODEL LOG [OPTION ...]: returns when the server answers, exits if it does not start.
start_server() {
  local model=$1 log=$2 port
  shift 2
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  address=http://127.0.0.1:$port
  local options=(--host 127.0.0.1 --port "$port" --max-model-len 512 --max-num-seqs 8)
  if ! python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    # Starts a minute faster. vLLM's own CPU rotary op, which eager mode would use, is wrong for
    # DeepSeek models; its torch twin is right.
    options+=(--enforce-eager --compilation-config '{"custom_ops": ["none"]}')
  fi
  vllm serve "$model" "${options[@]}" "$@" >"$log" 2>&1 &
  server=$!
  for _ in $(seq 1200); do
    kill -0 "$server" 2>/dev/null || break
    if curl --silent --fail --output /dev/null "$address/health"; then return 0; fi
    sleep 0.5
  done
  echo "the server for $model did not start; the end of $log:" >&2
  tail -n 30 "$log" >&2
  exit 1
}

mkdir -p "$work"
if [ $# -eq 0 ]; then
  rm -rf "$work/tiny"
  echo "== training a small Mixtral on the text inside CPython"
  python examples/train_tiny_moe.py "$work/tiny"
  model=$work/tiny/model
  quantize_options=(--base-router "$work/tiny/routers.safetensors")
else
  model=$1
  shift
  quantize_options=("$@")
fi
packed=$work/$(basename "$model")-moeq
python examples/corpus.py >"$work/heldout.txt"

echo "== quantizing $model to 2.5 bits"
rm -rf "$packed"
moeq quantize "$model" -o "$packed" --bits 2.5 "${quantize_options[@]}"
moeq verify "$packed"

before=skipped
if [ "${MOEQ_BASELINE:-1}" != 0 ]; then
  echo "== serving the 16-bit model, to measure its perplexity"
  start_server "$model" "$work/baseline.log"
  before=$(python examples/perplexity.py "$address" "$work/heldout.txt")
  stop_server
fi

echo "== vllm serve $packed --quantization moeq"
start_server "$packed" "$work/moeq.log" --quantization moeq
answer=$(curl --silent --show-error --fail "$address/v1/completions" \
  --header 'Content-Type: application/json' \
  --data "{\"model\": \"$packed\", \"prompt\": \"Return the\", \"max_tokens\": 24, \"temperature\": 0}")
after=$(python examples/perplexity.py "$address" "$work/heldout.txt")
stop_server

python - "$model" "$packed" "$answer" "$before" "$after" <<'EOF'
import json, sys
from moeq.checkpoint import CheckpointReader, resolve_model

model, packed, answer, before, after = sys.argv[1:]
source = sum(info.num_bytes for info in CheckpointReader(resolve_model(model)).tensors.values())
reader = CheckpointReader(resolve_model(packed))
result = sum(info.num_bytes for info in reader.tensors.values())
facts = reader.config["quantization_config"]["provenance"]
print()
print("prompt      Return the")
print("answer     ", repr(json.loads(answer)["choices"][0]["text"]))
print(f"16-bit      {source / 1e6:10.2f} MB   held-out perplexity {before}")
print(f"packed      {result / 1e6:10.2f} MB   held-out perplexity {after}")
print(
    f"experts     {facts['achieved_bits']:.4f} bits on average ({facts['requested_bits']} asked),"
    f" {facts['bits_per_weight']:.4f} bits per weight with scales and zero points"
)
EOF

#!/usr/bin/env bash
# Tests and measures the GPU kernel on a machine that has a GPU but, maybe, no network.
#
#   gpu.sh gather                 where there is a network: vLLM and other kernels, in build/gpu
#   gpu.sh parts                  the parts, those most worth first, and the most seconds of each
#   gpu.sh run [--out DIR] [--seconds N] [--budget N] [PART...]
#                                 on the GPU machine, in the same tree with its build/gpu
#
# Without a PART all of them run in that order, except those whose seconds are more than what is left
# of --budget (default 800). --seconds (default and at most 200) is for e2e, tune and each shape. A
# part that fails does not end the run, but its exit status is 1. Results are in DIR: --out, else
# $OUT, else build/gpu/results: RESULTS.md, tiles.json of tune, and a log of each part.
set -euo pipefail
unset CDPATH
cd "$(dirname "$0")/../.."

BUNDLE=build/gpu/site.tar.xz
SHAPES=(mixtral qwen3 olmoe mixtral-tp8 qwen3-tp2)
PARTS=(tests e2e mixtral calibrate qwen3 tune sanitizer olmoe mixtral-tp8 qwen3-tp2)
PYTHON_VERSION=3.12

usage() {
  echo "gpu.sh: $*" >&2
  sed -n '4,7p' examples/benchmarks/gpu.sh | cut -c3- >&2
  exit 2
}

gather() {
  [ $# = 0 ] || usage "gather takes no arguments: $*"
  local work platforms=() glibc
  work=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder of now
  trap "rm -rf '$work'" EXIT
  for glibc in 2_12 2_17 2_24 2_26 2_27 2_28 2_31 2_34; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
  done
  python3 -m pip download -qq --no-deps --only-binary=:all: --implementation cp \
    --python-version "$PYTHON_VERSION" "${platforms[@]}" --platform manylinux2014_x86_64 \
    --platform manylinux2010_x86_64 --dest "$work" --requirement examples/benchmarks/gpu_bundle.txt
  PYTHONPATH=$PWD python3 examples/benchmarks/gpu_bundle.py "$work" "$BUNDLE"
}

# Prints the most seconds of a part, given --seconds.
limit() {
  case $1 in
    tests) echo 230 ;;
    calibrate) echo 220 ;;
    sanitizer) echo 150 ;;
    *) echo $(($2 + 40)) ;;
  esac
}

parts() {
  [ $# = 0 ] || usage "parts takes no arguments: $*"
  local part total=0
  for part in "${PARTS[@]}"; do
    total=$((total + $(limit "$part" 200)))
    printf '%-12s at most %s s, %4s s with those before\n' "$part" "$(limit "$part" 200)" "$total"
  done
}

run() {
  local out=${OUT:-build/gpu/results} seconds=200 budget=800 parts=() failed=0 part
  while [ $# -gt 0 ]; do
    case $1 in
      --out | --seconds | --budget)
        [ $# -gt 1 ] || usage "$1 needs a value"
        case $1 in
          --out) out=$2 ;;
          --seconds) seconds=$2 ;;
          --budget) budget=$2 ;;
        esac
        shift 2
        ;;
      -*) usage "unknown option $1" ;;
      *)
        case " ${PARTS[*]} " in
          *" $1 "*) parts+=("$1") ;;
          *) usage "unknown part $1: choose of ${PARTS[*]}" ;;
        esac
        shift
        ;;
    esac
  done
  [[ $seconds =~ ^[0-9]+$ ]] && [ "$seconds" -gt 0 ] && [ "$seconds" -le 200 ] ||
    usage "--seconds $seconds is not 1 to 200"
  [[ $budget =~ ^[0-9]+$ ]] || usage "--budget $budget is no number of seconds"
  [ ${#parts[@]} -gt 0 ] || parts=("${PARTS[@]}")
  python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "gpu.sh: torch finds no CUDA GPU here" >&2; exit 1; }

  mkdir -p "$out"
  out=$(cd "$out" && pwd)
  unpack
  export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
  export PYTHONPATH="$PWD:$PWD/offline:$PWD/build/gpu/site${PYTHONPATH:+:$PYTHONPATH}"

  local function most
  for part in "${parts[@]}"; do
    most=$(limit "$part" "$seconds")
    if [ $((SECONDS + most)) -gt "$budget" ]; then
      echo "== $part not started: it may take $most s, and $((budget - SECONDS)) s are left"
      continue
    fi
    echo "== $part"
    case " ${SHAPES[*]} " in
      *" $part "*) function=part_shape ;;
      *) function=part_$part ;;
    esac
    "$function" "$out" "$seconds" "$part" 2>&1 | tee "$out/$part.log" ||
      { failed=1; echo "== $part FAILED"; }
    echo "== $SECONDS s so far"
  done
  return $failed
}

unpack() {
  local sum
  if [ ! -e "$BUNDLE" ]; then
    echo "gpu.sh: $BUNDLE is missing (gpu.sh gather): what is not installed will not be measured"
    return 0
  fi
  sum=$(sha256sum <"$BUNDLE")
  [ "$(cat build/gpu/site.sha256 2>/dev/null)" != "$sum" ] || return 0
  rm -rf build/gpu/site
  mkdir build/gpu/site
  tar -xJf "$BUNDLE" -C build/gpu/site
  echo "$sum" >build/gpu/site.sha256
}

part_tests() {
  local workers=()
  ! python3 -c 'import xdist' 2>/dev/null || workers=(-n 8)  # most of the time is compilation
  timeout 230 python3 -m pytest -q -m gpu "${workers[@]}" tests/vllm_moeq/kernels/triton
}

part_sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed: not run"
    return 0
  fi
  # Each tensor an allocation of its own, so that accesses beyond its end are seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 150 compute-sanitizer --tool memcheck \
    --error-exitcode 9 python3 -m pytest -q -m gpu tests/vllm_moeq/kernels/triton/test_gpu.py \
    -k 'test_numbers_of_tokens and bfloat16 and not 1024 and not 4096'
}

part_tune() {
  local shape status=0
  export MOEQ_TILES="$1/tiles.json"
  for shape in mixtral qwen3 olmoe; do
    timeout $(($2 / 3 + 13)) python3 -m moeq.cli bench --tune --shape "$shape" \
      --seconds $(($2 / 3)) || status=1
  done
  return $status
}

part_e2e() {
  timeout $(($2 + 40)) python3 examples/benchmarks/gpu_e2e.py --seconds $(($2 - 40)) \
    --results "$1/RESULTS.md"
}

part_calibrate() {
  timeout 220 python3 examples/benchmarks/gpu_calibration.py --results "$1/RESULTS.md"
}

part_shape() {
  [ ! -e "$1/tiles.json" ] || export MOEQ_TILES="$1/tiles.json"
  timeout --kill-after 5 $(($2 + 30)) python3 examples/benchmarks/gpu_moe.py --shapes "$3" \
    --seconds "$2" --results "$1/RESULTS.md"
}

case ${1-} in
  gather | parts | run) "$@" ;;
  *) usage "expected gather, parts or run" ;;
esac

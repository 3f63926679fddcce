#!/usr/bin/env bash
# Tests and measures the GPU kernel on a machine that has a GPU but, maybe, no network.
#
#   gpu.sh gather                 where there is a network: collects the other kernels, in build/gpu
#   gpu.sh run [--out DIR] [--seconds N] [PART...]
#                                 on the GPU machine, in the same tree with its build/gpu
#
# PART: tests, sanitizer, tune, or a shape of gpu_moe.py; default: tests, sanitizer and all shapes,
# which takes at most 25 minutes. Each part ends within 4 minutes; --seconds is for each shape and
# for tune (default 180). A part that fails does not end the run, but its exit status is 1. Results
# are in DIR: --out, else $OUT, else build/gpu/results.
set -euo pipefail
unset CDPATH
cd "$(dirname "$0")/../.."

BUNDLE=build/gpu/site.tar.xz
SHAPES=(mixtral qwen3 olmoe mixtral-tp8 qwen3-tp2)
PYTHON_VERSION=3.12

usage() {
  echo "gpu.sh: $*" >&2
  sed -n '4,6p' examples/benchmarks/gpu.sh | cut -c3- >&2
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

run() {
  local out=${OUT:-build/gpu/results} seconds=180 parts=() failed=0 part
  while [ $# -gt 0 ]; do
    case $1 in
      --out | --seconds)
        [ $# -gt 1 ] || usage "$1 needs a value"
        if [ "$1" = --out ]; then out=$2; else seconds=$2; fi
        shift 2
        ;;
      -*) usage "unknown option $1" ;;
      *)
        case " tests sanitizer tune ${SHAPES[*]} " in
          *" $1 "*) parts+=("$1") ;;
          *) usage "unknown part $1: choose of tests sanitizer tune ${SHAPES[*]}" ;;
        esac
        shift
        ;;
    esac
  done
  [[ $seconds =~ ^[0-9]+$ ]] && [ "$seconds" -gt 0 ] && [ "$seconds" -le 180 ] ||
    usage "--seconds $seconds is not 1 to 180"
  [ ${#parts[@]} -gt 0 ] || parts=(tests sanitizer "${SHAPES[@]}")
  python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "gpu.sh: torch finds no CUDA GPU here" >&2; exit 1; }

  mkdir -p "$out"
  out=$(cd "$out" && pwd)
  if [ -e "$BUNDLE" ]; then
    mkdir -p build/gpu/site
    tar -xJf "$BUNDLE" -C build/gpu/site
  else
    echo "gpu.sh: $BUNDLE is missing (gpu.sh gather): contenders that are not installed will not be measured"
  fi
  export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
  export PYTHONPATH="$PWD:$PWD/offline:$PWD/build/gpu/site${PYTHONPATH:+:$PYTHONPATH}"

  local function
  for part in "${parts[@]}"; do
    echo "== $part"
    case $part in
      tests | sanitizer | tune) function=part_$part ;;
      *) function=part_shape ;;
    esac
    "$function" "$out" "$seconds" "$part" 2>&1 | tee "$out/$part.log" ||
      { failed=1; echo "== $part FAILED"; }
  done
  return $failed
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
    timeout $(($2 / 3 + 20)) python3 -m moeq.cli bench --tune --shape "$shape" \
      --seconds $(($2 / 3)) || status=1
  done
  return $status
}

part_shape() {
  [ ! -e "$1/tiles.json" ] || export MOEQ_TILES="$1/tiles.json"
  timeout $(($2 + 30)) python3 examples/benchmarks/gpu_moe.py --shapes "$3" --seconds "$2" \
    --results "$1/RESULTS.md"
}

case ${1-} in
  gather | run) "$@" ;;
  *) usage "expected gather or run" ;;
esac

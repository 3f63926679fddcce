#!/usr/bin/env bash
# Runs the CPU kernel under AddressSanitizer and UndefinedBehaviorSanitizer, once for each
# instruction set that this machine has.
#
#   tests/sanitize.sh [number of random layers]
set -euo pipefail
cd "$(dirname "$0")/.."
build=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$build"' EXIT

check() {  # name, compiler flags...
  local name=$1
  shift
  "${CXX:-g++}" -std=c++20 -O0 -g -fopenmp -Wall -Wextra -Werror -Wno-psabi \
    -fsanitize=address,undefined -fno-sanitize-recover=all \
    "$@" tests/vllm_moeq/kernels/cpu/check.cpp -o "$build/$name"
  OMP_NUM_THREADS=2 "$build/$name" "$cases"
}

cases=${1:-60}
avx2=(-mavx2 -mfma -mf16c)
check avx2 "${avx2[@]}" -DMOEQ_ISA_AVX2 &
first=$!
check portable "${avx2[@]}" &  # AMX as well, whose memory no sanitizer watches
second=$!
wait "$first"
wait "$second"
if grep -qw avx512_vnni /proc/cpuinfo; then
  check avx512_vnni "${avx2[@]}" -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni
fi

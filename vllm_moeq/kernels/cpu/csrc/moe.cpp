// The C interface: what library.py calls.
#include "moe.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#include "experts.h"
#include "grids.h"
#include "linear.h"
#include "repack.h"
#include "rounding.h"

const char* moeq_isa() { return moeq::kIsaName; }

int64_t moeq_tiles_bytes(int64_t bits, int64_t group_size, int64_t rows, int64_t columns) {
  const size_t one = moeq::tile_bytes(static_cast<int>(bits), static_cast<int>(group_size),
                                      static_cast<int>(columns));
  return static_cast<int64_t>(one) * moeq::tiles(static_cast<int>(rows));
}

void moeq_repack(int64_t bits, int64_t group_size, int64_t columns, const uint8_t* packed,
                 const uint16_t* scale, const uint8_t* zero, int64_t first, int64_t stride,
                 int64_t rows, uint8_t* out, int64_t every) {
  const moeq::Canonical source{packed, scale, zero, columns, group_size};
  const moeq::RowRange range{first, stride, rows};
  moeq::with_width(static_cast<int>(bits),
                   [&](auto width) { moeq::repack<width>(source, range, out, every); });
}

void moeq_use_huge_pages(void* memory, int64_t bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const auto end =
      (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
  // Advice: where the kernel cannot follow it, small pages do.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

int32_t moeq_fused_experts(const moeq::Call* call) {
  try {
    return call->int8 ? moeq::run_experts<moeq::Int8Kernel>(*call)
                      : moeq::run_experts<moeq::Int16Kernel>(*call);
  } catch (const std::bad_alloc&) {
    return moeq::kOutOfMemory;
  }
}

int32_t moeq_linear(const moeq::LinearCall* call) {
  try {
    return call->int8 ? moeq::run_linear<moeq::Int8Kernel>(*call)
                      : moeq::run_linear<moeq::Int16Kernel>(*call);
  } catch (const std::bad_alloc&) {
    return moeq::kOutOfMemory;
  }
}

uint64_t moeq_read(const uint8_t* memory, int64_t bytes) {
  const auto* words = reinterpret_cast<const uint64_t*>(memory);
  uint64_t result = 0;
#pragma omp parallel for schedule(static) reduction(^ : result)
  for (int64_t i = 0; i < bytes / 8; ++i) result ^= words[i];
  return result;
}

void moeq_round_columns(int64_t columns, int64_t rows, float largest, const float* factor,
                        const float* wanted, const float* sums, const float* scale,
                        const float* zero, float* codes, float* difference) {
  moeq::round_columns({columns, rows, scale, codes, largest}, factor, wanted, sums, zero,
                      difference);
}

void moeq_descend(int64_t columns, int64_t rows, float largest, const float* hessian,
                  const float* curvature, const float* scale, float* codes, float* gradient) {
  moeq::descend({columns, rows, scale, codes, largest}, hessian, curvature, gradient);
}

int32_t moeq_search_grids(int64_t rows, int64_t columns, int64_t group_size, float largest,
                          float unit, const float* shares, int64_t count, const float* weights,
                          const float* importance, float* scale, float* zero) {
  return moeq::search_grids(rows, columns, group_size, {largest, unit}, shares,
                            static_cast<int>(count), weights, importance, scale, zero);
}

void moeq_refine(int64_t columns, int64_t rows, int64_t group_size, float largest, float unit,
                 int64_t sweeps, const float* hessian, const float* curvature, float* codes,
                 float* gradient, float* scale, float* zero) {
  moeq::refine(columns, rows, group_size, {largest, unit}, sweeps, hessian, curvature, codes,
               gradient, scale, zero);
}

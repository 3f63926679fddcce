// Grids of moeq's GPTQ, see offline/moeq/rounding/groups.py: the search for the first ones, and
// the refinement of grids and codes together. A group is worked on while it is in the cache, and no
// result depends on the number of threads.
#pragma once
#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "rounding.h"
#include "unroll.h"

namespace moeq {

// The largest code, and the format's scales (float16) and zero points (units of so many codes).
struct Storable {
  float largest;  // code
  float unit;

  MOEQ_INLINE float clamp(float value, float low, float high) {
    return std::min(std::max(value, low), high);
  }
  float scale(float value) const {
    const float inside = clamp(value, 0x1p-24f, 65504.0f);
    return _cvtsh_ss(_cvtss_sh(inside, _MM_FROUND_TO_NEAREST_INT));
  }
  // In codes; code 0 is near `low`.
  float zero(float low, float scale) const {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
    return (clamp(low / (-unit * scale), 0.0f, 255.0f) + magic - magic) * unit;
  }
};

struct Grid {
  float scale, zero, error;
};

// The weights of a group, a multiple of 8, and how much the square of each one's error counts.
struct Group {
  int size;
  const float *weights, *importance;

  // The grid whose codes go from `low` to `high`, as nearly as the format allows.
  Grid between(const Storable& format, float low, float high) const {
    const float scale = format.scale((high - low) / format.largest);
    const Codes codes(format, scale, format.zero(low, scale));
    __m256 error = _mm256_setzero_ps();
    each([&](__m256 weight, __m256 counts) __attribute__((always_inline)) {
      const __m256 steps = codes.steps(weight);
      const __m256 off = _mm256_sub_ps(codes.nearest(steps), steps);
      error = _mm256_fmadd_ps(_mm256_mul_ps(counts, off), off, error);
    });
    return {scale, _mm256_cvtss_f32(codes.zero), sum(error) * scale * scale};
  }

  // The grid that fits the codes of another one best, by least squares.
  Grid fitted(const Storable& format, const Grid& grid) const {
    const Codes codes(format, grid.scale, grid.zero);
    __m256 counted = _mm256_setzero_ps(), code_sum = counted, weight_sum = counted;
    each([&](__m256 weight, __m256 counts) __attribute__((always_inline)) {
      counted = _mm256_add_ps(counted, counts);
      code_sum = _mm256_fmadd_ps(counts, codes.nearest(codes.steps(weight)), code_sum);
      weight_sum = _mm256_fmadd_ps(counts, weight, weight_sum);
    });
    const float total = std::max(sum(counted), 1e-30f);
    const float mean_code = sum(code_sum) / total, mean = sum(weight_sum) / total;
    const __m256 middle = _mm256_set1_ps(mean_code);
    __m256 squares = _mm256_setzero_ps(), products = squares;
    each([&](__m256 weight, __m256 counts) __attribute__((always_inline)) {
      const __m256 centred = _mm256_sub_ps(codes.nearest(codes.steps(weight)), middle);
      const __m256 weighted = _mm256_mul_ps(counts, centred);
      squares = _mm256_fmadd_ps(weighted, centred, squares);
      products = _mm256_fmadd_ps(weighted, weight, products);
    });
    const float scale = sum(products) / total / std::max(sum(squares) / total, 1e-12f);
    const float low = mean - scale * mean_code;
    return between(format, low, low + scale * format.largest);
  }

  // The best grid among ranges that differ at both ends, refined by least squares.
  // False if the weights are not finite, or too large for the format.
  bool search(const Storable& format, const float* shares, int count, Grid& best) const {
    constexpr int kRefinements = 2;
    float low = 0, high = 0, finite = 0;
    for (int i = 0; i < size; ++i) {
      low = std::min(low, weights[i]);
      high = std::max(high, weights[i]);
      finite += weights[i] * 0.0f;
    }
    if (finite != 0.0f || !(high - low <= 65504.0f * format.largest)) return false;
    best = between(format, low * shares[0], high * shares[0]);
    const auto better = [&](const Grid& other) {
      if (other.error < best.error) best = other;
    };
    for (int i = 1; i < count * count; ++i)
      better(between(format, low * shares[i / count], high * shares[i % count]));
    for (int i = 0; i < kRefinements; ++i) better(fitted(format, best));
    return true;
  }

 private:
  // Codes of 8 weights on a grid.
  struct Codes {
    __m256 inverse, zero, largest;

    Codes(const Storable& format, float scale, float zero_point)
        : inverse(_mm256_set1_ps(1.0f / scale)),
          zero(_mm256_set1_ps(zero_point)),
          largest(_mm256_set1_ps(format.largest)) {}
    __m256 steps(__m256 weights) const { return _mm256_fmadd_ps(weights, inverse, zero); }
    __m256 nearest(__m256 steps) const {
      const __m256 inside = _mm256_min_ps(_mm256_max_ps(steps, _mm256_setzero_ps()), largest);
      return _mm256_round_ps(inside, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
  };

  template <class F>
  void each(F&& work) const {
    for (int i = 0; i + 8 <= size; i += 8)
      work(_mm256_loadu_ps(weights + i), _mm256_loadu_ps(importance + i));
  }

  static float sum(__m256 values) {
    std::array<float, 8> each{};
    _mm256_storeu_ps(each.data(), values);
    return ((each[0] + each[4]) + (each[2] + each[6])) +
           ((each[1] + each[5]) + (each[3] + each[7]));
  }
};

// Find the grids of a matrix [rows][columns]; importance: [columns]; scale, zero: [groups][rows].
// False if a weight is not finite, or too large for the format.
inline bool search_grids(int64_t rows, int64_t columns, int64_t group_size, const Storable& format,
                         const float* shares, int count, const float* weights,
                         const float* importance, float* scale, float* zero) {
  int possible = 1;
#pragma omp parallel for schedule(static) reduction(& : possible)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t first = 0, place = row; first < columns; first += group_size, place += rows) {
      const int size = static_cast<int>(std::min(group_size, columns - first));
      const Group group{size, weights + row * columns + first, importance + first};
      Grid best{};
      possible &= group.search(format, shares, count, best);
      scale[place] = best.scale;
      zero[place] = best.zero;
    }
  return possible;
}

// Rows of a slab of `refine`: of each column one cache line.
constexpr int kSlab = 16;

// sums[j] += matrix[j] . vectors for j < n, of kSlab rows at once; matrix: [n][stride].
template <int n>
MOEQ_NOINLINE void add_products(const float* matrix, int64_t stride, const float* vectors,
                                int64_t count, float* sums) {
  __m256 total[n][2];
  repeat<n>([&](auto j) __attribute__((always_inline)) {
    total[j][0] = _mm256_loadu_ps(sums + j * kSlab);
    total[j][1] = _mm256_loadu_ps(sums + j * kSlab + 8);
  });
  for (int64_t i = 0; i < count; ++i) {
    const __m256 first = _mm256_loadu_ps(vectors + i * kSlab);
    const __m256 second = _mm256_loadu_ps(vectors + i * kSlab + 8);
    repeat<n>([&](auto j) __attribute__((always_inline)) {
      const __m256 weight = _mm256_broadcast_ss(matrix + j * stride + i);
      total[j][0] = _mm256_fmadd_ps(weight, first, total[j][0]);
      total[j][1] = _mm256_fmadd_ps(weight, second, total[j][1]);
    });
  }
  repeat<n>([&](auto j) __attribute__((always_inline)) {
    _mm256_storeu_ps(sums + j * kSlab, total[j][0]);
    _mm256_storeu_ps(sums + j * kSlab + 8, total[j][1]);
  });
}

// sums[j] += matrix[j] . vectors for j < columns.
inline void add_products(int64_t columns, const float* matrix, int64_t stride, const float* vectors,
                         int64_t count, float* sums) {
  constexpr int kAtOnce = 6;  // sums of 2 vectors each in 12 of 16 registers
  int64_t j = 0;
  for (; j + kAtOnce <= columns; j += kAtOnce)
    add_products<kAtOnce>(matrix + j * stride, stride, vectors, count, sums + j * kSlab);
  for (; j < columns; ++j)
    add_products<1>(matrix + j * stride, stride, vectors, count, sums + j * kSlab);
}

// Fit a group's grid to its codes in each row while all others stay, where what the format can
// store lowers the objective; tell whether any row's grid changed. `total` is the sum of the
// group's Hessian; codes, gradient, work: [size][kSlab]; work gets the changes of the weights.
inline bool fit_grid(const Storable& format, int64_t size, const float* hessian, int64_t stride,
                     float total, const float* codes, const float* gradient, float* scale,
                     float* zero, float* work) {
  using Sums = std::array<float, kSlab>;
  std::fill_n(work, size * kSlab, 0.0f);
  add_products(size, hessian, stride, codes, size, work);
  // Quantized weights are s * code + l: the objective is a quadratic form in changes of s and l.
  Sums a{}, b{}, p{}, q{}, by{}, shift{};
  for (int64_t i = 0; i < size; ++i)
    for (int row = 0; row < kSlab; ++row) {
      const float code = codes[i * kSlab + row], slope = gradient[i * kSlab + row];
      a[row] += work[i * kSlab + row] * code;
      b[row] += work[i * kSlab + row];
      p[row] -= slope * code;
      q[row] -= slope;
    }
  bool any = false;
  for (int row = 0; row < kSlab; ++row) {
    const float determinant = a[row] * total - b[row] * b[row];
    if (!(determinant > 1e-6f * a[row] * total)) continue;
    const float wanted = scale[row] + (p[row] * total - q[row] * b[row]) / determinant;
    if (!(wanted > 0)) continue;
    const float low = (q[row] * a[row] - p[row] * b[row]) / determinant - zero[row] * scale[row];
    const float new_scale = format.scale(wanted), new_zero = format.zero(low, new_scale);
    const float more = new_scale - scale[row];
    const float up = zero[row] * scale[row] - new_zero * new_scale;
    const float gain =
        more * (a[row] * more + 2 * (b[row] * up - p[row])) + up * (total * up - 2 * q[row]);
    if (!(gain < 0)) continue;
    any = true;
    by[row] = more;
    shift[row] = up;
    scale[row] = new_scale;
    zero[row] = new_zero;
  }
  if (any)
    for (int64_t i = 0; i < size; ++i)
      for (int row = 0; row < kSlab; ++row)
        work[i * kSlab + row] = codes[i * kSlab + row] * by[row] + shift[row];
  return any;
}

// Improve the grids and codes of a block of columns in turns, `sweeps` times, while all other
// columns stay. hessian: [columns][columns]; curvature: its diagonal; codes, gradient:
// [columns][rows], the gradient being the differences times the Hessian; scale, zero:
// [groups][rows]. The gradient ends undefined.
inline void refine(int64_t columns, int64_t rows, int64_t group_size, const Storable& format,
                   int64_t sweeps, const float* hessian, const float* curvature, float* codes,
                   float* gradient, float* scale, float* zero) {
  const int64_t groups = (columns + group_size - 1) / group_size;
  const int64_t stride = columns + 16;  // else rows of 2^n columns would share few cache sets
  const auto size_of = [&](int64_t group) {
    return std::min(group_size, columns - group * group_size);
  };
  std::vector<float> totals(groups);
  for (int64_t group = 0; group < groups; ++group) {
    double total = 0;
    const float* part = hessian + group * group_size * (columns + 1);
    for (int64_t i = 0; i < size_of(group); ++i)
      for (int64_t j = 0; j < size_of(group); ++j) total += part[i * columns + j];
    totals[group] = static_cast<float>(total);
  }
  const Columns block{columns, rows, nullptr, codes, format.largest};
  const int64_t floats = 3 * stride + 2 * columns + 2 * groups + group_size;
  for_slabs<kSlab>(rows, floats, [&](int64_t first, int count, float* memory) {
    float* code = memory;  // [columns][kSlab], as the next ones
    float* slope = code + columns * kSlab;
    float* steps = slope + columns * kSlab;   // [groups][kSlab]
    float* origins = steps + groups * kSlab;  // [groups][kSlab]
    float* change = origins + groups * kSlab;
    float* code_rows = change + group_size * kSlab;  // [kSlab][stride], as the next ones
    float* slope_rows = code_rows + stride * kSlab;
    float* step_rows = slope_rows + stride * kSlab;
    const auto load = [&](const float* from, int64_t number, float* to, float missing) {
      for (int64_t i = 0; i < number; ++i) {
        std::copy_n(from + i * rows + first, count, to + i * kSlab);
        std::fill(to + i * kSlab + count, to + (i + 1) * kSlab, missing);
      }
    };
    const auto store = [&](const float* from, int64_t number, float* to) {
      for (int64_t i = 0; i < number; ++i)
        std::copy_n(from + i * kSlab, count, to + i * rows + first);
    };
    load(codes, columns, code, 0.0f);
    load(gradient, columns, slope, 0.0f);
    load(scale, groups, steps, 1.0f);
    load(zero, groups, origins, 0.0f);
    for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t begin = group * group_size, size = size_of(group);
        if (fit_grid(format, size, hessian + begin * (columns + 1), columns, totals[group],
                     code + begin * kSlab, slope + begin * kSlab, steps + group * kSlab,
                     origins + group * kSlab, change))
          add_products(columns, hessian + begin, columns, change, size, slope);
      }
      for (int64_t i = 0; i < columns; ++i)
        for (int row = 0; row < kSlab; ++row) {
          code_rows[row * stride + i] = code[i * kSlab + row];
          slope_rows[row * stride + i] = slope[i * kSlab + row];
          step_rows[row * stride + i] = steps[i / group_size * kSlab + row];
        }
      for (int row = 0; row < count; ++row)
        descend_row(columns, block, hessian, curvature, code_rows + row * stride,
                    slope_rows + row * stride, step_rows + row * stride);
      for (int64_t i = 0; i < columns; ++i)
        for (int row = 0; row < kSlab; ++row) {
          code[i * kSlab + row] = code_rows[row * stride + i];
          slope[i * kSlab + row] = slope_rows[row * stride + i];
        }
    }
    store(code, columns, codes);
    store(steps, groups, scale);
    store(origins, groups, zero);
  });
}

}  // namespace moeq

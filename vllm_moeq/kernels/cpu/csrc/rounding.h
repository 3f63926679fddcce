// The column loops of moeq's GPTQ, see offline/moeq/rounding/columns.py. Matrices are transposed,
// [columns][rows]: rows have nothing to do with each other, so a slab of them stays in a core's
// cache for all columns. What a row gets does not depend on its slab.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace moeq {

// A block of columns of a transposed matrix, and the grids of its codes.
struct Columns {
  int64_t columns, rows;
  const float* scale;  // [columns][rows]
  float* codes;        // [columns][rows]
  float largest;       // code

  float nearest(float value) const {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
    return std::min(std::max(value, 0.0f), largest) + magic - magic;
  }
};

// Call work(first row, rows, memory of `floats` floats for each row) for slabs of rows.
template <int kRows, typename Work>
void for_slabs(int64_t rows, int64_t floats, Work work) {
#pragma omp parallel
  {
    std::vector<float> memory(floats * kRows);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += kRows)
      work(first, static_cast<int>(std::min<int64_t>(kRows, rows - first)), memory.data());
  }
}

// Choose codes column by column: each makes up for the errors of the columns before it.
// wanted, sums, zero, difference: [columns][rows]; factor: [columns][columns], upper.
inline void round_columns(const Columns& block, const float* factor, const float* wanted,
                          const float* sums, const float* zero, float* difference) {
  using Vector = float __attribute__((vector_size(32)));
  constexpr int kVectors = 8, kRows = 8 * kVectors;  // as many sums as hide their latency
  for_slabs<kRows>(block.rows, block.columns, [&](int64_t first, int rows, float* errors) {
    float sum[kRows] = {}, target[kRows] = {}, step[kRows], origin[kRows] = {}, code[kRows];
    std::fill_n(step, kRows, 1.0f);  // also of the rows that a last slab lacks
    for (int64_t column = 0; column < block.columns; ++column) {
      const int64_t place = column * block.rows + first;
      std::copy_n(sums + place, rows, sum);
      std::copy_n(wanted + place, rows, target);
      std::copy_n(block.scale + place, rows, step);
      std::copy_n(zero + place, rows, origin);
      Vector total[kVectors];
      std::memcpy(total, sum, sizeof total);
      for (int64_t i = 0; i < column; ++i) {
        const float weight = factor[i * block.columns + column];
        for (int v = 0; v < kVectors; ++v) {
          Vector error;
          std::memcpy(&error, errors + i * kRows + 8 * v, sizeof error);
          total[v] += weight * error;
        }
      }
      std::memcpy(sum, total, sizeof total);
      const float inverse = 1.0f / factor[column * block.columns + column];
      float* error = errors + column * kRows;
      for (int row = 0; row < kRows; ++row) {
        code[row] = block.nearest((target[row] - sum[row] * inverse) / step[row] + origin[row]);
        error[row] = (code[row] - origin[row]) * step[row] - target[row];
      }
      std::copy_n(code, rows, block.codes + place);
      std::copy_n(error, rows, difference + place);
    }
  });
}

// Coordinate descent on the codes of one row. Few of them change, and only these cost a row of the
// Hessian.
inline void descend_row(int64_t columns, const Columns& block, const float* hessian,
                        const float* curvature, float* code, float* gradient, const float* step) {
  constexpr int64_t kAtOnce = 16;  // columns that are looked at before any of them is changed
  const auto change = [&](int64_t i) {
    return block.nearest(code[i] - gradient[i] / (curvature[i] * step[i])) - code[i];
  };
  for (int64_t first = 0; first < columns; first += kAtOnce) {
    const int64_t last = std::min(first + kAtOnce, columns);
    int any = 0;
    for (int64_t i = first; i < last; ++i) any |= change(i) != 0;
    if (!any) continue;
    for (int64_t i = first; i < last; ++i) {
      const float by = change(i);
      if (by == 0) continue;
      code[i] += by;
      const float weight = by * step[i];
      const float* row = hessian + i * columns;
      for (int64_t j = 0; j < columns; ++j) gradient[j] += weight * row[j];
    }
  }
}

// Coordinate descent on the codes of a block. hessian: [columns][columns]; curvature: its diagonal;
// gradient: [columns][rows], the differences times the Hessian, kept up to date.
inline void descend(const Columns& block, const float* hessian, const float* curvature,
                    float* gradient) {
  constexpr int kRows = 16;  // of each column one cache line
  const int64_t columns = block.columns;
  const int64_t stride = columns + 16;  // else rows of 2^n columns would share few cache sets
  for_slabs<kRows>(block.rows, 3 * stride, [&](int64_t first, int rows, float* code) {
    float* slope = code + kRows * stride;
    float* step = slope + kRows * stride;
    const auto each = [&](auto work) {
      for (int64_t column = 0; column < columns; ++column)
        for (int row = 0; row < rows; ++row)
          work(column * block.rows + first + row, row * stride + column);
    };
    each([&](int64_t there, int64_t here) {
      code[here] = block.codes[there];
      slope[here] = gradient[there];
      step[here] = block.scale[there];
    });
    for (int row = 0; row < rows; ++row)
      descend_row(columns, block, hessian, curvature, code + row * stride, slope + row * stride,
                  step + row * stride);
    each([&](int64_t there, int64_t here) {
      block.codes[there] = code[here];
      gradient[there] = slope[here];
    });
  });
}

}  // namespace moeq

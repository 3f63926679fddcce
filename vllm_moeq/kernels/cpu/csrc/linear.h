// A dense linear layer: an expert that all tokens go to, without an activation.
//
// Tasks are (tile of rows, some tokens), so every output has one writer: as with the experts,
// results depend neither on the number of threads nor on the other tokens of a batch.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "matrix.h"
#include "moe.h"

namespace moeq {

template <class Kernel>
class LinearPass {
 public:
  LinearPass(const LinearCall& call, const Matrix& matrix, Scratch& scratch, int64_t first_token,
             int tokens)
      : call_(call),
        matrix_(matrix),
        dtype_(static_cast<DType>(call.dtype)),
        first_token_(first_token),
        token_count_(tokens),
        x_(scratch.tokens<Kernel>(tokens, static_cast<int>(call.columns), call.group_size)),
        sums_(scratch.take<float>(static_cast<size_t>(kTokensPerTile) * kTileRows *
                                  omp_get_max_threads())),
        all_(tokens) {
    std::iota(all_.begin(), all_.end(), 0);
  }

  void run() {
    const int chunks = (token_count_ + kTokensPerTile - 1) / kTokensPerTile;
#pragma omp parallel
    {
      [[maybe_unused]] const typename Kernel::Thread state(call_.group_size);
      float* sums = sums_ + static_cast<size_t>(omp_get_thread_num()) * kTokensPerTile * kTileRows;
#pragma omp for schedule(static)
      for (int i = 0; i < token_count_ * matrix_.groups; ++i)
        quantize(i / matrix_.groups, i % matrix_.groups);
      // Chunks are the inner loop: a tile stays in the cache for all tokens.
#pragma omp for schedule(dynamic, 1)
      for (int task = 0; task < tiles(static_cast<int>(call_.rows)) * chunks; ++task)
        multiply_tokens(task / chunks, task % chunks * kTokensPerTile, sums);
    }
  }

 private:
  void quantize(int token, int group) {
    const size_t offset =
        (first_token_ + token) * call_.columns + static_cast<size_t>(group) * call_.group_size;
    quantize_input<Kernel>(call_.x, dtype_, offset, x_, group, token);
  }

  // One tile times the tokens from `first` on.
  void multiply_tokens(int tile, int first, float* sums) const {
    const int count = std::min(kTokensPerTile, token_count_ - first);
    multiply<Kernel>(matrix_, tile, x_, all_.data() + first, count, sums);
    const int64_t first_row = static_cast<int64_t>(tile) * kTileRows;
    const int rows = static_cast<int>(std::min<int64_t>(kTileRows, call_.rows - first_row));
    for (int i = 0; i < count; ++i) {
      float* values = sums + static_cast<size_t>(i) * kTileRows;
      alignas(64) char stored[kTileRows * sizeof(float)];  // a last tile may end within a vector
      if (call_.bias)
        for (int row = 0; row < rows; ++row) values[row] += call_.bias[first_row + row];
      store_floats(values, dtype_, kTileRows, stored);
      const size_t offset = (first_token_ + first + i) * call_.rows + first_row;
      std::memcpy(static_cast<char*>(call_.out) + offset * element_bytes(dtype_), stored,
                  rows * element_bytes(dtype_));
    }
  }

  const LinearCall& call_;
  const Matrix& matrix_;
  const DType dtype_;
  const int64_t first_token_;
  const int token_count_;
  Tokens<typename Kernel::Code> x_;
  float* const sums_;
  std::vector<int> all_;  // tokens
};

template <class Kernel>
Status run_linear(const LinearCall& call) {
  thread_local Scratch scratch;
  if (!knows_width(call.bits) || !knows_sizes(call.group_size, call.rows, call.columns))
    return kBadSizes;
  const Matrix matrix = Matrix::at(call.tiles, static_cast<int>(call.bits), call.group_size,
                                   static_cast<int>(call.columns));
  const int64_t bytes =
      static_cast<int64_t>(matrix.tile_bytes) * tiles(static_cast<int>(call.rows));
  if (bytes != call.tiles_bytes) return kBadSizes;
  for (int64_t first = 0; first < call.tokens; first += kTokensPerPass) {
    const int tokens = static_cast<int>(std::min(kTokensPerPass, call.tokens - first));
    scratch.reset();
    LinearPass<Kernel>(call, matrix, scratch, first, tokens).run();
  }
  return kOk;
}

}  // namespace moeq

// One tile of weights times some tokens: what the kernels of all instruction sets have in common.
//
// A kernel is a struct with
//   Code              type of an activation
//   kPlanes           planes of codes that a token has in Tokens
//   kConsecutiveFrom  so many tokens, or more, have to be consecutive ones
//   Thread            made from the group size; alive in a thread while it calls multiply_group
//   quantize          writes one group of a token
//   multiply_group    adds one group times some tokens to y
#pragma once
#include <algorithm>
#include <limits>

#include "layout.h"
#include "tokens.h"
#include "unroll.h"

namespace moeq {

// kConsecutiveFrom and Thread of a kernel without such needs.
constexpr int kAnyTokens = std::numeric_limits<int>::max();
struct NoThreadState {
  explicit NoThreadState(int) {}
};

// y [count][64] = the tile's 64 rows times the tokens given.
template <class Kernel, int bits>
void multiply_tile(const uint8_t* tile, int groups, const Tokens<typename Kernel::Code>& tokens,
                   const int* which, int count, float* y) {
  std::fill_n(y, static_cast<size_t>(count) * kTileRows, 0.0f);
  const size_t stride = group_bytes(bits, tokens.group_size);
  for (int group = 0; group < groups; ++group)
    Kernel::template multiply_group<bits>(tile + group * stride, tokens, group, which, count, y);
}

}  // namespace moeq

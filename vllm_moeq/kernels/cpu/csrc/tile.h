// One tile of weights times some tokens: what the kernels of all instruction sets have in common.
//
// A kernel is a struct with
//   Code            type of an activation
//   kPlanes         planes of codes that a token has in Tokens
//   quantize        writes one group of a token
//   multiply_group  adds one group times some tokens to y
#pragma once
#include <algorithm>

#include "layout.h"
#include "tokens.h"
#include "unroll.h"

namespace moeq {

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

// One tile of weights times some token rows: what the kernels of all instruction sets have in
// common.
//
// A kernel is a struct with
//   Code          type of an activation
//   kPlanes       rows that a token has in Tokens
//   quantize      writes the rows of one group of a token
//   kDirectTokens more token rows than these are worth unpacking the weights of a group first
//   Unpacked      type of an unpacked weight, and kUnpacked, how many of them a weight takes
//   unpack        returns the unpacked weights of a group, in the buffer given or elsewhere
//   group         adds one group times a few token rows to y, with weights from the packed payload
//                 if `direct`, else from what unpack returned
#pragma once
#include <algorithm>

#include "layout.h"
#include "tokens.h"
#include "unroll.h"

namespace moeq {

constexpr int kMicroTokens = 6;    // token rows for which the registers can hold sums
constexpr int kSmallestPiece = 3;  // when more than 2 are cut into about equal pieces of at most 6

// y [count][64] = the tile's 64 rows times the token rows given.
template <class Kernel, int bits>
void multiply_tile(const uint8_t* tile, int groups, const Tokens<typename Kernel::Code>& tokens,
                   const int* rows, int count, float* y) {
  constexpr int direct_tokens = Kernel::template kDirectTokens<bits>;
  static_assert(direct_tokens + 1 >= kSmallestPiece);
  std::fill_n(y, static_cast<size_t>(count) * kTileRows, 0.0f);
  const size_t stride = group_bytes(bits, tokens.group_size);
  if (count <= direct_tokens) {
    with_constant<1, direct_tokens>(
        count, MOEQ_LAMBDA {
          for (int group = 0; group < groups; ++group)
            Kernel::template group<bits, decltype(index)::value, true>(
                tile + group * stride, nullptr, tokens, group, rows, y);
        });
    return;
  }
  alignas(64)
      typename Kernel::Unpacked buffer[kTileRows * kMaxGroup * Kernel::template kUnpacked<bits>];
  for (int group = 0; group < groups; ++group, tile += stride) {
    const auto* unpacked =
        Kernel::template unpack<bits>(tile + kHeaderBytes, tokens.group_size, buffer);
    pieces(count, kMicroTokens, [&](int first, int size) {
      with_constant<kSmallestPiece, kMicroTokens>(
          size, MOEQ_LAMBDA {
            Kernel::template group<bits, decltype(index)::value, false>(
                tile, unpacked, tokens, group, rows + first, y + first * kTileRows);
          });
    });
  }
}

}  // namespace moeq

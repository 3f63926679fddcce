// Tile kernel for AMX: many tokens at once; a few go as with AVX-512, whose layout this is.
//
// The codes of a group, unpacked, are what AMX wants of a second factor: 4 consecutive k of 16
// rows, for up to 64 k. The first factor is 16 tokens. Sums are the same integers as with AVX-512,
// and results the same bits.
#pragma once
#include "amx_tiles.h"
#include "avx512.h"

namespace moeq {

namespace amx {

using namespace amx_tiles;

constexpr int kFewest = 4;  // tokens that are worth unpacking weights first
constexpr int kTileInts = kTokens * kBlockRows;

// Codes [G / 4][4 blocks][64].
template <int bits>
MOEQ_INLINE void unpack(const uint8_t* payload, int group_size, uint8_t* out) {
  for (int step = 0; step < group_size / kStep<bits>; ++step)
    for (int block = 0; block < kBlocks; ++block, payload += kStepBytes<bits>) {
      const avx512::Words<bits> words(payload);
      repeat<kFields<bits>>([&](auto f) __attribute__((always_inline)) {
        avx512::store(out + ((step * kFields<bits> + f) * kBlocks + block) * 64,
                      words.template codes<f>());
      });
    }
}

// All planes of 16 tokens times kBlocks / planes blocks, into four tiles of sums: [block][plane].
// Each is taken over as soon as what it had before is stored: stored all in the end, products of
// tiles take half as long again.
template <int planes>
MOEQ_INLINE void multiply_tiles(const uint8_t* codes, const int8_t* x, int group_size,
                                int32_t* before) {
  for (int k = 0; k < group_size; k += kDepth) {
    repeat<planes>([&](auto plane) __attribute__((always_inline)) {
      load<4 + plane>(x + plane * group_size + k, planes * group_size);
    });
    repeat<kBlocks / planes>([&](auto block) __attribute__((always_inline)) {
      load<6 + block % 2>(codes + 64 * (k + block), 64 * kBlocks);
      repeat<planes>([&](auto plane) __attribute__((always_inline)) {
        constexpr int sums = block * planes + plane;
        if (k == 0) {
          store<sums>(before + sums * kTileInts);
          zero<sums>();
        }
        add_dot<sums, 4 + plane, 6 + block % 2>();
      });
    });
  }
}

// One group times `count` consecutive tokens, with unpacked codes: products of tiles, each of 16
// tokens and 4 / planes blocks. While one is made, `sums` gets those of the one before.
template <int bits, int planes>
MOEQ_NOINLINE void multiply_many(const uint8_t* header, const uint8_t* codes,
                                 const Tokens<int8_t>& x, int group, int first_token, int count,
                                 float* y) {
  using namespace avx512;
  constexpr int blocks = kBlocks / planes;
  const float* scales = x.scale + x.place(group, first_token);
  const float* token_sums = x.sum + x.place(group, first_token);
  alignas(64) int32_t sums[4 * kTileInts];
  const auto first_block = [](int product) { return product % planes * blocks; };
  const auto first_of = [](int product) { return product / planes * kTokens; };
  const auto add = [&](int product) {
    const int first = first_of(product);
    for (int block = 0; block < blocks; ++block) {
      const int row = (first_block(product) + block) * kBlockRows;
      const RowScales of_rows = RowScales::load<bits>(header, row);
      const int32_t* of_block = sums + block * planes * kTileInts;
      for (int t = 0; t < std::min(kTokens, count - first); ++t) {
        Ints sum = load_ints(of_block + t * kBlockRows);
        if constexpr (planes == 2)
          sum = high_and_low(sum, load_ints(of_block + kTileInts + t * kBlockRows));
        of_rows.add(y + (first + t) * kTileRows + row, sum, all(scales[first + t]),
                    all(token_sums[first + t]));
      }
    }
  };
  const int products = (count + kTokens - 1) / kTokens * planes;
  for (int product = 0; product < products; ++product) {
    multiply_tiles<planes>(codes + 64 * first_block(product),
                           x.of(group, first_token + first_of(product)), x.group_size, sums);
    if (product) add(product - 1);
  }
  repeat<4>(MOEQ_LAMBDA { store<index>(sums + index * kTileInts); });
  add(products - 1);
}

}  // namespace amx

template <int planes>
struct AmxKernel : Avx512Kernel<planes> {
  using Thread = amx::Configured;
  static constexpr int kConsecutiveFrom = amx::kFewest;

  template <int bits>
  static void multiply_group(const uint8_t* header, const Tokens<int8_t>& x, int group,
                             const int* which, int count, float* y) {
    const int rest = count % amx::kTokens;
    const int many = rest < amx::kFewest ? count - rest : count;
    if (many) {
      alignas(64) uint8_t unpacked[kTileRows * kMaxGroup];
      const uint8_t* codes = header + kHeaderBytes;
      if constexpr (bits != 8) {  // those of 8 bits lie as they would be unpacked
        amx::unpack<bits>(codes, x.group_size, unpacked);
        codes = unpacked;
      }
      amx::multiply_many<bits, planes>(header, codes, x, group, which[0], many, y);
    }
    avx512::multiply_few<bits, planes, amx::kFewest - 1>(header, x, group, which + many,
                                                         count - many, y + many * kTileRows);
  }
};

using Amx = AmxKernel<2>;
using AmxInt8 = AmxKernel<1>;

}  // namespace moeq

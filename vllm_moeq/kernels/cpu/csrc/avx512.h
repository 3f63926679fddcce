// Tile kernel for AVX-512 with VNNI.
//
// vpdpbusd multiplies 4 codes of each of 16 rows with 4 8-bit activations and adds them up in 32
// bits, so no sum over lanes is ever needed. For 16-bit activations a token has two rows, its high
// and its low bytes: to the kernel they are two tokens whose results are added in the end.
#pragma once
#include "simd512.h"
#include "tile.h"

namespace moeq {

namespace avx512 {

using namespace simd512;

// Bytes to fetch ahead: narrow codes keep the core busier per byte.
template <int bits>
constexpr int kAhead = bits <= 3 ? 8192 : 4096;
template <int bits>
MOEQ_INLINE void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead<bits>, _MM_HINT_T0);
}

// All fields of one step and block as bytes: 4 consecutive k of 16 rows each.
template <int bits>
MOEQ_INLINE void fields(const uint8_t* p, Bytes (&out)[kFields<bits>]) {
  Bytes words[bits == 3 ? 4 : 1];
  for (int i = 0; i < kWords<bits>; ++i) words[i] = load(p + 64 * i);
  if constexpr (bits == 3) {
    words[3] = select(0xc0, words[0], shift<2>(words[1]));
    words[3] = select(0xf0, words[3], shift<4>(words[2]));
  }
  repeat<kFields<bits>>(MOEQ_LAMBDA {
    constexpr Field place = field<bits>(decltype(index)::value);
    const Bytes shifted = shift<place.shift>(words[place.word]);
    out[index] = bits == 8 ? shifted : mask(shifted, (1 << bits) - 1);
  });
}

// Straight from the packed weights of one group.
template <int bits, int tokens>
MOEQ_INLINE void dot_direct(const uint8_t* payload, const int8_t* const* x, int group_size,
                            Ints (&sums)[tokens][kBlocks]) {
  for (int step = 0; step < group_size / kStep<bits>; ++step)
    repeat<kBlocks>(MOEQ_LAMBDA {
      constexpr int block = decltype(index)::value;
      for (int i = 0; i < kWords<bits>; ++i) prefetch<bits>(payload + 64 * i);
      Bytes codes[kFields<bits>];
      fields<bits>(payload, codes);
      repeat<kFields<bits>>([&](auto f) __attribute__((always_inline)) {
        repeat<tokens>([&](auto t) __attribute__((always_inline)) {
          add_dot(sums[t][block], codes[f], x[t] + step * kStep<bits> + 4 * f);
        });
      });
      payload += kStepBytes<bits>;
    });
}

// From bytes [G / 4][4 blocks][64].
template <int tokens>
MOEQ_INLINE void dot_unpacked(const uint8_t* codes, const int8_t* const* x, int group_size,
                              Ints (&sums)[tokens][kBlocks]) {
  for (int k = 0; k < group_size; k += 4, codes += 64 * kBlocks) {
    Bytes block[kBlocks];
    repeat<kBlocks>(MOEQ_LAMBDA { block[index] = load(codes + 64 * index); });
    repeat<tokens>([&](auto t) __attribute__((always_inline)) {
      const Ints xs = broadcast(x[t] + k);
      repeat<kBlocks>(MOEQ_LAMBDA { add_dot(sums[t][index], block[index], xs); });
    });
  }
}

template <int bits>
MOEQ_INLINE void unpack(const uint8_t* payload, int group_size, uint8_t* out) {
  for (int step = 0; step < group_size / kStep<bits>; ++step)
    for (int block = 0; block < kBlocks; ++block, payload += kStepBytes<bits>) {
      for (int i = 0; i < kWords<bits>; ++i) prefetch<bits>(payload + 64 * i);
      Bytes codes[kFields<bits>];
      fields<bits>(payload, codes);
      for (int f = 0; f < kFields<bits>; ++f)
        store(out + ((step * kFields<bits> + f) * kBlocks + block) * 64, codes[f]);
    }
}

}  // namespace avx512

struct Avx512Int8 {
  using Code = int8_t;
  using Unpacked = uint8_t;
  static constexpr int kPlanes = 1;
  template <int bits>
  static constexpr int kDirectTokens = 6;
  template <int bits>
  static constexpr int kUnpacked = 1;

  static void quantize(const float* x, const Tokens<Code>& tokens, int group, int row) {
    quantize_int8(x, tokens, group, row);
  }

  template <int bits>
  static const Unpacked* unpack(const uint8_t* payload, int group_size, Unpacked* buffer) {
    for (int i = -kHeaderBytes; i < 0; i += 64) avx512::prefetch<bits>(payload + i);
    if constexpr (bits == 8) return payload;  // already what unpack makes
    avx512::unpack<bits>(payload, group_size, buffer);
    return buffer;
  }

  // Sums of 6 token rows times 4 blocks take 24 of 32 registers.
  template <int bits, int tokens, bool direct>
  MOEQ_NOINLINE void group(const uint8_t* header, const Unpacked* unpacked, const Tokens<Code>& x,
                           int group, const int* rows, float* y) {
    using namespace avx512;
    const Code* codes[tokens];
    for (int t = 0; t < tokens; ++t) codes[t] = x.row(group, rows[t]);
    if constexpr (direct)
      for (int i = 0; i < kHeaderBytes; i += 64) prefetch<bits>(header + i);
    Ints sums[tokens][kBlocks];
    repeat<tokens * kBlocks>(MOEQ_LAMBDA { sums[index / kBlocks][index % kBlocks] = zero(); });
    if constexpr (direct)
      dot_direct<bits, tokens>(header + kHeaderBytes, codes, x.group_size, sums);
    else
      dot_unpacked<tokens>(unpacked, codes, x.group_size, sums);
    // y += scale * (token scale * sums - zero * token sum)
    repeat<kBlocks>([&](auto block) __attribute__((always_inline)) {
      const int row = block * kBlockRows;
      const Floats scale = half_to_float(header + 2 * row);
      const Floats zeros =
          multiply(bytes_to_float(header + kZeroOffset + row), all(-kZeroUnit<bits>));
      repeat<tokens>([&](auto t) __attribute__((always_inline)) {
        const size_t place = x.place(group, rows[t]);
        float* out = y + t * kTileRows + row;
        const Floats scaled = multiply(to_float(sums[t][block]), all(x.scale[place]));
        const Floats centred = multiply_add(zeros, all(x.sum[place]), scaled);
        store_floats(out, multiply_add(scale, centred, load_floats(out)));
      });
    });
  }
};

struct Avx512 : Avx512Int8 {
  static constexpr int kPlanes = 2;

  static void quantize(const float* x, const Tokens<Code>& tokens, int group, int row) {
    int32_t codes[kMaxGroup];
    // 127 * 256 + 127: the largest code whose high byte, rounded, is still 127.
    const float scale = quantize_group(x, tokens.group_size, 32639.0f, codes);
    Code *high = tokens.row(group, row), *low = tokens.row(group, row + 1);
    int32_t high_sum = 0, low_sum = 0;
    for (int i = 0; i < tokens.group_size; ++i) {
      const int32_t upper = (codes[i] + 128) >> 8, lower = codes[i] - 256 * upper;
      high_sum += upper;
      low_sum += lower;
      high[i] = static_cast<Code>(upper);
      low[i] = static_cast<Code>(lower);
    }
    const size_t place = tokens.place(group, row);
    tokens.scale[place] = 256 * scale;
    tokens.sum[place] = 256 * scale * static_cast<float>(high_sum);
    tokens.scale[place + 1] = scale;
    tokens.sum[place + 1] = scale * static_cast<float>(low_sum);
  }
};

}  // namespace moeq

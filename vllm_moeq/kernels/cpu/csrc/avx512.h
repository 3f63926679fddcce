// Tile kernel for AVX-512 with VNNI.
//
// vpdpbusd multiplies 4 codes of each of 16 rows with 4 8-bit activations and adds them up in 32
// bits, so no sum over lanes is ever needed. 16-bit activations are two planes, their high and
// their low bytes, whose sums are put together at the end of a group.
#pragma once
#include "simd512.h"
#include "tile.h"

namespace moeq {

namespace avx512 {

using namespace simd512;

// Bytes to fetch ahead, and into which cache: the best of what was tried, by up to a fifth.
template <int bits>
constexpr size_t kAhead = bits <= 3   ? 8192
                          : bits == 4 ? 4096
                                      : 2048;
template <int bits>
MOEQ_INLINE void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead<bits>,
               bits == 4 ? _MM_HINT_T0 : _MM_HINT_T1);
}

// The words of one step and block; at 3 bits the spare bits make a fourth.
template <int bits>
struct Words {
  Bytes word[bits == 3 ? 4 : 1];

  explicit __attribute__((always_inline)) Words(const uint8_t* p) {
    for (int i = 0; i < kWords<bits>; ++i) {
      prefetch<bits>(p + 64 * i);
      word[i] = load(p + 64 * i);
    }
    if constexpr (bits == 3) {
      word[3] = select(0xc0, word[0], shift<2>(word[1]));
      word[3] = select(0xf0, word[3], shift<4>(word[2]));
    }
  }

  // Field f as bytes: 4 consecutive k of 16 rows.
  template <int f>
  __attribute__((always_inline)) Bytes codes() const {
    constexpr Field place = field<bits>(f);
    const Bytes shifted = shift<place.shift>(word[place.word]);
    return bits == 8 ? shifted : mask(shifted, (1 << bits) - 1);
  }
};

// One group times some planes of activations. With narrow codes and one or two planes, loads would
// be the limit: all blocks go together then, which take each activation once. More planes leave no
// registers for that, and wide codes wait for memory.
template <int bits, int planes>
MOEQ_INLINE void dot(const uint8_t* payload, const int8_t* const* x, int group_size,
                     Ints (&sums)[planes][kBlocks]) {
  for (int step = 0; step < group_size / kStep<bits>; ++step, payload += kBlocks * kStepBytes<bits>)
    if constexpr (planes <= 2 && bits <= 3) {
      const Words<bits> blocks[kBlocks] = {
          Words<bits>(payload), Words<bits>(payload + kStepBytes<bits>),
          Words<bits>(payload + 2 * kStepBytes<bits>), Words<bits>(payload + 3 * kStepBytes<bits>)};
      repeat<kFields<bits>>([&](auto f) __attribute__((always_inline)) {
        Bytes codes[kBlocks];
        repeat<kBlocks>(MOEQ_LAMBDA { codes[index] = blocks[index].template codes<f>(); });
        repeat<planes>([&](auto t) __attribute__((always_inline)) {
          const Ints xs = broadcast(x[t] + step * kStep<bits> + 4 * f);
          repeat<kBlocks>(MOEQ_LAMBDA { add_dot(sums[t][index], codes[index], xs); });
        });
      });
    } else {
      repeat<kBlocks>([&](auto block) __attribute__((always_inline)) {
        const Words<bits> words(payload + block * kStepBytes<bits>);
        repeat<kFields<bits>>([&](auto f) __attribute__((always_inline)) {
          const Bytes codes = words.template codes<f>();
          repeat<planes>([&](auto t) __attribute__((always_inline)) {
            add_dot(sums[t][block], codes, x[t] + step * kStep<bits> + 4 * f);
          });
        });
      });
    }
}

// Two planes: 256 * high + low. The sums of a group are then exact in 32 bits at any width.
inline void quantize_int16(const float* x, const Tokens<int8_t>& tokens, int group, int token) {
  int32_t codes[kMaxGroup];
  // 127 * 256 + 127: the largest code whose high byte, rounded, is still 127.
  const float scale = quantize_group(x, tokens.group_size, 32639.0f, codes);
  int8_t* const high = tokens.of(group, token);
  int8_t* const low = high + tokens.group_size;
  int32_t sum = 0;
  for (int i = 0; i < tokens.group_size; ++i) {
    const int32_t upper = (codes[i] + 128) >> 8;
    sum += codes[i];
    high[i] = static_cast<int8_t>(upper);
    low[i] = static_cast<int8_t>(codes[i] - 256 * upper);
  }
  const size_t place = tokens.place(group, token);
  tokens.scale[place] = scale;
  tokens.sum[place] = scale * static_cast<float>(sum);
}

// What turns the integer sums of a block of rows into their shares of y.
struct RowScales {
  Floats scale, zeros;

  template <int bits>
  static __attribute__((always_inline)) RowScales load(const uint8_t* header, int row) {
    return {half_to_float(header + 2 * row),
            multiply(bytes_to_float(header + kZeroOffset + row), all(-kZeroUnit<bits>))};
  }
  // y += scale * (token scale * sums - zero * token sum)
  __attribute__((always_inline)) void add(float* y, Ints sums, Floats token_scale,
                                          Floats token_sum) const {
    const Floats scaled = multiply(to_float(sums), token_scale);
    const Floats centred = multiply_add(zeros, token_sum, scaled);
    store_floats(y, multiply_add(scale, centred, load_floats(y)));
  }
};

// One group times a few tokens.
template <int bits, int planes, int tokens>
MOEQ_NOINLINE void multiply_tokens(const uint8_t* header, const Tokens<int8_t>& x, int group,
                                   const int* which, float* y) {
  const int8_t* codes[tokens * planes];
  for (int t = 0; t < tokens; ++t)
    for (int plane = 0; plane < planes; ++plane)
      codes[t * planes + plane] = x.of(group, which[t]) + plane * x.group_size;
  for (int i = 0; i < kHeaderBytes; i += 64) prefetch<bits>(header + i);
  Ints sums[tokens * planes][kBlocks];
  repeat<tokens * planes * kBlocks>(
      MOEQ_LAMBDA { sums[index / kBlocks][index % kBlocks] = zero(); });
  dot<bits, tokens * planes>(header + kHeaderBytes, codes, x.group_size, sums);
  float scales[tokens], token_sums[tokens];
  for (int t = 0; t < tokens; ++t) {
    const size_t place = x.place(group, which[t]);
    scales[t] = x.scale[place];
    token_sums[t] = x.sum[place];
  }
  repeat<kBlocks>([&](auto block) __attribute__((always_inline)) {
    const int row = block * kBlockRows;
    const RowScales of_rows = RowScales::load<bits>(header, row);
    repeat<tokens>([&](auto t) __attribute__((always_inline)) {
      Ints sum = sums[t * planes][block];
      if constexpr (planes == 2) sum = high_and_low(sum, sums[t * planes + 1][block]);
      of_rows.add(y + t * kTileRows + row, sum, all(scales[t]), all(token_sums[t]));
    });
  });
}

// One group times any number of tokens, at most a few at a time. Codes are unpacked for every few
// tokens anew: dot products hide it.
template <int bits, int planes, int few>
void multiply_few(const uint8_t* header, const Tokens<int8_t>& x, int group, const int* which,
                  int count, float* y) {
  pieces<few>(count, [&](auto tokens, int first) __attribute__((always_inline)) {
    multiply_tokens<bits, planes, tokens>(header, x, group, which + first, y + first * kTileRows);
  });
}

}  // namespace avx512

// With one plane of 8-bit activations, or with two that make 16-bit ones.
template <int planes>
struct Avx512Kernel {
  using Code = int8_t;
  using Thread = NoThreadState;
  static constexpr int kPlanes = planes;
  static constexpr int kConsecutiveFrom = kAnyTokens;

  static void quantize(const float* x, const Tokens<Code>& tokens, int group, int token) {
    if constexpr (planes == 1)
      quantize_int8(x, tokens, group, token);
    else
      avx512::quantize_int16(x, tokens, group, token);
  }

  template <int bits>
  static void multiply_group(const uint8_t* header, const Tokens<Code>& x, int group,
                             const int* which, int count, float* y) {
    constexpr int few = 6 / planes;  // whose sums take 24 of 32 registers
    avx512::multiply_few<bits, planes, few>(header, x, group, which, count, y);
  }
};

using Avx512 = Avx512Kernel<2>;
using Avx512Int8 = Avx512Kernel<1>;

}  // namespace moeq

// Tile kernel for AVX2 without VNNI, with 16-bit activations.
//
// Codes are widened to 16 bits and multiplied with 16-bit activations by vpmaddwd, which sums pairs
// in 32 bits: no saturation at any width, unlike vpmaddubsw, and the same number of instructions as
// two 8-bit planes. A vector of 8 rows x 4 bytes has the codes of k = 0 and 2 of each four in its
// low bytes and those of k = 1 and 3 in its high bytes, so activations are stored as (0, 2, 1, 3).
#pragma once
#include <immintrin.h>

#include "tile.h"

namespace moeq {

namespace avx2 {

using Vector = __m256i;
constexpr int kHalfRows = 8;  // of a block: one vector of 32-bit sums

MOEQ_INLINE Vector load(const void* p) { return _mm256_loadu_si256(static_cast<const Vector*>(p)); }
MOEQ_INLINE Vector zero() { return _mm256_setzero_si256(); }
MOEQ_INLINE Vector broadcast(const void* x) {  // 2 16-bit or 4 8-bit activations for all rows
  int value;
  __builtin_memcpy(&value, x, 4);
  return _mm256_set1_epi32(value);
}
// Inline assembly keeps the two together: gcc 12 moves all products before all additions and runs
// out of registers.
MOEQ_INLINE void add_dot(Vector& sum, Vector codes, Vector x) {
  Vector product;
  asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(x), "x"(codes));
}
template <int count>
MOEQ_INLINE Vector shift(Vector v) {
  return count ? _mm256_srli_epi16(v, count) : v;
}

// Bytes to fetch ahead: with this much work per byte the hardware does not run far enough ahead by
// itself.
template <int bits>
constexpr size_t kAhead = 2048;
template <int bits>
MOEQ_INLINE void prefetch(const uint8_t* p) {
  for (int i = 0; i < kWords<bits>; ++i)
    _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead<bits> + 64 * i, _MM_HINT_T0);
}

// The words of one step for 8 rows; at 3 bits the spare bits make a fourth.
template <int bits>
struct Step {
  Vector word[bits == 3 ? 4 : 1];

  explicit __attribute__((always_inline)) Step(const uint8_t* p) {
    for (int i = 0; i < kWords<bits>; ++i) word[i] = load(p + 64 * i);
    if constexpr (bits == 3) {
      const Vector top2 = _mm256_set1_epi8(static_cast<char>(0xc0));
      const Vector mid2 = _mm256_set1_epi8(0x30), low2 = _mm256_set1_epi8(0x0c);
      word[3] = _mm256_or_si256(_mm256_and_si256(word[0], top2),
                                _mm256_or_si256(_mm256_and_si256(shift<2>(word[1]), mid2),
                                                _mm256_and_si256(shift<4>(word[2]), low2)));
    }
  }

  // Codes of field f in 16 bits: of k = 0 and 2 (odd = 0) or of k = 1 and 3 (odd = 1).
  template <int f, int odd>
  __attribute__((always_inline)) Vector codes() const {
    constexpr Field place = field<bits>(f);
    constexpr int offset = place.shift + 8 * odd;
    if constexpr (offset + bits == 16) return shift<offset>(word[place.word]);
    return _mm256_and_si256(shift<offset>(word[place.word]), _mm256_set1_epi16((1 << bits) - 1));
  }
};

// What turns integer sums of 8 rows into weights times activations.
struct RowScales {
  __m256 scale, zero;

  template <int bits>
  static __attribute__((always_inline)) RowScales load(const uint8_t* header, int row) {
    const __m128i scales = _mm_loadu_si128(reinterpret_cast<const __m128i*>(header + 2 * row));
    const __m128i zeros =
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(header + kZeroOffset + row));
    return {_mm256_cvtph_ps(scales), _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(zeros)),
                                                   _mm256_set1_ps(kZeroUnit<bits>))};
  }

  // y += scale * (token scale * sums - zero * token sum)
  __attribute__((always_inline)) void add(float* y, Vector sums, float token_scale,
                                          float token_sum) const {
    const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(token_scale));
    const __m256 centred = _mm256_fnmadd_ps(zero, _mm256_set1_ps(token_sum), scaled);
    _mm256_storeu_ps(y, _mm256_fmadd_ps(scale, centred, _mm256_loadu_ps(y)));
  }
};

// Add the integer sums of one block and group, sums(token, half) of 8 rows each, to y.
template <int bits, int tokens, class Code, class F>
MOEQ_INLINE void add_block(const uint8_t* header, int block, const Tokens<Code>& x, int group,
                           const int* which, float* y, F&& sums) {
  repeat<2>([&](auto half) __attribute__((always_inline)) {
    const int row = block * kBlockRows + half * kHalfRows;
    const RowScales scales = RowScales::load<bits>(header, row);
    repeat<tokens>([&](auto t) __attribute__((always_inline)) {
      const size_t place = x.place(group, which[t]);
      scales.add(y + t * kTileRows + row, sums(t, half), x.scale[place], x.sum[place]);
    });
  });
}

// One token, one block of 16 rows: fields are masked but not shifted, which leaves each product
// 2^position too large; sums are kept apart by position and shifted once at the end.
template <int bits>
MOEQ_INLINE void dot_single(const uint8_t* payload, const int16_t* x, int group_size,
                            Vector (&out)[2]) {
  constexpr int positions = bits == 3 ? 4 : 8 / bits;
  constexpr auto position_of = [](int f) {
    return bits == 3 ? (f < 6 ? f % 2 : f - 4) : f;  // of shifts 0, 3 | 2, 5
  };
  Vector sums[2][positions];
  for (auto& half : sums)
    for (auto& sum : half) sum = zero();
  for (int step = 0; step < group_size / kStep<bits>; ++step) {
    const uint8_t* p = payload + step * kStepBytes<bits>;
    const int16_t* xs = x + step * kStep<bits>;
    prefetch<bits>(p);
    const Step<bits> low[2] = {Step<bits>(p), Step<bits>(p + 32)};
    Step<bits> high[2] = {low[0], low[1]};
    for (auto& half : high)
      for (auto& word : half.word) word = shift<8>(word);
    repeat<kFields<bits>>(MOEQ_LAMBDA {
      constexpr int f = decltype(index)::value;
      constexpr Field place = field<bits>(f);
      const Vector mask = _mm256_set1_epi16(((1 << bits) - 1) << place.shift);
      const Vector even = broadcast(xs + 4 * f), odd = broadcast(xs + 4 * f + 2);
      for (int half = 0; half < 2; ++half) {
        Vector& sum = sums[half][position_of(f)];
        add_dot(sum, _mm256_and_si256(low[half].word[place.word], mask), even);
        const Vector top = high[half].word[place.word];
        add_dot(sum, bits == 8 ? top : _mm256_and_si256(top, mask), odd);
      }
    });
  }
  for (int half = 0; half < 2; ++half) {
    out[half] = zero();
    repeat<kFields<bits>>(MOEQ_LAMBDA {
      constexpr int f = decltype(index)::value;
      if constexpr (bits != 3 || f < 2 || f >= 6)
        out[half] = _mm256_add_epi32(
            out[half], _mm256_srai_epi32(sums[half][position_of(f)], field<bits>(f).shift));
    });
  }
}

// A few tokens, one block of 16 rows.
template <int bits, int tokens>
MOEQ_INLINE void dot_direct(const uint8_t* payload, const int16_t* const* x, int group_size,
                            Vector (&sums)[tokens][2]) {
  repeat<tokens>(MOEQ_LAMBDA { sums[index][0] = sums[index][1] = zero(); });
  for (int step = 0; step < group_size / kStep<bits>; ++step) {
    const uint8_t* p = payload + step * kStepBytes<bits>;
    prefetch<bits>(p);
    const Step<bits> half[2] = {Step<bits>(p), Step<bits>(p + 32)};
    repeat<2 * kFields<bits>>(MOEQ_LAMBDA {
      constexpr int f = decltype(index)::value / 2, odd = decltype(index)::value % 2;
      const Vector first = half[0].template codes<f, odd>(),
                   second = half[1].template codes<f, odd>();
      repeat<tokens>([&](auto t) __attribute__((always_inline)) {
        const Vector xs = broadcast(x[t] + step * kStep<bits> + 4 * f + 2 * odd);
        add_dot(sums[t][0], first, xs);
        add_dot(sums[t][1], second, xs);
      });
    });
  }
}

// Weights of one group as 16-bit codes, [block][G / 2][2 halves][8 rows x 2].
template <int bits>
MOEQ_INLINE void unpack(const uint8_t* payload, int group_size, int16_t* out) {
  for (int block = 0; block < kBlocks; ++block)
    for (int step = 0; step < group_size / kStep<bits>; ++step, payload += kStepBytes<bits>) {
      prefetch<bits>(payload);
      for (int half = 0; half < 2; ++half) {
        const Step<bits> words(payload + 32 * half);
        int16_t* target = out + (block * group_size + step * kStep<bits>)*kBlockRows + 16 * half;
        repeat<2 * kFields<bits>>(MOEQ_LAMBDA {
          constexpr int f = decltype(index)::value / 2, odd = decltype(index)::value % 2;
          _mm256_storeu_si256(reinterpret_cast<Vector*>(target + 32 * index),
                              words.template codes<f, odd>());
        });
      }
    }
}

template <int tokens>
MOEQ_INLINE void dot_unpacked(const int16_t* codes, const int16_t* const* x, int group_size,
                              Vector (&sums)[tokens][2]) {
  repeat<tokens>(MOEQ_LAMBDA { sums[index][0] = sums[index][1] = zero(); });
  for (int k = 0; k < group_size; k += 2, codes += 32) {
    const Vector first = load(codes), second = load(codes + 16);
    repeat<tokens>(MOEQ_LAMBDA {
      const Vector xs = broadcast(x[index] + k);
      add_dot(sums[index][0], first, xs);
      add_dot(sums[index][1], second, xs);
    });
  }
}

}  // namespace avx2

// One group times some tokens: with the weights as they are packed for a few tokens, else unpacked
// first.
template <class Kernel, int bits>
void multiply_direct_or_unpacked(const uint8_t* header, const Tokens<typename Kernel::Code>& x,
                                 int group, const int* which, int count, float* y) {
  constexpr int direct_tokens = Kernel::template kDirectTokens<bits>;
  if (count <= direct_tokens)
    return with_constant<1, direct_tokens>(
        count, MOEQ_LAMBDA {
          Kernel::template multiply_few<bits, decltype(index)::value, true>(header, nullptr, x,
                                                                            group, which, y);
        });
  alignas(64)
      typename Kernel::Unpacked unpacked[kTileRows * kMaxGroup * Kernel::template kUnpacked<bits>];
  Kernel::template unpack<bits>(header + kHeaderBytes, x.group_size, unpacked);
  pieces<Kernel::kMicroTokens, direct_tokens>(
      count, [&](auto tokens, int first) __attribute__((always_inline)) {
        Kernel::template multiply_few<bits, tokens, false>(header, unpacked, x, group,
                                                           which + first, y + first * kTileRows);
      });
}

// Beside what every kernel has: kMicroTokens, for which the registers can hold sums; more than
// kDirectTokens are worth unpacking weights first, into kUnpacked values of type Unpacked each.
struct Avx2 {
  using Code = int16_t;
  using Thread = NoThreadState;
  using Unpacked = int16_t;
  static constexpr int kPlanes = 1;
  static constexpr int kConsecutiveFrom = kAnyTokens;
  static constexpr int kMicroTokens = 6;
  template <int bits>
  static constexpr int kDirectTokens = 4;
  template <int bits>
  static constexpr int kUnpacked = 1;

  static void quantize(const float* x, const Tokens<Code>& tokens, int group, int token) {
    int32_t codes[kMaxGroup];
    const float scale = quantize_group(x, tokens.group_size, 32767.0f, codes);
    Code* out = tokens.of(group, token);
    int32_t sum = 0;
    for (int i = 0; i < tokens.group_size; i += 4) {
      sum += codes[i] + codes[i + 1] + codes[i + 2] + codes[i + 3];
      out[i] = static_cast<Code>(codes[i]);
      out[i + 1] = static_cast<Code>(codes[i + 2]);
      out[i + 2] = static_cast<Code>(codes[i + 1]);
      out[i + 3] = static_cast<Code>(codes[i + 3]);
    }
    const size_t place = tokens.place(group, token);
    tokens.scale[place] = scale;
    tokens.sum[place] = scale * static_cast<float>(sum);
  }

  template <int bits>
  static void multiply_group(const uint8_t* header, const Tokens<Code>& x, int group,
                             const int* which, int count, float* y) {
    multiply_direct_or_unpacked<Avx2, bits>(header, x, group, which, count, y);
  }

  template <int bits>
  static void unpack(const uint8_t* payload, int group_size, Unpacked* out) {
    avx2::unpack<bits>(payload, group_size, out);
  }

  template <int bits, int tokens, bool direct>
  MOEQ_NOINLINE void multiply_few(const uint8_t* header, const Unpacked* unpacked,
                                  const Tokens<Code>& x, int group, const int* which, float* y) {
    const Code* codes[tokens];
    for (int t = 0; t < tokens; ++t) codes[t] = x.of(group, which[t]);
    for (int block = 0; block < kBlocks; ++block) {
      avx2::Vector sums[tokens][2];
      const uint8_t* payload = header + kHeaderBytes + payload_offset<bits>(x.group_size, 0, block);
      if constexpr (!direct)
        avx2::dot_unpacked<tokens>(unpacked + block * kBlockRows * x.group_size, codes,
                                   x.group_size, sums);
      else if constexpr (tokens == 1)
        avx2::dot_single<bits>(payload, codes[0], x.group_size, sums[0]);
      else
        avx2::dot_direct<bits, tokens>(payload, codes, x.group_size, sums);
      avx2::add_block<bits, tokens>(
          header, block, x, group, which, y,
          [&](int token, int half) __attribute__((always_inline)) { return sums[token][half]; });
    }
  }
};

}  // namespace moeq

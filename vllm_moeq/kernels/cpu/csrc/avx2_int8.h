// Tile kernel for AVX2 with 8-bit activations.
//
// vpmaddubsw multiplies twice as many codes as vpmaddwd, but adds up in 16 bits: after some steps,
// before they could overflow, sums move to 32 bits. 8-bit codes would overflow at once, so they are
// taken as two planes of 4 bits.
#pragma once
#include "avx2.h"

namespace moeq {

namespace avx2_int8 {

using namespace avx2;

// Weights are used in planes of at most 4 bits: 8-bit codes are low + 16 * high.
template <int bits>
constexpr int kPlaneBits = bits == 8 ? 4 : bits;
template <int bits>
constexpr int kPlanes = bits / kPlaneBits<bits>;
// Products of 4 k that fit in 16 bits, two of them added by the instruction itself.
template <int bits>
constexpr int kWindow = 32767 / (2 * 127 * ((1 << kPlaneBits<bits>)-1));

// Inline assembly for the same reason as in avx2.h.
MOEQ_INLINE void add_dot(Vector& sum, Vector codes, Vector x) {
  Vector product;
  asm("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0"
      : "+x"(sum), "=&x"(product)
      : "x"(x), "x"(codes));
}
MOEQ_INLINE void widen(Vector& sum, Vector window) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(window, _mm256_set1_epi16(1)));
}

// Plane `plane` of field f: bytes of 4 k of 8 rows.
template <int bits, int f, int plane>
MOEQ_INLINE Vector codes(const Step<bits>& step) {
  constexpr Field place = field<bits>(f);
  constexpr int offset = place.shift + plane * kPlaneBits<bits>;
  return _mm256_and_si256(shift<offset>(step.word[place.word]),
                          _mm256_set1_epi8((1 << kPlaneBits<bits>)-1));
}

// 32-bit sums of a block: [tokens][2 halves][planes].
template <int bits, int tokens>
struct Sums {
  Vector value[tokens][2][kPlanes<bits>];

  __attribute__((always_inline)) Sums() {
    repeat<tokens * 2 * kPlanes<bits>>(MOEQ_LAMBDA { at(index) = zero(); });
  }
  __attribute__((always_inline)) Vector& at(int i) {
    return value[i / (2 * kPlanes<bits>)][i / kPlanes<bits> % 2][i % kPlanes<bits>];
  }
  __attribute__((always_inline)) Vector total(int token, int half) const {
    const auto& planes = value[token][half];
    if constexpr (kPlanes<bits> == 1) return planes[0];
    return _mm256_add_epi32(planes[0], _mm256_slli_epi32(planes[1], 4));
  }
};

// A few tokens, straight from the packed weights of one block.
template <int bits, int tokens>
MOEQ_INLINE void dot_direct(const uint8_t* payload, const int8_t* const* x, int group_size,
                            Sums<bits, tokens>& sums) {
  constexpr int window = kWindow<bits> / kFields<bits>;  // in steps
  const int steps = group_size / kStep<bits>;
  for (int first = 0; first < steps; first += window) {
    Sums<bits, tokens> narrow;
    for (int step = first; step < std::min(first + window, steps); ++step) {
      const uint8_t* p = payload + step * kStepBytes<bits>;
      prefetch<bits>(p);
      const Step<bits> half[2] = {Step<bits>(p), Step<bits>(p + 32)};
      repeat<kFields<bits>>([&](auto f) __attribute__((always_inline)) {
        repeat<kPlanes<bits>>([&](auto plane) __attribute__((always_inline)) {
          const Vector low = codes<bits, f, plane>(half[0]), high = codes<bits, f, plane>(half[1]);
          repeat<tokens>([&](auto t) __attribute__((always_inline)) {
            const Vector xs = broadcast(x[t] + step * kStep<bits> + 4 * f);
            add_dot(narrow.value[t][0][plane], low, xs);
            add_dot(narrow.value[t][1][plane], high, xs);
          });
        });
      });
    }
    repeat<tokens * 2 * kPlanes<bits>>(MOEQ_LAMBDA { widen(sums.at(index), narrow.at(index)); });
  }
}

// Weights of one group as bytes, [block][plane][G / 4][2 halves][8 rows x 4].
template <int bits>
MOEQ_INLINE void unpack(const uint8_t* payload, int group_size, uint8_t* out) {
  const int plane_bytes = group_size * kBlockRows;
  for (int block = 0; block < kBlocks; ++block)
    for (int step = 0; step < group_size / kStep<bits>; ++step, payload += kStepBytes<bits>) {
      prefetch<bits>(payload);
      for (int half = 0; half < 2; ++half) {
        const Step<bits> words(payload + 32 * half);
        uint8_t* target =
            out + block * kPlanes<bits> * plane_bytes + step * kStep<bits> * kBlockRows + 32 * half;
        repeat<kFields<bits>>([&](auto f) __attribute__((always_inline)) {
          repeat<kPlanes<bits>>([&](auto plane) __attribute__((always_inline)) {
            _mm256_storeu_si256(reinterpret_cast<Vector*>(target + plane * plane_bytes + 64 * f),
                                codes<bits, f, plane>(words));
          });
        });
      }
    }
}

template <int bits, int tokens>
MOEQ_INLINE void dot_unpacked(const uint8_t* unpacked, const int8_t* const* x, int group_size,
                              Sums<bits, tokens>& sums) {
  constexpr int window = 4 * kWindow<bits>;  // in k
  repeat<kPlanes<bits>>([&](auto plane) __attribute__((always_inline)) {
    const uint8_t* plane_codes = unpacked + plane * group_size * kBlockRows;
    for (int first = 0; first < group_size; first += window) {
      Sums<1, tokens> narrow;
      for (int k = first; k < std::min(first + window, group_size); k += 4) {
        const Vector low = load(plane_codes + k * kBlockRows);
        const Vector high = load(plane_codes + k * kBlockRows + 32);
        repeat<tokens>([&](auto t) __attribute__((always_inline)) {
          const Vector xs = broadcast(x[t] + k);
          add_dot(narrow.value[t][0][0], low, xs);
          add_dot(narrow.value[t][1][0], high, xs);
        });
      }
      repeat<tokens * 2>(MOEQ_LAMBDA {
        widen(sums.value[index / 2][index % 2][plane], narrow.value[index / 2][index % 2][0]);
      });
    }
  });
}

}  // namespace avx2_int8

struct Avx2Int8 {
  using Code = int8_t;
  using Thread = NoThreadState;
  using Unpacked = uint8_t;
  static constexpr int kPlanes = 1;
  static constexpr int kConsecutiveFrom = kAnyTokens;
  static constexpr int kMicroTokens = 6;
  template <int bits>
  static constexpr int kDirectTokens = bits == 8 ? 2 : 4;
  template <int bits>
  static constexpr int kUnpacked = avx2_int8::kPlanes<bits>;

  static void quantize(const float* x, const Tokens<Code>& tokens, int group, int token) {
    quantize_int8(x, tokens, group, token);
  }

  template <int bits>
  static void multiply_group(const uint8_t* header, const Tokens<Code>& x, int group,
                             const int* which, int count, float* y) {
    multiply_direct_or_unpacked<Avx2Int8, bits>(header, x, group, which, count, y);
  }

  template <int bits>
  static void unpack(const uint8_t* payload, int group_size, Unpacked* out) {
    avx2_int8::unpack<bits>(payload, group_size, out);
  }

  template <int bits, int tokens, bool direct>
  MOEQ_NOINLINE void multiply_few(const uint8_t* header, const Unpacked* unpacked,
                                  const Tokens<Code>& x, int group, const int* which, float* y) {
    const Code* codes[tokens];
    for (int t = 0; t < tokens; ++t) codes[t] = x.of(group, which[t]);
    for (int block = 0; block < kBlocks; ++block) {
      avx2_int8::Sums<bits, tokens> sums;
      const uint8_t* payload = header + kHeaderBytes + payload_offset<bits>(x.group_size, 0, block);
      if constexpr (direct)
        avx2_int8::dot_direct<bits, tokens>(payload, codes, x.group_size, sums);
      else
        avx2_int8::dot_unpacked<bits, tokens>(
            unpacked + block * kUnpacked<bits> * x.group_size * kBlockRows, codes, x.group_size,
            sums);
      avx2::add_block<bits, tokens>(header, block, x, group, which, y,
                                    [&](int token, int half) __attribute__((always_inline)) {
                                      return sums.total(token, half);
                                    });
    }
  }
};

}  // namespace moeq

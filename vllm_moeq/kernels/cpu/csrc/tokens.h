// Activations as integers: one scale per token and group, so that outlier channels cost only their
// own group.
#pragma once
#include <immintrin.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "layout.h"

namespace moeq {

// codes [group][token][plane][G], scale and sum [group][token]; sum is scale times the sum of the
// codes. A kernel may split codes into two planes, of their high and of their low bits.
template <class Code>
struct Tokens {
  Code* codes;
  float* scale;
  float* sum;
  int count;
  int group_size;
  int planes;

  // Index into scale and sum.
  size_t place(int group, int token) const { return static_cast<size_t>(group) * count + token; }
  Code* of(int group, int token) const { return codes + place(group, token) * planes * group_size; }

  void copy(int group, int token, const Tokens& from, int from_token) const {
    std::copy_n(from.of(group, from_token), static_cast<size_t>(planes) * group_size,
                of(group, token));
    scale[place(group, token)] = from.scale[from.place(group, from_token)];
    sum[place(group, token)] = from.sum[from.place(group, from_token)];
  }
};

// Round x to integers of at most `largest` and return the scale. A group with a NaN or an infinity
// gets the scale NaN: what comes of it must be seen in the output.
inline float quantize_group(const float* x, int group_size, float largest, int32_t* codes) {
  uint32_t magnitude = 0;  // as bits, which compare like the numbers and know NaN
  for (int i = 0; i < group_size; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]) & 0x7fffffff;
    magnitude = bits > magnitude ? bits : magnitude;
  }
  const float peak = std::bit_cast<float>(magnitude);
  const bool finite = magnitude < 0x7f800000;
  const bool zero = peak < 1e-30f;  // its reciprocal would overflow
  const __m256 reciprocal = _mm256_set1_ps(finite && !zero ? largest / peak : 0.0f);
  for (int i = 0; i < group_size; i += 8) {
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i), reciprocal);
    const __m256i rounded = finite ? _mm256_cvtps_epi32(scaled) : _mm256_setzero_si256();
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), rounded);
  }
  if (!finite) return std::numeric_limits<float>::quiet_NaN();
  return zero ? 0.0f : peak / largest;
}

inline void quantize_int8(const float* x, const Tokens<int8_t>& tokens, int group, int token) {
  int32_t codes[kMaxGroup];
  const float scale = quantize_group(x, tokens.group_size, 127.0f, codes);
  int8_t* out = tokens.of(group, token);
  int32_t sum = 0;
  for (int i = 0; i < tokens.group_size; ++i) {
    sum += codes[i];
    out[i] = static_cast<int8_t>(codes[i]);
  }
  const size_t place = tokens.place(group, token);
  tokens.scale[place] = scale;
  tokens.sum[place] = scale * static_cast<float>(sum);
}

}  // namespace moeq

// The few 512-bit operations that the AVX-512 tile kernel is made of. Without AVX-512 (the build
// `portable`, for tests) the compiler makes them of smaller vectors: slow, but the same results.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "unroll.h"

namespace moeq::simd512 {

#ifdef __AVX512VNNI__

using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;

MOEQ_INLINE Ints zero() { return _mm512_setzero_si512(); }
MOEQ_INLINE Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
MOEQ_INLINE void store(uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
MOEQ_INLINE Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
MOEQ_INLINE Bytes mask(Bytes v, uint8_t bits) {
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(bits)));
}
// Bits may come in from the neighbour byte: mask afterwards.
template <int count>
MOEQ_INLINE Bytes shift(Bytes v) {
  return count ? _mm512_srli_epi16(v, count) : v;
}
// Bits of a where `bits` is set, else of b.
MOEQ_INLINE Bytes select(uint8_t bits, Bytes a, Bytes b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(bits)), a, b, 0xca);
}
// Four activations, to be multiplied with four codes of each row.
MOEQ_INLINE Ints broadcast(const int8_t* x) {
  int value;
  std::memcpy(&value, x, 4);
  return _mm512_set1_epi32(value);
}
// Inline assembly: gcc 12 copies the accumulator of the intrinsic from register to register, which
// halves the speed.
MOEQ_INLINE void add_dot(Ints& sum, Bytes codes, Ints x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
}
MOEQ_INLINE void add_dot(Ints& sum, Bytes codes, const int8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(codes), "m"(*reinterpret_cast<const int*>(x)));
}
MOEQ_INLINE Ints high_and_low(Ints high, Ints low) {  // 256 * high + low
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}
MOEQ_INLINE Floats half_to_float(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MOEQ_INLINE Floats bytes_to_float(const uint8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
MOEQ_INLINE Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
MOEQ_INLINE Floats all(float value) { return _mm512_set1_ps(value); }
MOEQ_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
MOEQ_INLINE void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
MOEQ_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
MOEQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

#else

using Bytes = uint8_t __attribute__((vector_size(64)));
using Words = uint16_t __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Floats = float __attribute__((vector_size(64)));

template <class Vector>
MOEQ_INLINE Vector load_vector(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
MOEQ_INLINE Ints zero() { return Ints{}; }
MOEQ_INLINE Bytes load(const uint8_t* p) { return load_vector<Bytes>(p); }
MOEQ_INLINE void store(uint8_t* p, Bytes v) { std::memcpy(p, &v, sizeof v); }
MOEQ_INLINE Ints load_ints(const int32_t* p) { return load_vector<Ints>(p); }
MOEQ_INLINE Bytes mask(Bytes v, uint8_t bits) { return v & bits; }
template <int count>
MOEQ_INLINE Bytes shift(Bytes v) {
  return reinterpret_cast<Bytes>(reinterpret_cast<Words>(v) >> count);
}
MOEQ_INLINE Bytes select(uint8_t bits, Bytes a, Bytes b) {
  return (a & bits) | (b & static_cast<uint8_t>(~bits));
}
MOEQ_INLINE Ints broadcast(const int8_t* x) {
  int32_t value;
  std::memcpy(&value, x, 4);
  return Ints{} + value;
}
MOEQ_INLINE void add_dot(Ints& sum, Bytes codes, Ints x) {
  int8_t signed_x[64];
  std::memcpy(signed_x, &x, sizeof x);
  for (int i = 0; i < 64; ++i) sum[i / 4] += codes[i] * signed_x[i];
}
MOEQ_INLINE void add_dot(Ints& sum, Bytes codes, const int8_t* x) {
  add_dot(sum, codes, broadcast(x));
}
MOEQ_INLINE Ints high_and_low(Ints high, Ints low) { return (high << 8) + low; }
MOEQ_INLINE Floats half_to_float(const uint8_t* p) {
  Floats result;
  for (int i = 0; i < 16; i += 8) {
    const __m256 eight =
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * i)));
    std::memcpy(reinterpret_cast<float*>(&result) + i, &eight, sizeof eight);
  }
  return result;
}
MOEQ_INLINE Floats bytes_to_float(const uint8_t* p) {
  Floats result;
  for (int i = 0; i < 16; ++i) result[i] = p[i];
  return result;
}
MOEQ_INLINE Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }
MOEQ_INLINE Floats all(float value) { return Floats{} + value; }
MOEQ_INLINE Floats load_floats(const float* p) { return load_vector<Floats>(p); }
MOEQ_INLINE void store_floats(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
MOEQ_INLINE Floats multiply(Floats a, Floats b) { return a * b; }
MOEQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

#endif

}  // namespace moeq::simd512

// Conversions and activation functions, as plain loops that the compiler vectorizes.
#pragma once
#include <immintrin.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace moeq {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

constexpr size_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// n is a multiple of 8 in both directions: rows are whole groups.
inline void load_floats(const void* source, DType dtype, int n, float* out) {
  const auto* half = static_cast<const uint16_t*>(source);
  if (dtype == DType::kFloat32) {
    std::memcpy(out, source, n * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
    for (int i = 0; i < n; ++i) out[i] = std::bit_cast<float>(static_cast<uint32_t>(half[i]) << 16);
  } else {
    for (int i = 0; i < n; i += 8) {
      const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i));
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(values));
    }
  }
}

inline uint16_t to_bfloat16(float value) {  // round to nearest even
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0u : rounded);
}

inline void store_floats(const float* source, DType dtype, int n, void* out) {
  auto* half = static_cast<uint16_t*>(out);
  if (dtype == DType::kFloat32) {
    std::memcpy(out, source, n * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
    for (int i = 0; i < n; ++i) half[i] = to_bfloat16(source[i]);
  } else {
    for (int i = 0; i < n; i += 8) {
      const __m128i values =
          _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), values);
    }
  }
}

// e^x to about 1e-7: Cody-Waite reduction by ln 2, then the polynomial of Cephes' expf. NaN stays.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const uint32_t exponent = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(magic) + 127;
  return p * std::bit_cast<float>(exponent << 23);
}

// Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
inline float error_function(float x) {
  const float magnitude = x < 0 ? -x : x;
  const float t = 1.0f / (1.0f + 0.3275911f * magnitude);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float result = 1.0f - p * t * exponential(-magnitude * magnitude);
  return x < 0 ? -result : result;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
inline float silu(float x) { return x * sigmoid(x); }
inline float gelu(float x) { return 0.5f * x * (1.0f + error_function(x * 0.70710678f)); }
inline float gelu_tanh(float x) {
  const float u = 0.79788456f * (x + 0.044715f * x * x * x);
  return x * sigmoid(2.0f * u);  // 0.5 * (1 + tanh(u)) == sigmoid(2 u)
}
inline float relu(float x) { return x < 0 ? 0.0f : x; }
inline float relu2(float x) { return relu(x) * relu(x); }

// The numbers are those of library.py. kSwigluOai and kLimitedSilu are one formula; the first has
// gate and up alternate in the rows of w13.
enum class Activation : int32_t {
  kSilu,
  kGelu,
  kGeluTanh,
  kSwigluOai,
  kRelu,
  kRelu2,
  kLimitedSilu
};

// Of (up + beta) * gate * sigmoid(alpha * gate) with gate <= limit and |up| <= limit.
struct SwiGlu {
  float limit, alpha, beta;
};

template <float (*function)(float)>
inline void apply(float* gate, const float* up, int n) {
  if (up)
    for (int i = 0; i < n; ++i) gate[i] = function(gate[i]) * up[i];
  else
    for (int i = 0; i < n; ++i) gate[i] = function(gate[i]);
}

// gate = activation(gate) * up, or activation(gate) without a gated pair (up is null).
inline void activate(Activation activation, SwiGlu swiglu, float* gate, const float* up, int n) {
  switch (activation) {
    case Activation::kSilu:
      return apply<silu>(gate, up, n);
    case Activation::kGelu:
      return apply<gelu>(gate, up, n);
    case Activation::kGeluTanh:
      return apply<gelu_tanh>(gate, up, n);
    case Activation::kRelu:
      return apply<relu>(gate, up, n);
    case Activation::kRelu2:
      return apply<relu2>(gate, up, n);
    case Activation::kSwigluOai:
    case Activation::kLimitedSilu:
      for (int i = 0; i < n; ++i) {
        const float g = gate[i] > swiglu.limit ? swiglu.limit : gate[i];
        float u = up[i] > swiglu.limit ? swiglu.limit : up[i];
        u = u < -swiglu.limit ? -swiglu.limit : u;
        gate[i] = (u + swiglu.beta) * g * sigmoid(swiglu.alpha * g);
      }
  }
}

}  // namespace moeq

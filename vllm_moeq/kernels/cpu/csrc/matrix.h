// What the layers have in common: the kernels of this instruction set, a matrix as tiles, and
// memory.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "numeric.h"
#include "tile.h"
#ifdef MOEQ_ISA_AVX2
#include "avx2.h"
#include "avx2_int8.h"
#else
#include "amx.h"
#endif

namespace moeq {

constexpr int64_t kTokensPerPass = 1024;  // bounds the scratch memory of a long prefill
constexpr int kTokensPerTile = 96;        // whose sums stay in the first-level cache

// The kernels of this instruction set, for 16-bit and for 8-bit activations.
#ifdef MOEQ_ISA_AVX2
constexpr const char* kIsaName = "avx2";
namespace isa = avx2;
using Int16Kernel = Avx2;
using Int8Kernel = Avx2Int8;
#else
namespace isa = avx512;
#if defined(MOEQ_ISA_AMX)
constexpr const char* kIsaName = "amx_int8";
#elif defined(__AVX512VNNI__)
constexpr const char* kIsaName = "avx512_vnni";
#else
constexpr const char* kIsaName = "portable";
#endif
#if defined(__AVX512VNNI__) && !defined(MOEQ_ISA_AMX)
using Int16Kernel = Avx512;
using Int8Kernel = Avx512Int8;
#else
using Int16Kernel = Amx;
using Int8Kernel = AmxInt8;
#endif
#endif

// The weights of a linear layer, of one projection of one expert for example.
struct Matrix {
  const uint8_t* tiles;
  size_t tile_bytes;
  int bits;
  int groups;  // of a row

  static Matrix at(const uint8_t* tiles, int bits, int group_size, int columns) {
    return {tiles, moeq::tile_bytes(bits, group_size, columns), bits, columns / group_size};
  }
};

// Call f(std::integral_constant<int, bits>) for the width of a matrix.
template <class F>
void with_width(int bits, F&& f) {
  switch (bits) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    default:
      return f(std::integral_constant<int, 8>{});
  }
}

// sums [count][64] = one tile times the tokens given.
template <class Kernel>
void multiply(const Matrix& matrix, int tile, const Tokens<typename Kernel::Code>& tokens,
              const int* which, int count, float* sums) {
  const uint8_t* weights = matrix.tiles + tile * matrix.tile_bytes;
  with_width(matrix.bits, [&](auto bits) {
    multiply_tile<Kernel, bits>(weights, matrix.groups, tokens, which, count, sums);
  });
}

// Fetch the beginning of the tile that comes next, if it does not lie behind this one: the kernels
// fetch ahead within a tile.
inline void prefetch_tile(const Matrix& matrix, int tile) {
  const uint8_t* weights = matrix.tiles + tile * matrix.tile_bytes;
  with_width(matrix.bits, [&](auto bits) {
    for (size_t i = 0; i < std::min(matrix.tile_bytes, isa::kAhead<bits>); i += 64)
      _mm_prefetch(reinterpret_cast<const char*>(weights + i), _MM_HINT_T0);
  });
}

// Write one group of token `token`, which begins at element `first` of x.
template <class Kernel>
void quantize_input(const void* x, DType dtype, size_t first,
                    const Tokens<typename Kernel::Code>& tokens, int group, int token) {
  alignas(64) float values[kMaxGroup];
  load_floats(static_cast<const char*>(x) + first * element_bytes(dtype), dtype, tokens.group_size,
              values);
  Kernel::quantize(values, tokens, group, token);
}

// Memory that grows and stays, one for each calling thread.
class Scratch {
 public:
  template <class Kernel>
  Tokens<typename Kernel::Code> tokens(int count, int columns, int group_size) {
    constexpr int planes = Kernel::kPlanes;
    const size_t groups = static_cast<size_t>(count) * (columns / group_size);
    constexpr int spare = 16;  // tokens: a kernel may read as many at once, and ignore some
    return {take<typename Kernel::Code>((groups + spare) * group_size * planes),
            take<float>(groups),
            take<float>(groups),
            count,
            group_size,
            planes};
  }
  template <class T>
  T* take(size_t count) {
    std::vector<char>& buffer = buffers_.at(next_++);
    if (buffer.size() < count * sizeof(T) + 64) buffer.resize(count * sizeof(T) + 64);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
  }
  void reset() { next_ = 0; }

 private:
  std::array<std::vector<char>, 11> buffers_;
  size_t next_ = 0;
};

}  // namespace moeq

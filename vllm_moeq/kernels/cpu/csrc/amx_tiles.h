// The few operations on tiles that the AMX kernel is made of. Without AMX (the build `portable`,
// for tests) plain C++ does the same.
//
// Not the compiler's intrinsics: gcc's do not say that they read memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "unroll.h"

namespace moeq::amx_tiles {

constexpr int kTokens = 16;  // rows of a first factor
constexpr int kDepth = 64;   // k of a product, or a group where that is smaller

#ifdef MOEQ_ISA_AMX

// Tiles for groups of a size, in the calling thread. The operating system must have allowed AMX
// (build.py).
class Configured {
 public:
  explicit Configured(int group_size) {
    const auto depth = static_cast<uint8_t>(std::min(group_size, kDepth));
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } tiles;
    for (int tile = 0; tile < 8; ++tile) {
      const bool first_factor = tile == 4 || tile == 5, second_factor = tile >= 6;
      tiles.row_bytes[tile] = first_factor ? depth : 64;
      tiles.rows[tile] = second_factor ? depth / 4 : kTokens;
    }
    asm volatile("ldtilecfg %0" ::"m"(tiles));
  }
  Configured(const Configured&) = delete;
  ~Configured() { asm volatile("tilerelease"); }
};

template <int tile>
MOEQ_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// Rows lie `stride` bytes apart.
template <int tile>
MOEQ_INLINE void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
MOEQ_INLINE void store(int32_t* p) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(int64_t{64}), "i"(tile) : "memory");
}
// Signed bytes times unsigned ones.
template <int sums, int first_factor, int second_factor>
MOEQ_INLINE void add_dot() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(first_factor),
               "i"(second_factor));
}

#else

struct Tile {
  alignas(64) uint8_t bytes[16][64];
};
inline thread_local Tile emulated[8];
inline thread_local int emulated_depth;

struct Configured {
  explicit Configured(int group_size) { emulated_depth = std::min(group_size, kDepth); }
  Configured(const Configured&) = delete;
};

template <int tile>
void zero() {
  emulated[tile] = {};
}
template <int tile>
void load(const void* p, int64_t stride) {
  const bool first_factor = tile < 6;
  for (int row = 0; row < (first_factor ? kTokens : emulated_depth / 4); ++row)
    std::memcpy(emulated[tile].bytes[row], static_cast<const char*>(p) + row * stride,
                first_factor ? emulated_depth : 64);
}
template <int tile>
void store(int32_t* p) {
  std::memcpy(p, emulated[tile].bytes, sizeof(Tile));
}
template <int sums, int first_factor, int second_factor>
void add_dot() {
  int32_t totals[kTokens][16];
  std::memcpy(totals, emulated[sums].bytes, sizeof totals);
  for (int token = 0; token < kTokens; ++token)
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < emulated_depth; ++k)
        totals[token][row] += static_cast<int8_t>(emulated[first_factor].bytes[token][k]) *
                              emulated[second_factor].bytes[k / 4][4 * row + k % 4];
  std::memcpy(emulated[sums].bytes, totals, sizeof totals);
}

#endif

}  // namespace moeq::amx_tiles

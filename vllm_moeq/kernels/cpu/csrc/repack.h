// From the canonical checkpoint format to tiles.
#pragma once
#include <algorithm>
#include <cstring>

#include "layout.h"

namespace moeq {

// One projection of one expert as it is in the checkpoint: packed rows of K * bits / 8 bytes,
// LSB first, and a scale and a zero point per group.
struct Canonical {
  const uint8_t* packed;
  const uint16_t* scale;
  const uint8_t* zero;
  int64_t columns;
  int64_t group_size;
};

// The rows first, first + stride, ... of a matrix, `rows` of them.
struct RowRange {
  int64_t first;
  int64_t stride;
  int64_t rows;
};

// Move codes inside a word: the code at index n goes to the index whose bits low and high are
// exchanged.
template <int bits, int low, int high>
inline uint32_t swap_index_bits(uint32_t word) {
  constexpr uint32_t mask = [] {  // codes that move up
    uint32_t result = 0;
    for (int n = 0; n < 32 / bits; ++n)
      if ((n >> low & 1) && !(n >> high & 1)) result |= ((1u << bits) - 1) << (bits * n);
    return result;
  }();
  constexpr int distance = ((1 << high) - (1 << low)) * bits;
  const uint32_t difference = (word >> distance ^ word) & mask;
  return word ^ difference ^ difference << distance;
}

// Word with codes 4 * f + i of a step in order, to the word with field f in byte i: the index is
// rotated left by the two bits of i.
template <int bits>
inline uint32_t to_fields(uint32_t word) {
  if constexpr (bits == 4) {
    word = swap_index_bits<4, 1, 2>(word);
    word = swap_index_bits<4, 0, 1>(word);
  } else if constexpr (bits == 2) {
    word = swap_index_bits<2, 0, 2>(word);
    word = swap_index_bits<2, 1, 3>(word);
  } else if constexpr (bits == 1) {         // f2 f1 f0 i1 i0 to i1 i0 f2 f1 f0
    word = swap_index_bits<1, 1, 4>(word);  // i1 f1 f0 f2 i0
    word = swap_index_bits<1, 0, 3>(word);  // i1 i0 f0 f2 f1
    word = swap_index_bits<1, 1, 2>(word);  // i1 i0 f2 f0 f1
    word = swap_index_bits<1, 0, 1>(word);  // i1 i0 f2 f1 f0
  }
  return word;
}

// Field f of a step of three canonical words at 3 bits, spread to four bytes.
inline uint32_t spread_field(const uint32_t* words, int row, int f) {
  const int word = 12 * f / 32, offset = 12 * f % 32;
  uint32_t chunk = words[word * kTileRows + row] >> offset;
  if (offset + 12 > 32) chunk |= words[(word + 1) * kTileRows + row] << (32 - offset);
  return (chunk & 7) | (chunk & 0x38) << 5 | (chunk & 0x1c0) << 10 | (chunk & 0xe00) << 15;
}

// words: the canonical bytes of one step, [kWords][64 rows]; out: the same step, [kWords][64 rows].
template <int bits>
inline void repack_step(const uint32_t* words, uint32_t* out) {
  for (int row = 0; row < kTileRows; ++row) {  // the compiler vectorizes over rows
    if constexpr (bits != 3) {
      out[row] = to_fields<bits>(words[row]);
    } else {
      uint32_t f[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) f[i] = spread_field(words, row, i);
      const uint32_t spare = f[6] << 2 | f[7] << 5;  // bits 2 to 7 of each byte
      out[row] = f[0] | f[1] << 3 | (spare & 0xc0c0c0c0u);
      out[kTileRows + row] = f[2] | f[3] << 3 | (spare & 0x30303030u) << 2;
      out[2 * kTileRows + row] = f[4] | f[5] << 3 | (spare & 0x0c0c0c0cu) << 4;
    }
  }
}

// Payload of one group. packed: 64 rows of packed bytes, `row_bytes` apart.
template <int bits>
inline void repack_payload(const uint8_t* packed, int64_t row_bytes, int group_size, uint8_t* out) {
  for (int step = 0; step < group_size / kStep<bits>; ++step) {
    alignas(64) uint32_t words[kWords<bits> * kTileRows], repacked[kWords<bits> * kTileRows];
    for (int row = 0; row < kTileRows; ++row)
      for (int word = 0; word < kWords<bits>; ++word)
        std::memcpy(&words[word * kTileRows + row],
                    packed + row * row_bytes + 4 * (step * kWords<bits> + word), 4);
    repack_step<bits>(words, repacked);
    for (int block = 0; block < kBlocks; ++block)
      for (int word = 0; word < kWords<bits>; ++word)
        std::memcpy(out + payload_offset<bits>(group_size, step, block) + 64 * word,
                    repacked + word * kTileRows + block * kBlockRows, 64);
  }
}

// One tile. rows: indices of its 64 rows, -1 for padding.
template <int bits>
inline void repack_tile(const Canonical& source, const int64_t* rows, uint8_t* out) {
  // Rows are often a power of two apart and evict each other from the cache, so long pieces of each
  // are copied together first.
  constexpr int64_t kPieceBytes = 512;
  alignas(64) uint8_t piece[kTileRows * kPieceBytes];
  const int group_size = static_cast<int>(source.group_size);
  const int64_t groups = source.columns / group_size;
  const int64_t packed_bytes = group_size * bits / 8;  // of a row and group, at most 128
  const int64_t step = kPieceBytes / packed_bytes;
  for (int64_t first = 0; first < groups; first += step) {
    const int64_t count = std::min(step, groups - first);
    for (int row = 0; row < kTileRows; ++row) {
      uint8_t* target = piece + row * kPieceBytes;
      if (rows[row] < 0)
        std::memset(target, 0, count * packed_bytes);
      else
        std::memcpy(target, source.packed + (rows[row] * groups + first) * packed_bytes,
                    count * packed_bytes);
    }
    for (int64_t group = first; group < first + count; ++group) {
      for (int row = 0; row < kTileRows; ++row) {
        const int64_t index = rows[row] * groups + group;
        const uint16_t scale = rows[row] < 0 ? 0 : source.scale[index];
        std::memcpy(out + 2 * row, &scale, 2);
        out[kZeroOffset + row] = rows[row] < 0 ? 0 : source.zero[index];
      }
      repack_payload<bits>(piece + (group - first) * packed_bytes, kPieceBytes, group_size,
                           out + kHeaderBytes);
      out += group_bytes(bits, group_size);
    }
  }
}

// Write the rows of `range` as tiles at out, out + every * tile size, ...
template <int bits>
inline void repack(const Canonical& source, const RowRange& range, uint8_t* out, int64_t every) {
  const size_t stride = every * tile_bytes(bits, static_cast<int>(source.group_size),
                                           static_cast<int>(source.columns));
  const int64_t count = tiles(static_cast<int>(range.rows));
#pragma omp parallel for schedule(static)
  for (int64_t tile = 0; tile < count; ++tile) {
    int64_t rows[kTileRows];
    for (int row = 0; row < kTileRows; ++row) {
      const int64_t index = tile * kTileRows + row;
      rows[row] = index < range.rows ? range.first + index * range.stride : -1;
    }
    repack_tile<bits>(source, rows, out + tile * stride);
  }
}

}  // namespace moeq

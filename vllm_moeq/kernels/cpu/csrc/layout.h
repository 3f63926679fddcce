// How the experts lie in memory: what repack.h writes and the tile kernels read.
//
// A matrix [N, K] is cut into tiles of 64 rows (the last one padded with zeros). A tile holds its
// groups of K one after another, a group is
//
//     64 x fp16 scale | 64 x u8 zero point | payload of 64 * G * bits / 8 bytes
//
// and w = scale * (code - zero * 2^bits / 256). The payload is made of steps of kStep<bits>
// consecutive k. Of each step a row has kWords<bits> words of 32 bits; 16 rows make a block, in
// which word 0 of all rows is followed by word 1 of all rows: each is one vector of 64 bytes. Byte
// i of a word holds one code per field, and field f of byte i is the code of k = 4 * f + i of the
// step. So a mask and a shift give 4 consecutive k of 16 rows, ready for a dot product with 4
// activations, which are the same for all rows.
//
// At 3 bits a byte has room for two fields and 2 spare bits; the spare bits of three words make a
// fourth, virtual one with the last two fields.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moeq {

constexpr int kTileRows = 64;
constexpr int kBlockRows = 16;
constexpr int kBlocks = kTileRows / kBlockRows;
constexpr int kHeaderBytes = kTileRows * 3;
constexpr int kZeroOffset = kTileRows * 2;
constexpr int kMaxGroup = 128;

template <int bits>
constexpr int kFields = bits == 3 ? 8 : 8 / bits;
template <int bits>
constexpr int kWords = bits == 3 ? 3 : 1;
template <int bits>
constexpr int kStep = 4 * kFields<bits>;
template <int bits>
constexpr int kStepBytes = kBlockRows * 4 * kWords<bits>;  // of one block
template <int bits>
constexpr float kZeroUnit = static_cast<float>(1 << bits) / 256;

struct Field {
  int word;
  int shift;
};

// Where field f of a byte is; word 3 at 3 bits is the virtual one.
template <int bits>
constexpr Field field(int f) {
  if (bits != 3) return {0, f * bits};
  return f < 6 ? Field{f / 2, 3 * (f % 2)} : Field{3, f == 6 ? 2 : 5};
}

// The order of blocks and steps in a payload suits the tile kernel: AVX-512 has registers for all
// rows at once, AVX2 only for one block.
#ifdef MOEQ_ISA_AVX2
constexpr bool kBlockMajor = true;
#else
constexpr bool kBlockMajor = false;
#endif

template <int bits>
constexpr size_t payload_offset(int group_size, int step, int block) {
  const int steps = group_size / kStep<bits>;
  const int index = kBlockMajor ? block * steps + step : step * kBlocks + block;
  return static_cast<size_t>(index) * kStepBytes<bits>;
}

constexpr size_t group_bytes(int bits, int group_size) {
  return kHeaderBytes + static_cast<size_t>(kTileRows) * group_size * bits / 8;
}

constexpr size_t tile_bytes(int bits, int group_size, int columns) {
  return group_bytes(bits, group_size) * (columns / group_size);
}

// What the kernels know. The limit keeps sizes in bytes far from overflowing.
constexpr int64_t kMaxSize = 1 << 24;
constexpr bool knows_width(int64_t bits) {
  return bits == 1 || bits == 2 || bits == 3 || bits == 4 || bits == 8;
}
constexpr bool knows_sizes(int64_t group_size, int64_t rows, int64_t columns) {
  return (group_size == 32 || group_size == 64 || group_size == kMaxGroup) && rows > 0 &&
         rows <= kMaxSize && columns > 0 && columns <= kMaxSize && columns % group_size == 0;
}

constexpr int tiles(int rows) { return (rows + kTileRows - 1) / kTileRows; }

}  // namespace moeq

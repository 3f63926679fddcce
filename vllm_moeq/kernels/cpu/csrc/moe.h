// The C interface that library.py calls.
#pragma once
#include <cstdint>

#define MOEQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace moeq {

// One call of the fused experts. `layout` is ExpertLayout.to_tensor(): [2 + experts][4].
struct Call {
  const void* x;               // [tokens][hidden_size] of dtype
  void* out;                   // the same
  const float* router_weight;  // [tokens][top_k]
  const int32_t* expert_ids;   // [tokens][top_k], global; below zero is padding
  const int32_t* expert_map;   // global id to local slot, or null
  const uint8_t* w13;          // tiles of all local experts, one after another
  const uint8_t* w2;
  const float* w13_bias;  // [experts][w13_rows] or null
  const float* w2_bias;   // [experts][hidden_size] or null
  const int64_t* layout;
  int64_t hidden_size;  // columns of x
  int64_t w13_bytes;    // sizes of the buffers of tiles
  int64_t w2_bytes;
  int64_t map_size;
  int64_t experts;
  int64_t tokens;
  int64_t top_k;
  int32_t dtype;
  int32_t activation;
  int32_t int8;                    // 8-bit activations instead of 16-bit ones
  int32_t router_weight_on_input;  // on the input of an expert instead of its output
  float swiglu_limit;              // for the activations kSwigluOai and kLimitedSilu
  float swiglu_alpha;
  float swiglu_beta;
};

// One call of a dense linear layer.
struct LinearCall {
  const void* x;         // [tokens][columns] of dtype
  void* out;             // [tokens][rows] of dtype
  const uint8_t* tiles;  // of the weights [rows][columns]
  const float* bias;     // [rows] or null
  int64_t tiles_bytes;
  int64_t rows;
  int64_t columns;
  int64_t tokens;
  int32_t bits;
  int32_t group_size;
  int32_t dtype;
  int32_t int8;  // 8-bit activations instead of 16-bit ones
};

enum Status : int32_t { kOk, kBadExpertId, kBadSizes, kOutOfMemory };

}  // namespace moeq

// Name of the instruction set that this library is built for.
MOEQ_EXPORT const char* moeq_isa();
// Bytes of the tiles of `rows` rows.
MOEQ_EXPORT int64_t moeq_tiles_bytes(int64_t bits, int64_t group_size, int64_t rows,
                                     int64_t columns);
// Write rows first, first + stride, ... (`rows` of them) of a canonical matrix as tiles 0, every,
// 2 * every, ... at out.
MOEQ_EXPORT void moeq_repack(int64_t bits, int64_t group_size, int64_t columns,
                             const uint8_t* packed, const uint16_t* scale, const uint8_t* zero,
                             int64_t first, int64_t stride, int64_t rows, uint8_t* out,
                             int64_t every);
// Ask for huge pages, before the memory is first touched.
MOEQ_EXPORT void moeq_use_huge_pages(void* memory, int64_t bytes);
MOEQ_EXPORT int32_t moeq_fused_experts(const moeq::Call* call);
MOEQ_EXPORT int32_t moeq_linear(const moeq::LinearCall* call);
// Read memory once with all threads, as a yardstick of bandwidth; the result has no meaning.
MOEQ_EXPORT uint64_t moeq_read(const uint8_t* memory, int64_t bytes);
// The loops of GPTQ; see rounding.h, and grids.h for the grids. Zero points are in codes, in units
// of `unit`.
MOEQ_EXPORT void moeq_round_columns(int64_t columns, int64_t rows, float largest,
                                    const float* factor, const float* wanted, const float* sums,
                                    const float* scale, const float* zero, float* codes,
                                    float* difference);
MOEQ_EXPORT void moeq_descend(int64_t columns, int64_t rows, float largest, const float* hessian,
                              const float* curvature, const float* scale, float* codes,
                              float* gradient);
// Returns 0 if a weight is not finite or too large for the format.
MOEQ_EXPORT int32_t moeq_search_grids(int64_t rows, int64_t columns, int64_t group_size,
                                      float largest, float unit, const float* shares, int64_t count,
                                      const float* weights, const float* importance, float* scale,
                                      float* zero);
MOEQ_EXPORT void moeq_refine(int64_t columns, int64_t rows, int64_t group_size, float largest,
                             float unit, int64_t sweeps, const float* hessian,
                             const float* curvature, float* codes, float* gradient, float* scale,
                             float* zero);

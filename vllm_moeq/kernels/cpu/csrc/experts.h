// Fused experts of every width on one CPU: the whole layer in two parallel passes.
//
// Pass 1 runs over (expert, columns of the intermediate vector): gate and up, activation, and the
// quantization of the result for pass 2. Pass 2 runs over columns of the output and loops over the
// experts, so every output has one writer and one order of summation: results do not depend on the
// number of threads, nor on the other tokens of a batch. Threads come from the OpenMP runtime that
// torch has loaded; its settings belong to the caller.
#pragma once
#include <omp.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "matrix.h"
#include "moe.h"

namespace moeq {

// Sizes of the layer, and its experts in memory: the reader of ExpertLayout.
struct Layer {
  int group_size, hidden, intermediate;
  bool gated;
  bool sizes_fit;  // of the caller's tensors: nothing outside them is read or written
  std::vector<Matrix> w13, w2;

  explicit Layer(const Call& call)
      : group_size(static_cast<int>(call.layout[1])),
        hidden(static_cast<int>(call.layout[2])),
        intermediate(static_cast<int>(call.layout[3])),
        gated(call.layout[4] != call.layout[3]),
        sizes_fit(fit(call)) {
    if (!sizes_fit) return;
    int64_t first = 0, second = 0;  // bytes of the experts so far
    w13.reserve(call.experts);
    w2.reserve(call.experts);
    for (int64_t slot = 0; slot < call.experts; ++slot) {
      const int64_t* row = call.layout + 4 * (2 + slot);
      sizes_fit = knows_width(row[0]) && knows_width(row[2]) && first < call.w13_bytes &&
                  second < call.w2_bytes;
      if (!sizes_fit) return;
      w13.push_back(matrix(static_cast<int>(row[0]), hidden, call.w13 + first));
      first += w13.back().tile_bytes * tiles(intermediate) * (gated ? 2 : 1);
      w2.push_back(matrix(static_cast<int>(row[2]), intermediate, call.w2 + second));
      second += w2.back().tile_bytes * tiles(hidden);
    }
    sizes_fit = first == call.w13_bytes && second == call.w2_bytes;
  }

  static bool fit(const Call& call) {
    const int64_t group_size = call.layout[1], hidden = call.layout[2];
    const int64_t intermediate = call.layout[3], w13_rows = call.layout[4];
    return hidden == call.hidden_size && knows_sizes(group_size, hidden, intermediate) &&
           knows_sizes(group_size, intermediate, hidden) &&
           (w13_rows == intermediate || w13_rows == 2 * intermediate) && call.experts >= 0 &&
           call.experts <= kMaxSize && call.top_k >= 0 && call.top_k <= kMaxSize / kTokensPerPass;
  }

  Matrix matrix(int bits, int columns, const uint8_t* where) const {
    return Matrix::at(where, bits, group_size, columns);
  }
};

// Which token goes to which expert: positions in expert order.
struct Routing {
  std::vector<int> begin;   // of each expert, and the end of the last
  std::vector<int> active;  // experts with tokens
  int most;                 // tokens of an expert
  std::vector<int> choice;  // position to index into expert_ids
  std::vector<int> token;   // position to token

  bool build(const Call& call, int64_t first_token, int tokens) {
    const int top_k = static_cast<int>(call.top_k);
    const int32_t* ids = call.expert_ids + first_token * top_k;
    std::vector<int> slots(static_cast<size_t>(tokens) * top_k);
    begin.assign(call.experts + 1, 0);
    for (size_t i = 0; i < slots.size(); ++i) {
      int slot = ids[i];
      if (slot >= 0 && call.expert_map) {
        if (slot >= call.map_size) return false;
        slot = call.expert_map[slot];
      }
      if (slot >= call.experts) return false;
      slots[i] = slot;
      if (slot >= 0) ++begin[slot + 1];
    }
    active.clear();
    most = *std::max_element(begin.begin(), begin.end());
    for (int64_t slot = 0; slot < call.experts; ++slot) {
      if (begin[slot + 1]) active.push_back(static_cast<int>(slot));
      begin[slot + 1] += begin[slot];
    }
    const int used = begin.back();
    choice.resize(used);
    std::vector<int> next(begin.begin(), begin.end() - 1);
    for (size_t i = 0; i < slots.size(); ++i)
      if (slots[i] >= 0) choice[next[slots[i]]++] = static_cast<int>(i);
    token.resize(used);
    for (int position = 0; position < used; ++position) token[position] = choice[position] / top_k;
    return true;
  }
};

// Some tokens through all experts.
template <class Kernel>
class Pass {
  using Acts = Tokens<typename Kernel::Code>;

 public:
  Pass(const Call& call, const Layer& layer, const Routing& routing, Scratch& scratch,
       int64_t first_token, int tokens)
      : call_(call),
        layer_(layer),
        routing_(routing),
        first_token_(first_token),
        token_count_(tokens),
        unit_tiles_(std::max(1, layer.group_size / kTileRows)),
        sums_per_thread_(static_cast<size_t>(2 * unit_tiles_ * kTokensPerTile) * kTileRows),
        gathers_(routing.most >= Kernel::kConsecutiveFrom),
        x_(scratch.tokens<Kernel>(tokens, layer.hidden, layer.group_size)),
        gathered_(gathers_ ? scratch.tokens<Kernel>(positions(), layer.hidden, layer.group_size)
                           : x_),
        hidden_(scratch.tokens<Kernel>(positions(), layer.intermediate, layer.group_size)),
        sums_(scratch.take<float>(sums_per_thread_ * omp_get_max_threads())),
        outputs_(
            scratch.take<float>(static_cast<size_t>(tokens) * kTileRows * omp_get_max_threads())),
        positions_(routing.token.size()) {
    std::iota(positions_.begin(), positions_.end(), 0);
  }

  void run() {
    const int groups = layer_.hidden / layer_.group_size;
    const int units = (tiles(layer_.intermediate) + unit_tiles_ - 1) / unit_tiles_;
    const int active = static_cast<int>(routing_.active.size());
#pragma omp parallel
    {
      [[maybe_unused]] const typename Kernel::Thread state(layer_.group_size);
      const size_t thread = omp_get_thread_num();
      float* sums = sums_ + thread * sums_per_thread_;
      float* output = outputs_ + thread * token_count_ * kTileRows;
#pragma omp for schedule(static)
      for (int i = 0; i < token_count_ * groups; ++i) quantize_input(i / groups, i % groups);
      if (gathers_) {
#pragma omp for schedule(static)
        for (int group = 0; group < groups; ++group)
          for (int position = 0; position < positions(); ++position)
            gathered_.copy(group, position, x_, routing_.token[position]);
      }
#pragma omp for schedule(dynamic, 1)
      for (int task = 0; task < active * units; ++task)
        intermediate_unit(routing_.active[task / units], task % units, sums);
#pragma omp for schedule(dynamic, 1)
      for (int tile = 0; tile < tiles(layer_.hidden); ++tile) output_tile(tile, sums, output);
    }
  }

 private:
  int positions() const { return static_cast<int>(routing_.token.size()); }

  void quantize_input(int token, int group) {
    const size_t offset = static_cast<size_t>(first_token_ + token) * layer_.hidden +
                          static_cast<size_t>(group) * layer_.group_size;
    moeq::quantize_input<Kernel>(call_.x, static_cast<DType>(call_.dtype), offset, x_, group,
                                 token);
  }

  // Run one tile on positions [first, last) of an expert.
  void run_tile(const Matrix& matrix, int tile, const Acts& acts, const std::vector<int>& which,
                int first, int last, float* sums) const {
    multiply<Kernel>(matrix, tile, acts, which.data() + first, last - first, sums);
  }

  float router_weight(int position) const {
    return call_.router_weight[first_token_ * call_.top_k + routing_.choice[position]];
  }

  // Gate, up and activation of unit_tiles_ tiles of the intermediate vector, for all tokens of an
  // expert.
  void intermediate_unit(int expert, int unit, float* sums) {
    const Matrix& w13 = layer_.w13[expert];
    const int streams = layer_.gated ? 2 : 1;
    const int first_tile = unit * unit_tiles_;
    const int last_tile = std::min(first_tile + unit_tiles_, tiles(layer_.intermediate));
    const size_t tile_sums = static_cast<size_t>(kTokensPerTile) * kTileRows;
    const int end = routing_.begin[expert + 1];
    for (int first = routing_.begin[expert]; first < end; first += kTokensPerTile) {
      const int last = std::min(first + kTokensPerTile, end);
      for (int tile = first_tile * streams; tile < last_tile * streams; ++tile)
        run_tile(w13, tile, gathered_, gathers_ ? positions_ : routing_.token, first, last,
                 sums + (tile - first_tile * streams) * tile_sums);
      for (int position = first; position < last; ++position) {
        alignas(64) float gate[kMaxGroup], up[kMaxGroup];
        for (int tile = 0; tile < last_tile - first_tile; ++tile) {
          const float* row =
              sums + tile * streams * tile_sums + static_cast<size_t>(position - first) * kTileRows;
          std::copy_n(row, kTileRows, gate + tile * kTileRows);
          if (layer_.gated) std::copy_n(row + tile_sums, kTileRows, up + tile * kTileRows);
        }
        const int first_column = first_tile * kTileRows;
        const int count = std::min(last_tile * kTileRows, layer_.intermediate) - first_column;
        finish_intermediate(expert, position, first_column, count, gate, up);
      }
    }
  }

  void finish_intermediate(int expert, int position, int first_column, int count, float* gate,
                           float* up) {
    const auto activation = static_cast<Activation>(call_.activation);
    if (call_.router_weight_on_input) {  // the projection is linear: the same as scaling its input
      const float weight = router_weight(position);
      for (int i = 0; i < count; ++i) gate[i] *= weight;
      if (layer_.gated)
        for (int i = 0; i < count; ++i) up[i] *= weight;
    }
    if (call_.w13_bias) {
      const int streams = layer_.gated ? 2 : 1;
      const float* bias =
          call_.w13_bias + static_cast<size_t>(expert) * layer_.intermediate * streams;
      const bool alternating = activation == Activation::kSwigluOai;
      const int stride = alternating ? 2 : 1, up_offset = alternating ? 1 : layer_.intermediate;
      for (int i = 0; i < count; ++i) gate[i] += bias[stride * (first_column + i)];
      if (layer_.gated)
        for (int i = 0; i < count; ++i) up[i] += bias[stride * (first_column + i) + up_offset];
    }
    activate(activation, {call_.swiglu_limit, call_.swiglu_alpha, call_.swiglu_beta}, gate,
             layer_.gated ? up : nullptr, count);
    for (int i = 0; i < count; i += layer_.group_size)
      Kernel::quantize(gate + i, hidden_, (first_column + i) / layer_.group_size, position);
  }

  // 64 columns of the output for all tokens.
  void output_tile(int tile, float* sums, float* output) {
    std::fill_n(output, static_cast<size_t>(token_count_) * kTileRows, 0.0f);
    const int first_column = tile * kTileRows;
    const int columns = std::min(kTileRows, layer_.hidden - first_column);
    for (size_t i = 0; i < routing_.active.size(); ++i) {
      const int expert = routing_.active[i], end = routing_.begin[expert + 1];
      if (i + 1 < routing_.active.size()) prefetch_tile(layer_.w2[routing_.active[i + 1]], tile);
      for (int first = routing_.begin[expert]; first < end; first += kTokensPerTile) {
        const int last = std::min(first + kTokensPerTile, end);
        run_tile(layer_.w2[expert], tile, hidden_, positions_, first, last, sums);
        for (int position = first; position < last; ++position) {
          float* values = sums + static_cast<size_t>(position - first) * kTileRows;
          if (call_.w2_bias) {
            const float* bias =
                call_.w2_bias + static_cast<size_t>(expert) * layer_.hidden + first_column;
            for (int i = 0; i < columns; ++i) values[i] += bias[i];
          }
          const float weight = call_.router_weight_on_input ? 1.0f : router_weight(position);
          float* row = output + static_cast<size_t>(routing_.token[position]) * kTileRows;
          for (int i = 0; i < kTileRows; ++i) row[i] += weight * values[i];
        }
      }
    }
    const auto dtype = static_cast<DType>(call_.dtype);
    for (int token = 0; token < token_count_; ++token) {
      const size_t offset =
          static_cast<size_t>(first_token_ + token) * layer_.hidden + first_column;
      store_floats(output + static_cast<size_t>(token) * kTileRows, dtype, columns,
                   static_cast<char*>(call_.out) + offset * element_bytes(dtype));
    }
  }

  const Call& call_;
  const Layer& layer_;
  const Routing& routing_;
  const int64_t first_token_;
  const int token_count_;
  const int unit_tiles_;  // of 64 columns, a whole number of groups
  const size_t sums_per_thread_;
  const bool gathers_;
  Acts x_;         // of each token
  Acts gathered_;  // of each position, if the kernel wants those of an expert one after another
  Acts hidden_;    // of each position
  float* const sums_;
  float* const outputs_;
  std::vector<int> positions_;  // all of them: those of hidden_
};

template <class Kernel>
Status run_experts(const Call& call) {
  thread_local Scratch scratch;
  thread_local Routing routing;
  const Layer layer(call);
  if (!layer.sizes_fit) return kBadSizes;
  for (int64_t first = 0; first < call.tokens; first += kTokensPerPass) {
    const int tokens = static_cast<int>(std::min(kTokensPerPass, call.tokens - first));
    if (!routing.build(call, first, tokens)) return kBadExpertId;
    scratch.reset();
    Pass<Kernel>(call, layer, routing, scratch, first, tokens).run();
  }
  return kOk;
}

}  // namespace moeq

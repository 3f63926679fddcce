// The CPU kernel without Python: random layers, of experts and dense, against a double loop over
// the canonical format; the loops of GPTQ, which must lower what they are to lower; and calls that
// lie.
//
// A program of its own, so that it can run under the sanitizers (tests/sanitize.sh), and as a
// static binary under an emulator of instructions that the machine lacks.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <random>
#include <type_traits>

#include "../../../../vllm_moeq/kernels/cpu/csrc/moe.cpp"

namespace {

std::mt19937 random_bits(7);
int below(int n) { return static_cast<int>(random_bits() % n); }
float gaussian() { return std::normal_distribution<float>()(random_bits); }

// Exactly as large as it says, so that the sanitizers see any step outside.
template <class T>
std::unique_ptr<T[]> exact(size_t count) {
  return std::make_unique<T[]>(count);
}

double half_to_double(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double value =
      exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return bits >> 15 ? -value : value;
}

// One projection of one expert in the canonical format.
struct Stored {
  int bits, rows, columns, group_size;
  std::unique_ptr<uint8_t[]> packed, zero;
  std::unique_ptr<uint16_t[]> scale;

  Stored(int bits_, int rows_, int columns_, int group)
      : bits(bits_), rows(rows_), columns(columns_), group_size(group) {
    const size_t bytes = static_cast<size_t>(rows) * columns * bits / 8;
    const size_t groups = static_cast<size_t>(rows) * columns / group;
    packed = exact<uint8_t>(bytes);
    zero = exact<uint8_t>(groups);
    scale = exact<uint16_t>(groups);
    for (size_t i = 0; i < bytes; ++i) packed[i] = static_cast<uint8_t>(random_bits());
    for (size_t i = 0; i < groups; ++i) {
      zero[i] = static_cast<uint8_t>(random_bits());
      // About 1 / (2^bits * sqrt(columns)), of either sign.
      const int exponent = 15 - bits - static_cast<int>(std::log2(columns) / 2);
      scale[i] = static_cast<uint16_t>((below(2) << 15) | (exponent << 10) | below(1024));
    }
  }

  double weight(int row, int column) const {
    const size_t bit = (static_cast<size_t>(row) * columns + column) * bits;
    int code = 0;
    for (int i = 0; i < bits; ++i) code |= (packed[(bit + i) / 8] >> ((bit + i) % 8) & 1) << i;
    const size_t group = static_cast<size_t>(row) * (columns / group_size) + column / group_size;
    return half_to_double(scale[group]) * (code - zero[group] * std::ldexp(1.0, bits - 8));
  }
};

struct Case {
  int group_size, hidden, intermediate, experts, tokens, top_k;
  bool gated, alternating, int8, on_input, bias, remote;
};

// Largest difference, relative to the root mean square of the expected output.
double run(const Case& c) {
  static const int widths[] = {1, 2, 3, 4, 8};
  const int streams = c.gated ? 2 : 1, w13_rows = c.intermediate * streams;
  std::vector<Stored> w13, w2;
  auto layout = exact<int64_t>(4 * (2 + c.experts));
  const int64_t header[] = {0, c.group_size, c.hidden, c.intermediate, w13_rows, 0, 0, 0};
  std::copy_n(header, 8, layout.get());
  size_t bytes[2] = {0, 0};
  for (int e = 0; e < c.experts; ++e) {
    w13.emplace_back(widths[below(5)], w13_rows, c.hidden, c.group_size);
    w2.emplace_back(widths[below(5)], c.hidden, c.intermediate, c.group_size);
    layout[4 * (2 + e)] = w13.back().bits;
    layout[4 * (2 + e) + 2] = w2.back().bits;
    bytes[0] += streams * moeq_tiles_bytes(w13[e].bits, c.group_size, c.intermediate, c.hidden);
    bytes[1] += moeq_tiles_bytes(w2[e].bits, c.group_size, c.hidden, c.intermediate);
  }
  auto tiles13 = exact<uint8_t>(bytes[0]), tiles2 = exact<uint8_t>(bytes[1]);
  size_t at13 = 0, at2 = 0;
  for (int e = 0; e < c.experts; ++e) {
    const Stored &first = w13[e], &second = w2[e];
    for (int s = 0; s < streams; ++s)
      moeq_repack(
          first.bits, c.group_size, c.hidden, first.packed.get(), first.scale.get(),
          first.zero.get(), c.alternating ? s : s * c.intermediate, c.alternating ? 2 : 1,
          c.intermediate,
          tiles13.get() + at13 + s * moeq_tiles_bytes(first.bits, c.group_size, 1, c.hidden),
          streams);
    at13 += streams * moeq_tiles_bytes(first.bits, c.group_size, c.intermediate, c.hidden);
    moeq_repack(second.bits, c.group_size, c.intermediate, second.packed.get(), second.scale.get(),
                second.zero.get(), 0, 1, c.hidden, tiles2.get() + at2, 1);
    at2 += moeq_tiles_bytes(second.bits, c.group_size, c.hidden, c.intermediate);
  }

  auto x = exact<float>(static_cast<size_t>(c.tokens) * c.hidden);
  auto out = exact<float>(static_cast<size_t>(c.tokens) * c.hidden);
  auto weights = exact<float>(static_cast<size_t>(c.tokens) * c.top_k);
  auto ids = exact<int32_t>(static_cast<size_t>(c.tokens) * c.top_k);
  auto map = exact<int32_t>(2 * c.experts);
  auto bias13 = exact<float>(static_cast<size_t>(c.experts) * w13_rows);
  auto bias2 = exact<float>(static_cast<size_t>(c.experts) * c.hidden);
  for (int i = 0; i < c.tokens * c.hidden; ++i) x[i] = gaussian();
  for (int i = 0; i < c.tokens * c.top_k; ++i) weights[i] = 0.1f * (1 + below(9));
  const int global = c.remote ? 2 * c.experts : c.experts;
  for (int i = 0; i < c.tokens * c.top_k; ++i) ids[i] = below(global + 1) - 1;  // -1 is padding
  for (int i = 0; i < 2 * c.experts; ++i) map[i] = i % 2 ? -1 : c.experts - 1 - i / 2;
  for (int i = 0; i < c.experts * w13_rows; ++i) bias13[i] = gaussian();
  for (int i = 0; i < c.experts * c.hidden; ++i) bias2[i] = gaussian();
  const auto activation = c.alternating ? moeq::Activation::kSwigluOai
                          : c.gated     ? moeq::Activation::kSilu
                                        : moeq::Activation::kRelu2;
  const moeq::Call call{.x = x.get(),
                        .out = out.get(),
                        .router_weight = weights.get(),
                        .expert_ids = ids.get(),
                        .expert_map = c.remote ? map.get() : nullptr,
                        .w13 = tiles13.get(),
                        .w2 = tiles2.get(),
                        .w13_bias = c.bias ? bias13.get() : nullptr,
                        .w2_bias = c.bias ? bias2.get() : nullptr,
                        .layout = layout.get(),
                        .hidden_size = c.hidden,
                        .w13_bytes = static_cast<int64_t>(bytes[0]),
                        .w2_bytes = static_cast<int64_t>(bytes[1]),
                        .map_size = c.remote ? 2 * c.experts : 0,
                        .experts = c.experts,
                        .tokens = c.tokens,
                        .top_k = c.top_k,
                        .dtype = static_cast<int32_t>(moeq::DType::kFloat32),
                        .activation = static_cast<int32_t>(activation),
                        .int8 = c.int8,
                        .router_weight_on_input = c.on_input,
                        .swiglu_limit = 7.0f,
                        .swiglu_alpha = 1.702f,
                        .swiglu_beta = 1.0f};
  if (moeq_fused_experts(&call) != moeq::kOk) return INFINITY;

  double largest = 0, square = 0;
  for (int t = 0; t < c.tokens; ++t) {
    std::vector<double> expected(c.hidden, 0.0);
    for (int k = 0; k < c.top_k; ++k) {
      const int id = ids[t * c.top_k + k], e = id >= 0 && c.remote ? map[id] : id;
      if (e < 0) continue;
      const double weight = weights[t * c.top_k + k];
      std::vector<double> first(w13_rows), hidden(c.intermediate);
      for (int r = 0; r < w13_rows; ++r) {
        double sum = 0;
        for (int i = 0; i < c.hidden; ++i) sum += w13[e].weight(r, i) * x[t * c.hidden + i];
        first[r] = sum * (c.on_input ? weight : 1) + (c.bias ? bias13[e * w13_rows + r] : 0);
      }
      for (int i = 0; i < c.intermediate; ++i) {
        if (c.alternating) {
          const double gate = std::min(first[2 * i], 7.0);
          const double up = std::clamp(first[2 * i + 1], -7.0, 7.0);
          hidden[i] = (up + 1) * gate / (1 + std::exp(-1.702 * gate));
        } else if (c.gated) {
          hidden[i] = first[i] / (1 + std::exp(-first[i])) * first[c.intermediate + i];
        } else {
          hidden[i] = std::pow(std::max(first[i], 0.0), 2);
        }
      }
      for (int r = 0; r < c.hidden; ++r) {
        double sum = c.bias ? bias2[e * c.hidden + r] : 0;
        for (int i = 0; i < c.intermediate; ++i) sum += w2[e].weight(r, i) * hidden[i];
        expected[r] += sum * (c.on_input ? 1 : weight);
      }
    }
    for (int r = 0; r < c.hidden; ++r) {
      largest = std::max(largest, std::abs(out[t * c.hidden + r] - expected[r]));
      square += expected[r] * expected[r];
    }
  }
  const double scale = std::sqrt(square / (static_cast<double>(c.tokens) * c.hidden));
  return largest / std::max(scale, 1e-6);
}

// The same for a dense layer.
double run_linear(int group_size, bool int8) {
  const int columns = group_size * (1 + below(256 / group_size)), rows = 1 + below(200);
  const int tokens = below(8) ? 1 + below(14) : 90 + below(60), bits = below(2) ? 4 : 8;
  const Stored weight(bits, rows, columns, group_size);
  const int64_t bytes = moeq_tiles_bytes(bits, group_size, rows, columns);
  auto tiles = exact<uint8_t>(bytes);
  moeq_repack(bits, group_size, columns, weight.packed.get(), weight.scale.get(), weight.zero.get(),
              0, 1, rows, tiles.get(), 1);
  auto x = exact<float>(static_cast<size_t>(tokens) * columns), bias = exact<float>(rows);
  auto out = exact<float>(static_cast<size_t>(tokens) * rows);
  for (int i = 0; i < tokens * columns; ++i) x[i] = gaussian();
  for (int i = 0; i < rows; ++i) bias[i] = gaussian();
  const moeq::LinearCall call{.x = x.get(),
                              .out = out.get(),
                              .tiles = tiles.get(),
                              .bias = bias.get(),
                              .tiles_bytes = bytes,
                              .rows = rows,
                              .columns = columns,
                              .tokens = tokens,
                              .bits = bits,
                              .group_size = group_size,
                              .dtype = static_cast<int32_t>(moeq::DType::kFloat32),
                              .int8 = int8};
  if (moeq_linear(&call) != moeq::kOk) return INFINITY;
  double largest = 0, square = 0;
  for (int t = 0; t < tokens; ++t)
    for (int r = 0; r < rows; ++r) {
      double expected = bias[r];
      for (int i = 0; i < columns; ++i) expected += weight.weight(r, i) * x[t * columns + i];
      largest = std::max(largest, std::abs(out[t * rows + r] - expected));
      square += expected * expected;
    }
  return largest / std::sqrt(square / (static_cast<double>(tokens) * rows));
}

// Matrices [columns, rows] whose columns share grids [groups, rows], as GPTQ has them.
struct Rounded {
  int rows, columns, group_size, bits;
  std::unique_ptr<float[]> weights{}, codes{}, scale{}, zero{}, hessian{}, gradient{};

  double difference(int column, int row) const {
    const size_t place = static_cast<size_t>(column) * rows + row;
    const size_t grid = static_cast<size_t>(column / group_size) * rows + row;
    return (codes[place] - zero[grid]) * double{scale[grid]} - weights[place];
  }

  double product(int column, int row) const {
    double sum = 0;
    for (int i = 0; i < columns; ++i) sum += hessian[column * columns + i] * difference(i, row);
    return sum;
  }

  double objective() const {
    double sum = 0;
    for (int row = 0; row < rows; ++row)
      for (int i = 0; i < columns; ++i) sum += difference(i, row) * product(i, row);
    return sum;
  }
};

// Searches grids, takes the nearest codes, and refines both; returns what is left of the objective.
double run_rounding() {
  static const int widths[] = {1, 2, 3, 4, 8}, group_sizes[] = {32, 64, 128};
  Rounded r{1 + below(70), 8 * (1 + below(20)), group_sizes[below(3)], widths[below(5)]};
  const int rows = r.rows, columns = r.columns;
  const int groups = (columns + r.group_size - 1) / r.group_size;
  const float largest = static_cast<float>((1 << r.bits) - 1);
  const float unit = std::ldexp(1.0f, r.bits - 8), shares[] = {1.0f, 0.8f, 0.6f};
  const size_t size = static_cast<size_t>(rows) * columns;
  auto by_row = exact<float>(size), importance = exact<float>(columns);
  r.weights = exact<float>(size), r.codes = exact<float>(size), r.gradient = exact<float>(size);
  r.scale = exact<float>(static_cast<size_t>(groups) * rows);
  r.zero = exact<float>(static_cast<size_t>(groups) * rows);
  r.hessian = exact<float>(static_cast<size_t>(columns) * columns);
  for (int i = 0; i < columns; ++i) {
    for (int j = 0; j <= i; ++j) {
      const float entry = gaussian() * 0.3f + (i == j) * columns;
      r.hessian[i * columns + j] = r.hessian[j * columns + i] = entry;
    }
    importance[i] = r.hessian[i * columns + i];
    for (int row = 0; row < rows; ++row)
      by_row[row * columns + i] = r.weights[i * rows + row] = gaussian();
  }
  if (!moeq_search_grids(rows, columns, r.group_size, largest, unit, shares, 3, by_row.get(),
                         importance.get(), r.scale.get(), r.zero.get()))
    return INFINITY;
  for (int i = 0; i < columns; ++i)
    for (int row = 0; row < rows; ++row) {
      const size_t grid = static_cast<size_t>(i / r.group_size) * rows + row;
      const float steps = r.weights[i * rows + row] / r.scale[grid] + r.zero[grid];
      r.codes[i * rows + row] = std::min(std::max(std::nearbyint(steps), 0.0f), largest);
    }
  const double before = r.objective();
  for (int i = 0; i < columns; ++i)
    for (int row = 0; row < rows; ++row)
      r.gradient[i * rows + row] = static_cast<float>(r.product(i, row));
  moeq_refine(columns, rows, r.group_size, largest, unit, 4, r.hessian.get(), importance.get(),
              r.codes.get(), r.gradient.get(), r.scale.get(), r.zero.get());
  return r.objective() / before;
}

// Calls whose layout or expert ids are not true: each is refused before anything outside of the
// caller's tensors is read. Returns how many were not.
int run_lies() {
  constexpr int group_size = 32, hidden = 64, intermediate = 96, experts = 3, tokens = 2, top_k = 2;
  const int widths[] = {1, 3, 8};
  int64_t bytes[2] = {0, 0};
  for (const int bits : widths) {
    bytes[0] += 2 * moeq_tiles_bytes(bits, group_size, intermediate, hidden);
    bytes[1] += moeq_tiles_bytes(bits, group_size, hidden, intermediate);
  }
  int64_t layout[4 * (2 + experts)];
  int32_t ids[tokens * top_k], map[experts + 1];
  moeq::Call call;
  const auto w13 = exact<uint8_t>(bytes[0]), w2 = exact<uint8_t>(bytes[1]);
  const auto x = exact<float>(tokens * hidden), out = exact<float>(tokens * hidden);
  const auto weights = exact<float>(tokens * top_k);
  const auto bias = exact<float>(experts * 2 * intermediate);
  const auto tell_the_truth = [&] {
    const int64_t header[] = {0, group_size, hidden, intermediate, 2 * intermediate, 0, 0, 0};
    std::copy_n(header, 8, layout);
    for (int e = 0; e < experts; ++e) {
      const int64_t row[] = {widths[e], 0, widths[e], 0};
      std::copy_n(row, 4, layout + 4 * (2 + e));
      map[e] = e;
    }
    map[experts] = -1;
    for (int i = 0; i < tokens * top_k; ++i) ids[i] = i % experts;
    call = {.x = x.get(),
            .out = out.get(),
            .router_weight = weights.get(),
            .expert_ids = ids,
            .expert_map = map,
            .w13 = w13.get(),
            .w2 = w2.get(),
            .w13_bias = bias.get(),
            .w2_bias = nullptr,
            .layout = layout,
            .hidden_size = hidden,
            .w13_bytes = bytes[0],
            .w2_bytes = bytes[1],
            .map_size = experts + 1,
            .experts = experts,
            .tokens = tokens,
            .top_k = top_k,
            .dtype = static_cast<int32_t>(moeq::DType::kFloat32),
            .activation = static_cast<int32_t>(moeq::Activation::kSilu),
            .int8 = 0,
            .router_weight_on_input = 0,
            .swiglu_limit = 7.0f,
            .swiglu_alpha = 1.0f,
            .swiglu_beta = 0.0f};
  };
  int failures = 0;
  const auto expect = [&](const char* what, int64_t value, int32_t status) {
    const int32_t found = moeq_fused_experts(&call);
    if (found != status) {
      ++failures;
      std::printf("%s %lld: status %d, not %d\n", what, static_cast<long long>(value), found,
                  status);
    }
    tell_the_truth();
  };
  const auto lie = [&](const char* what, auto& place, std::initializer_list<int64_t> values,
                       int32_t status) {
    for (const int64_t value : values) {
      place = static_cast<std::remove_reference_t<decltype(place)>>(value);
      expect(what, value, status);
    }
  };
  constexpr int64_t huge = int64_t{1} << 60, wraps = int64_t{1} << 32;
  tell_the_truth();
  expect("the truth", 0, moeq::kOk);
  for (const int e : {0, experts - 1})
    for (const int projection : {0, 2})
      lie("width", layout[4 * (2 + e) + projection], {-1, 0, 5, 7, 16, wraps + 2, huge},
          moeq::kBadSizes);
  lie("wider than stored", layout[8], {2, 4, 8}, moeq::kBadSizes);
  lie("narrower than stored", layout[16], {1, 2, 4}, moeq::kBadSizes);
  lie("group size", layout[1], {-32, 0, 1, 16, 64, 128, 256, wraps + 32, huge}, moeq::kBadSizes);
  lie("hidden size", layout[2], {-64, 0, 32, 65, 128, wraps + 64, huge}, moeq::kBadSizes);
  lie("intermediate size", layout[3], {-96, 0, 32, 97, 192, wraps + 96, huge}, moeq::kBadSizes);
  lie("rows", layout[4], {0, 96, 191, 384, wraps + 192, huge}, moeq::kBadSizes);
  lie("bytes", call.w13_bytes, {0, 1, bytes[0] - 1, bytes[0] + 1}, moeq::kBadSizes);
  lie("bytes", call.w2_bytes, {0, 1, bytes[1] - 1, bytes[1] + 1}, moeq::kBadSizes);
  lie("experts", call.experts, {-1, 0, experts - 1, huge}, moeq::kBadSizes);
  lie("top k", call.top_k, {-1, huge}, moeq::kBadSizes);
  lie("id", ids[3], {experts + 1, 1 << 20, INT32_MAX}, moeq::kBadExpertId);
  lie("mapped to", map[1], {experts, 1 << 20, INT32_MAX}, moeq::kBadExpertId);
  lie("padding", ids[3], {-1, -2, INT32_MIN}, moeq::kOk);
  lie("of another rank", map[1], {-1, -7, INT32_MIN}, moeq::kOk);
  call.expert_map = nullptr;
  ids[0] = experts;
  expect("id without a map", experts, moeq::kBadExpertId);

  const int64_t tiles_bytes = moeq_tiles_bytes(4, group_size, 48, hidden);
  const auto tiles = exact<uint8_t>(tiles_bytes);
  const auto outputs = exact<float>(tokens * 48);
  const moeq::LinearCall truth{.x = x.get(),
                               .out = outputs.get(),
                               .tiles = tiles.get(),
                               .bias = nullptr,
                               .tiles_bytes = tiles_bytes,
                               .rows = 48,
                               .columns = hidden,
                               .tokens = tokens,
                               .bits = 4,
                               .group_size = group_size,
                               .dtype = static_cast<int32_t>(moeq::DType::kFloat32),
                               .int8 = 0};
  const auto linear = [&](const char* what, auto field, std::initializer_list<int64_t> values) {
    for (const int64_t value : values) {
      moeq::LinearCall lying = truth;
      lying.*field = static_cast<std::remove_reference_t<decltype(lying.*field)>>(value);
      if (moeq_linear(&lying) != moeq::kBadSizes) {
        ++failures;
        std::printf("a dense layer's %s %lld is not refused\n", what,
                    static_cast<long long>(value));
      }
    }
  };
  linear("width", &moeq::LinearCall::bits, {-4, 0, 5, 8, 16});
  linear("group size", &moeq::LinearCall::group_size, {-32, 0, 16, 48, 64, 256});
  linear("rows", &moeq::LinearCall::rows, {-48, 0, 65, wraps + 48, huge});
  linear("columns", &moeq::LinearCall::columns, {-64, 0, 32, 65, wraps + 64, huge});
  linear("bytes", &moeq::LinearCall::tiles_bytes, {0, tiles_bytes - 1, tiles_bytes + 1});
  return failures + (moeq_linear(&truth) != moeq::kOk);
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 60;
  int failures = run_lies();
  double worst[2] = {0, 0};
  for (int i = 0; i < cases; ++i) {
    static const int group_sizes[] = {32, 64, 128};
    Case c{};
    c.group_size = group_sizes[i % 3];
    c.hidden = c.group_size * (1 + below(256 / c.group_size));
    c.intermediate = c.group_size * (1 + below(256 / c.group_size));
    c.experts = 1 + below(5);
    c.tokens = i % 10 == 9 ? 60 + below(80) : 1 + below(14);
    c.top_k = 1 + below(3);
    c.gated = below(4) > 0;
    c.alternating = c.gated && below(3) == 0;
    c.int8 = below(3) == 0;
    c.on_input = below(4) == 0;
    c.bias = below(2);
    c.remote = below(3) == 0;
    const double error = std::max(run(c), run_linear(c.group_size, c.int8));
    const double left = run_rounding();
    if (!(left < 1 + 1e-4)) {
      ++failures;
      std::printf("case %d, rounding: %g of the objective is left\n", i, left);
    }
    const double limit = c.int8 ? 0.3 : 3e-3;
    worst[c.int8] = std::max(worst[c.int8], error);
    if (!(error < limit)) {
      ++failures;
      std::printf(
          "case %d, experts and a dense layer: error %g with group %d, hidden %d, intermediate %d, "
          "experts %d, tokens %d, "
          "top_k %d, gated %d, alternating %d, int8 %d, on_input %d, bias %d, remote %d\n",
          i, error, c.group_size, c.hidden, c.intermediate, c.experts, c.tokens, c.top_k, c.gated,
          c.alternating, c.int8, c.on_input, c.bias, c.remote);
    }
  }
  std::printf("%s: %d cases, %d failed; largest error %.1e, with int8 activations %.1e\n",
              moeq_isa(), cases, failures, worst[0], worst[1]);
  return failures != 0;
}

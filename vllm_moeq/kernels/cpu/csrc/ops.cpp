// The ops of torch on a CPU, without Python: calling the kernel through Python takes 20 to 200 us,
// the more of it is out of the cache, which a layer's weights have just gone through.
//
// What is not this kernel's, or cannot be right, goes to the same op in Python (op.py): it knows
// the other kernels, and says what is wrong.
//
// A library of its own: it is compiled for one release of torch, and needs its headers.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdlib>
#include <limits>
#include <optional>
#include <string_view>
#include <vector>

#include "moe.h"

namespace moeq {

// An activation that the kernel knows.
struct NamedActivation {
  char name[32];
  int32_t number;
  int32_t number_with_parameters;  // of its own, where a model chose some; -1 if it takes none
  float limit, alpha, beta;        // where a model chose none
};

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// What Python said.
struct Kernel {
  int64_t index = -1;  // in the dispatch table
  decltype(&moeq_fused_experts) fused_experts = nullptr;
  decltype(&moeq_linear) linear = nullptr;
  std::vector<NamedActivation> activations;

  const NamedActivation* activation(std::string_view name) const {
    for (const NamedActivation& one : activations)
      if (name == one.name) return &one;
    return nullptr;
  }
} kernel;

std::optional<int32_t> number_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return 0;
    case at::kBFloat16:
      return 1;
    case at::kHalf:
      return 2;
    default:
      return {};
  }
}

// Whether activations are 8-bit integers inside; nothing if the variable has a wrong value.
std::optional<bool> int8_activations() {
  const char* value = std::getenv("MOEQ_CPU_ACTIVATION");
  const std::string_view precision = value ? value : "";
  if (precision == "int8") return true;
  if (precision.empty() || precision == "int16") return false;
  return {};
}

// The numbers of a layout; null if they cannot be read as they are.
const int64_t* read_layout(const Tensor& layout) {
  const bool readable =
      layout.scalar_type() == at::kLong && layout.is_cpu() && layout.is_contiguous();
  return readable ? static_cast<const int64_t*>(layout.const_data_ptr()) : nullptr;
}

Tensor floats(const Tensor& tensor) { return tensor.to(at::kFloat).contiguous(); }

// In 32 bits; what does not fit stays too large, or below zero.
Tensor ids32(const Tensor& ids) {
  if (ids.scalar_type() == at::kInt) return ids.contiguous();
  return ids.to(at::kLong).clamp(-1, std::numeric_limits<int32_t>::max()).to(at::kInt).contiguous();
}

template <class T>
const T* address(const Tensor& tensor) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}

// The bias of `rows` outputs of each expert, null if there is none; false if it has another size.
bool read_bias(const MaybeTensor& bias, int64_t experts, int64_t rows, Tensor& out) {
  if (!bias) return true;
  if (bias->dim() != 2 || bias->size(0) != experts || bias->size(1) != rows) return false;
  out = floats(*bias);
  return true;
}

bool read_activation(std::string_view name, const std::optional<double> (&parameters)[3],
                     Call& call) {
  const NamedActivation* known = kernel.activation(name);
  if (!known) return false;
  call.activation = known->number;
  float* const values[] = {&call.swiglu_limit, &call.swiglu_alpha, &call.swiglu_beta};
  const float usual[] = {known->limit, known->alpha, known->beta};
  for (int i = 0; i < 3; ++i) {
    if (parameters[i] && known->number_with_parameters < 0) return false;
    *values[i] = static_cast<float>(parameters[i].value_or(usual[i]));
    if (*values[i] != usual[i]) call.activation = known->number_with_parameters;
  }
  return true;
}

MaybeTensor run_experts(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids,
                        at::TensorList weights, const MaybeTensor& w13_bias,
                        const MaybeTensor& w2_bias, const Tensor& layout,
                        const MaybeTensor& expert_map, std::string_view activation,
                        bool router_weight_on_input, const std::optional<double> (&parameters)[3]) {
  const auto dtype = number_of(x.scalar_type());
  const auto int8 = int8_activations();
  const int64_t* sizes = read_layout(layout);  // ExpertLayout.to_tensor()
  if (!sizes || layout.dim() != 2 || layout.size(0) < 2 || layout.size(1) != 4) return {};
  if (sizes[0] != kernel.index || !dtype || !int8 || weights.size() != 6) return {};
  if (x.dim() != 2 || topk_ids.dim() != 2 || topk_ids.sizes() != topk_weights.sizes() ||
      topk_ids.size(0) != x.size(0))
    return {};
  const int64_t experts = layout.size(0) - 2;
  Call call{};
  Tensor first_bias, second_bias;
  if (!read_activation(activation, parameters, call) ||
      !read_bias(w13_bias, experts, sizes[4], first_bias) ||
      !read_bias(w2_bias, experts, sizes[2], second_bias))
    return {};
  // Held here until the call is over: it has only their addresses.
  const Tensor tokens = x.contiguous(), router_weight = floats(topk_weights), ids = ids32(topk_ids);
  const Tensor map = expert_map ? ids32(*expert_map) : Tensor();
  Tensor out = at::empty(x.sizes(), x.options());
  call.x = tokens.const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.router_weight = address<float>(router_weight);
  call.expert_ids = address<int32_t>(ids);
  call.expert_map = address<int32_t>(map);
  call.w13 = address<uint8_t>(weights[0]);
  call.w2 = address<uint8_t>(weights[3]);
  call.w13_bias = address<float>(first_bias);
  call.w2_bias = address<float>(second_bias);
  call.layout = sizes;
  call.hidden_size = x.size(1);
  call.w13_bytes = static_cast<int64_t>(weights[0].nbytes());
  call.w2_bytes = static_cast<int64_t>(weights[3].nbytes());
  call.map_size = map.defined() ? map.numel() : 0;
  call.experts = experts;
  call.tokens = x.size(0);
  call.top_k = topk_ids.size(1);
  call.dtype = *dtype;
  call.int8 = *int8;
  call.router_weight_on_input = router_weight_on_input;
  if (kernel.fused_experts(&call) != kOk) return {};
  return out;
}

MaybeTensor run_linear(const Tensor& x, const Tensor& packed, const MaybeTensor& bias,
                       const Tensor& layout, int64_t rows) {
  const auto dtype = number_of(x.scalar_type());
  const auto int8 = int8_activations();
  const int64_t* sizes = read_layout(layout);  // LinearLayout
  if (!sizes || layout.dim() != 1 || layout.size(0) != 5) return {};
  if (sizes[4] != kernel.index || !dtype || !int8) return {};
  if (rows != sizes[2] || x.dim() < 1 || x.size(-1) != sizes[3] || sizes[3] == 0) return {};
  if (bias && (bias->dim() != 1 || bias->size(0) != rows)) return {};
  const Tensor tokens = x.contiguous(), row_bias = bias ? floats(*bias) : Tensor();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = rows;
  Tensor out = at::empty(shape, x.options());
  LinearCall call{};
  call.x = tokens.const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.tiles = address<uint8_t>(packed);
  call.bias = address<float>(row_bias);
  call.tiles_bytes = static_cast<int64_t>(packed.nbytes());
  call.rows = rows;
  call.columns = sizes[3];
  call.tokens = x.numel() / sizes[3];
  call.bits = static_cast<int32_t>(sizes[0]);
  call.group_size = static_cast<int32_t>(sizes[1]);
  call.dtype = *dtype;
  call.int8 = *int8;
  if (kernel.linear(&call) != kOk) return {};
  return out;
}

Tensor fused_experts(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids,
                     at::TensorList weights, const MaybeTensor& w13_bias,
                     const MaybeTensor& w2_bias, const Tensor& layout,
                     const MaybeTensor& expert_map, std::string_view activation,
                     bool router_weight_on_input, std::optional<double> limit,
                     std::optional<double> alpha, std::optional<double> beta) {
  if (const auto out =
          run_experts(x, topk_weights, topk_ids, weights, w13_bias, w2_bias, layout, expert_map,
                      activation, router_weight_on_input, {limit, alpha, beta}))
    return *out;
  static const auto in_python = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("moeq::fused_experts_in_python", "")
                                    .typed<decltype(fused_experts)>();
  return in_python.call(x, topk_weights, topk_ids, weights, w13_bias, w2_bias, layout, expert_map,
                        activation, router_weight_on_input, limit, alpha, beta);
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const MaybeTensor& bias,
              const Tensor& layout, int64_t rows) {
  if (const auto out = run_linear(x, packed, bias, layout, rows)) return *out;
  static const auto in_python = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("moeq::linear_in_python", "")
                                    .typed<decltype(linear)>();
  return in_python.call(x, packed, scale, bias, layout, rows);
}

}  // namespace
}  // namespace moeq

TORCH_LIBRARY_IMPL(moeq, CPU, library) {
  library.impl("fused_experts", &moeq::fused_experts);
  library.impl("linear", &moeq::linear);
}

// Use these functions for layouts with this index of a kernel. Not while an op runs, unless they
// are those in use.
MOEQ_EXPORT void moeq_use(int64_t index, decltype(&moeq_fused_experts) fused_experts,
                          decltype(&moeq_linear) linear, const moeq::NamedActivation* activations,
                          int64_t count) {
  if (moeq::kernel.index == index && moeq::kernel.fused_experts == fused_experts) return;
  moeq::kernel = {index, fused_experts, linear, {activations, activations + count}};
}

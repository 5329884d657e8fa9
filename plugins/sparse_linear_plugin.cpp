// SPDX-License-Identifier: Apache-2.0
#include "sparse_linear_plugin.h"

namespace lynx {
namespace {

// K: of the weight's columns, where x is but a half of its tensor.
int64_t channels_of(const SparseLinearAttributes& attributes, const Extents& x) {
  const bool half = Halves(attributes.halves) != Halves::kApart;
  return half && x.last() >= 0 ? x.last() / 2 : x.last();
}

template <Producer kProducer>
SparseLinearParams params_of(const SparseLinearAttributes& attributes,
                             const typename SparseLinearOp<kProducer>::Inputs& in, DType dtype) {
  SparseLinearParams params{};
  params.dtype = dtype;
  params.rows = in[kX].rows();
  params.channels = int(channels_of(attributes, in[kX]));
  params.out_channels = int(in[kWeight].at[0]);
  params.rank = attributes.rank;
  params.norm_scale = attributes.norm_scale != 0;
  params.activation = Activation(attributes.activation);
  params.activation_from = attributes.activation_from;
  params.producer = kProducer;
  params.producer_activation = Activation(attributes.producer_activation);
  params.halves = Halves(attributes.halves);
  params.rms = attributes.rms != 0;
  params.epsilon = attributes.epsilon;
  if constexpr (kProducer == Producer::kNorm) params.gain_rows = in[kFirst].rows();
  return params;
}

bool check_activation(const char* plugin, int32_t activation, int32_t from, int64_t out_channels) {
  if (activation == 0 || out_channels < 0) return true;
  if (from % kGeluMultiple == 0 && from < out_channels) return true;
  return refuse(plugin, "activation_from is " + std::to_string(from), "Rewrite the model with this version");
}

}  // namespace

template <Producer kProducer>
bool SparseLinearOp<kProducer>::check_attributes(const Attributes& a) {
  const char* const name = SparseLinearOp::kName;
  if (a.rank < 0 || a.rank > kMaxRank || a.rank % kRankMultiple != 0) {
    return refuse(name, "rank is " + std::to_string(a.rank),
                  "Use 0 or a multiple of 16 up to " + std::to_string(kMaxRank));
  }
  for (const int32_t flag : {a.norm_scale, a.rms}) {
    if (flag != 0 && flag != 1) {
      return refuse(name, "a flag is " + std::to_string(flag), "Use 0 or 1 for norm_scale and rms");
    }
  }
  if (a.activation < 0 || a.activation > int32_t(Activation::kGeluErf)) {
    return refuse(name, "activation is " + std::to_string(a.activation), kActivations);
  }
  const Activation most = kProducer == Producer::kGated ? Activation::kSilu : Activation::kGeluErf;
  if (a.producer_activation < 1 || a.producer_activation > int32_t(most)) {
    return refuse(name, "producer_activation is " + std::to_string(a.producer_activation),
                  "Use 1 for GELU (tanh), 2 for GELU (erf), or for a gate 3 for SiLU");
  }
  if (a.halves < 0 || a.halves > int32_t(Halves::kGateFirst)) {
    return refuse(name, "halves is " + std::to_string(a.halves),
                  "Use 0 for x and gate apart, 1 for x in the first half, 2 for the gate");
  }
  if (a.activation_from < 0) {
    return refuse(name, "activation_from is " + std::to_string(a.activation_from), "Use 0 or more");
  }
  if (!(a.epsilon > 0.0f)) return refuse(name, "epsilon is not positive", "Rewrite the model");
  return true;
}

template <Producer kProducer>
bool SparseLinearOp<kProducer>::check_shapes(const Attributes& attributes, const Inputs& in) {
  const char* const name = SparseLinearOp::kName;
  for (const int32_t i : {int32_t(kWeight), int32_t(kLoraDown)}) {
    if (in[size_t(i)].count != 2) {
      return refuse(name, std::string(SparseLinearOp::kInputNames[i]) + " is not a matrix",
                    "Rewrite the model");
    }
  }
  if (in[kBias].count != 1) return refuse(name, "bias is not a vector", "Rewrite the model");
  const int64_t channels = channels_of(attributes, in[kX]), out_channels = in[kWeight].at[0];
  if (in[kX].last() >= 0 && attributes.halves != 0 && in[kX].last() % 2 != 0) {
    return refuse(name, "x has no halves", "Rewrite the model with this version of lynx-compile");
  }
  if (channels >= 0 && (channels == 0 || channels % kBlock != 0)) {
    return refuse(name, "x has " + std::to_string(channels) + " channels, not a multiple of 16",
                  "Keep this linear dense");
  }
  if (out_channels >= 0 && (out_channels == 0 || out_channels % 8 != 0)) {
    return refuse(name, "weight has " + std::to_string(out_channels) + " rows, not a multiple of 8",
                  "Keep this linear dense");
  }
  const int64_t width = channels < 0 ? -1 : padded_width(channels, attributes.rank);
  const int64_t rank_rows = attributes.rank > 0 ? attributes.rank : 1;
  bool ok = check_extent(name, "weight", "columns", in[kWeight].at[1], width) &&
            check_extent(name, "lora_down", "rows", in[kLoraDown].at[0], rank_rows) &&
            check_extent(name, "lora_down", "columns", in[kLoraDown].at[1], channels) &&
            check_extent(name, "bias", "elements", in[kBias].at[0], out_channels) &&
            check_activation(name, attributes.activation, attributes.activation_from, out_channels);
  if constexpr (kProducer == Producer::kNorm) {
    const int64_t rows = in[kX].rows(), gain_rows = in[kFirst].rows();
    ok = ok && check_extent(name, "gain", "channels", in[kFirst].last(), channels) &&
         check_extent(name, "shift", "channels", in[kSecond].last(), channels) &&
         check_extent(name, "shift", "rows", in[kSecond].rows(), gain_rows);
    if (ok && rows > 0 && gain_rows >= 0 && (gain_rows == 0 || rows % gain_rows != 0)) {
      return refuse(name,
                    "gain has " + std::to_string(gain_rows) + " rows for " + std::to_string(rows) + " tokens",
                    "Rewrite the model with this version of lynx-compile");
    }
  }
  if constexpr (kProducer == Producer::kGated) {
    ok = ok && check_extent(name, "gate", "channels", in[kFirst].last(), in[kX].last()) &&
         check_extent(name, "gate", "rows", in[kFirst].rows(), in[kX].rows());
  }
  return ok;
}

template <Producer kProducer>
bool SparseLinearOp<kProducer>::check_device(const Attributes&, DType dtype) {
  InstructionSet set;
  if (choose_instructions(dtype, &set) != cudaErrorNotSupported) return true;
  return refuse(SparseLinearOp::kName,
                std::string("this GPU does not run the plugin's ") + traits_of(dtype).name + " kernels",
                "Use one of compute capability 8.0 or later");
}

template <Producer kProducer>
size_t SparseLinearOp<kProducer>::workspace(const Attributes& attributes, const Inputs& in, DType dtype) {
  return workspace_bytes(params_of<kProducer>(
      attributes, in, dtype));  // for any GPU: engines may run on others than the one they were built on
}

template <Producer kProducer>
cudaError_t SparseLinearOp<kProducer>::launch(const Attributes& attributes, const Inputs& in, DType dtype,
                                              const void* const* inputs, void* y, void* workspace, int tile,
                                              cudaStream_t stream) {
  SparseLinearParams params = params_of<kProducer>(attributes, in, dtype);
  params.x = inputs[kX];
  params.weight = inputs[kWeight];
  params.lora_down = inputs[kLoraDown];
  params.bias = inputs[kBias];
  if constexpr (kProducer == Producer::kNorm) params.gain = inputs[kFirst], params.shift = inputs[kSecond];
  if constexpr (kProducer == Producer::kGated) params.gate = inputs[kFirst];
  params.y = y;
  params.workspace = workspace;
  return launch_sparse_linear(params, tile, stream);
}

template struct SparseLinearOp<Producer::kNone>;
template struct SparseLinearOp<Producer::kNorm>;
template struct SparseLinearOp<Producer::kGelu>;
template struct SparseLinearOp<Producer::kGated>;

}  // namespace lynx

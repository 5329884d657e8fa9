// SPDX-License-Identifier: Apache-2.0
#include "sparse_linear_plugin.h"

namespace lynx {
namespace {

template <Producer kProducer>
SparseLinearParams params_of(const SparseLinearAttributes& attributes,
                             const typename SparseLinearOp<kProducer>::Inputs& in, DType dtype) {
  SparseLinearParams params{};
  params.dtype = dtype;
  params.rows = in[kX].rows();
  params.channels = int(channels_of(attributes.producer, in[kX]));
  params.out_channels = int(in[kWeight].at[0]);
  params.rank = attributes.rank;
  params.norm_scale = attributes.norm_scale != 0;
  params.activation = Activation(attributes.activation);
  params.activation_from = attributes.activation_from;
  set_producer_sizes<kProducer>(params, attributes.producer, in, kFirst);
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
  if (a.norm_scale != 0 && a.norm_scale != 1) {
    return refuse(name, "norm_scale is " + std::to_string(a.norm_scale), "Use 0 or 1");
  }
  if (a.activation < 0 || a.activation > int32_t(Activation::kGeluErf)) {
    return refuse(name, "activation is " + std::to_string(a.activation), kActivations);
  }
  if (a.activation_from < 0) {
    return refuse(name, "activation_from is " + std::to_string(a.activation_from), "Use 0 or more");
  }
  return check_producer(name, kProducer, a.producer);
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
  const int64_t channels = channels_of(attributes.producer, in[kX]), out_channels = in[kWeight].at[0];
  if (!check_halves(name, attributes.producer, in[kX])) return false;
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
  return check_extent(name, "weight", "columns", in[kWeight].at[1], width) &&
         check_extent(name, "lora_down", "rows", in[kLoraDown].at[0], rank_rows) &&
         check_extent(name, "lora_down", "columns", in[kLoraDown].at[1], channels) &&
         check_extent(name, "bias", "elements", in[kBias].at[0], out_channels) &&
         check_activation(name, attributes.activation, attributes.activation_from, out_channels) &&
         check_producer_shapes<kProducer>(name, in, kFirst, channels);
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
  set_producer_inputs<kProducer>(params, inputs, kFirst);
  params.y = y;
  params.workspace = workspace;
  return launch_sparse_linear(params, tile, stream);
}

template struct SparseLinearOp<Producer::kNone>;
template struct SparseLinearOp<Producer::kNorm>;
template struct SparseLinearOp<Producer::kGelu>;
template struct SparseLinearOp<Producer::kGated>;

}  // namespace lynx

// SPDX-License-Identifier: Apache-2.0
#include "fp8_plugin.h"

#include "kernels/fp8.h"
#include "kernels/fp8_gemm.h"

namespace lynx {
namespace {

constexpr int kWord = 4;  // values

template <bool kSparseWeight>
Fp8Operand operand_of(const Fp8Attributes& attributes) {
  if (kSparseWeight) return Fp8Operand::kSparseWeight;
  return attributes.prune ? Fp8Operand::kSparseActivation : Fp8Operand::kDense;
}

template <bool kSparseWeight, Producer kProducer>
Fp8LinearParams params_of(const Fp8Attributes& attributes,
                          const typename Fp8Op<kSparseWeight, kProducer>::Inputs& in, DType dtype) {
  using Op = Fp8Op<kSparseWeight, kProducer>;
  Fp8LinearParams params{};
  params.dtype = dtype;
  params.operand = operand_of<kSparseWeight>(attributes);
  params.rows = in[kX].rows();
  params.channels = int(channels_of(attributes.producer, in[kX]));
  params.out_channels = kSparseWeight ? attributes.out_channels : int(in[Op::kValues].at[0]);
  params.activation = Activation(attributes.activation);
  params.activation_from = attributes.activation_from;
  params.gated = attributes.gated != 0;
  set_producer_sizes<kProducer>(params, attributes.producer, in, Op::kFirst);
  return params;
}

bool check_out_channels(const char* plugin, const char* what, const Fp8Attributes& a, int64_t out_channels) {
  if (out_channels <= 0 || out_channels % 8 != 0) {
    return refuse(plugin, std::string(what) + " " + std::to_string(out_channels) + ", not a multiple of 8",
                  "Keep this linear dense");
  }
  if (a.activation && (a.activation_from % kGeluMultiple != 0 || a.activation_from >= out_channels)) {
    return refuse(plugin, "activation_from is " + std::to_string(a.activation_from),
                  "Rewrite the model with this version of lynx-compile");
  }
  if (a.gated && (out_channels - a.activation_from) % kGatedMultiple != 0) {
    return refuse(plugin, "gated rows are " + std::to_string(out_channels - a.activation_from),
                  "Rewrite the model with this version of lynx-compile");
  }
  return true;
}

bool check_channels(const char* plugin, int64_t channels) {
  if (channels == 0 || channels % kBlock != 0) {
    return refuse(plugin, "x has " + std::to_string(channels) + " channels, not a multiple of 16",
                  "Keep this linear dense");
  }
  if (channels <= kMaxFp8Channels) return true;
  return refuse(plugin, "x has " + std::to_string(channels) + " channels",
                "The kernels take up to " + std::to_string(kMaxFp8Channels) + ": keep this linear dense");
}

}  // namespace

template <bool kSparseWeight, Producer kProducer>
bool Fp8Op<kSparseWeight, kProducer>::check_attributes(const Attributes& a) {
  const char* const name = Fp8Op::kName;
  for (const int32_t flag : {a.prune, a.gated}) {
    if (flag != 0 && flag != 1) {
      return refuse(name, "a flag is " + std::to_string(flag), "Use 0 or 1 for prune and gated");
    }
  }
  const Activation most = a.gated ? Activation::kSilu : Activation::kGeluErf;
  if (a.activation < a.gated || a.activation > int32_t(most)) {
    return refuse(name, "activation is " + std::to_string(a.activation), kActivations);
  }
  if (a.activation_from < 0) {
    return refuse(name, "activation_from is " + std::to_string(a.activation_from), "Use 0 or more");
  }
  if (!check_producer(name, kProducer, a.producer)) return false;
  return !kSparseWeight || check_out_channels(name, "out_channels is", a, a.out_channels);
}

template <bool kSparseWeight, Producer kProducer>
bool Fp8Op<kSparseWeight, kProducer>::check_shapes(const Attributes& attributes, const Inputs& in) {
  const char* const name = Fp8Op::kName;
  if (in[kValues].count != 2) {
    return refuse(name, std::string(Fp8Op::kInputNames[kValues]) + " is not a matrix", "Rewrite the model");
  }
  if (kSparseWeight && in[kMetadata].count != 3)
    return refuse(name, "metadata has not 3 dimensions", "Rewrite the model");
  if (in[kScale].count != 1) return refuse(name, "weight_scale is not a vector", "Rewrite the model");
  if (in[kBias].count != 1) return refuse(name, "bias is not a vector", "Rewrite the model");
  if (!check_halves(name, attributes.producer, in[kX])) return false;
  const int64_t channels = channels_of(attributes.producer, in[kX]);
  const int64_t width = channels < 0 ? -1 : fp8_width(channels);
  if (channels >= 0 && !check_channels(name, channels)) return false;
  const int64_t out_channels = kSparseWeight ? attributes.out_channels : in[kValues].at[0];
  if (!kSparseWeight && out_channels >= 0 &&
      !check_out_channels(name, "the rows of weight are", attributes, out_channels)) {
    return false;
  }
  const auto part = [&](int64_t divisor) { return width < 0 ? -1 : width / divisor; };
  bool ok = check_extent(name, "weight_scale", "elements", in[kScale].at[0], out_channels) &&
            check_extent(name, "bias", "elements", in[kBias].at[0], out_channels);
  if constexpr (kSparseWeight) {
    const int64_t rows = padded_rows(out_channels);
    ok = ok && check_extent(name, "values", "rows", in[kValues].at[0], rows) &&
         check_extent(name, "values", "columns", in[kValues].at[1], part(2 * kWord)) &&
         check_extent(name, "metadata", "steps of 128 channels", in[kMetadata].at[0], part(kFp8Step)) &&
         check_extent(name, "metadata", "rows", in[kMetadata].at[1], rows) &&
         check_extent(name, "metadata", "words", in[kMetadata].at[2], 4);
  } else {
    ok = ok && check_extent(name, "weight", "columns", in[kValues].at[1], part(kWord));
  }
  return ok && check_producer_shapes<kProducer>(name, in, kFirst, channels);
}

template <bool kSparseWeight, Producer kProducer>
bool Fp8Op<kSparseWeight, kProducer>::check_device(const Attributes&, DType dtype) {
  if (fp8_runs(dtype) != cudaErrorNotSupported) return true;
  return refuse(Fp8Op::kName, "this GPU does not run the plugin's FP8 kernels",
                "Use one of compute capability 8.9, 9.0 or 12.x, or compile without FP8");
}

template <bool kSparseWeight, Producer kProducer>
int Fp8Op<kSparseWeight, kProducer>::tactics(const Attributes& attributes, DType dtype) {
  return fp8_tactics(dtype, operand_of<kSparseWeight>(attributes));
}

template <bool kSparseWeight, Producer kProducer>
int Fp8Op<kSparseWeight, kProducer>::most_tactics(const Attributes& attributes) {
  return fp8_tile_count(operand_of<kSparseWeight>(attributes));
}

template <bool kSparseWeight, Producer kProducer>
size_t Fp8Op<kSparseWeight, kProducer>::workspace(const Attributes& attributes, const Inputs& in,
                                                  DType dtype) {
  return fp8_workspace_bytes(params_of<kSparseWeight, kProducer>(attributes, in, dtype));
}

template <bool kSparseWeight, Producer kProducer>
cudaError_t Fp8Op<kSparseWeight, kProducer>::launch(const Attributes& attributes, const Inputs& in,
                                                    DType dtype, const void* const* inputs, void* y,
                                                    void* workspace, int tile, cudaStream_t stream) {
  Fp8LinearParams params = params_of<kSparseWeight, kProducer>(attributes, in, dtype);
  params.x = inputs[kX];
  params.weight = inputs[kValues];
  if constexpr (kSparseWeight) params.metadata = static_cast<const uint32_t*>(inputs[kMetadata]);
  params.weight_scale = static_cast<const float*>(inputs[kScale]);
  params.bias = inputs[kBias];
  set_producer_inputs<kProducer>(params, inputs, kFirst);
  params.y = y;
  params.workspace = workspace;
  return launch_fp8_linear(params, tile, stream);
}

template struct Fp8Op<false, Producer::kNone>;
template struct Fp8Op<false, Producer::kNorm>;
template struct Fp8Op<false, Producer::kGelu>;
template struct Fp8Op<false, Producer::kGated>;
template struct Fp8Op<true, Producer::kNone>;
template struct Fp8Op<true, Producer::kNorm>;
template struct Fp8Op<true, Producer::kGelu>;
template struct Fp8Op<true, Producer::kGated>;

}  // namespace lynx

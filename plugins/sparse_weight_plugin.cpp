// SPDX-License-Identifier: Apache-2.0
#include "sparse_weight_plugin.h"

namespace lynx {
namespace {

InstructionSet reader_of(const SparseWeightAttributes& attributes) {
  return lynx::reader_of(attributes.metadata_layout)->set;  // check_attributes has seen to it
}

SparseWeightParams params_of(const SparseWeightAttributes& attributes, const SparseWeightOp::Inputs& in,
                             DType dtype) {
  SparseWeightParams params{};
  params.dtype = dtype;
  params.rows = in[kX].rows();
  params.channels = int(in[kX].last());
  params.out_channels = attributes.out_channels;
  params.activation = Activation(attributes.activation);
  params.activation_from = attributes.activation_from;
  params.gated = attributes.gated != 0;
  params.set = reader_of(attributes);
  return params;
}

}  // namespace

bool SparseWeightOp::check_attributes(const Attributes& a) {
  if (a.out_channels <= 0 || a.out_channels % 8 != 0) {
    return refuse(kName, "out_channels is " + std::to_string(a.out_channels) + ", not a multiple of 8",
                  "Keep this linear dense");
  }
  if (lynx::reader_of(a.metadata_layout) == nullptr) {
    return refuse(kName, "metadata_layout is " + std::to_string(a.metadata_layout),
                  "Rewrite the model with this version of lynx-compile");
  }
  const Activation most = a.gated ? Activation::kSilu : Activation::kGeluErf;
  if (a.gated != 0 && a.gated != 1) return refuse(kName, "gated is " + std::to_string(a.gated), "Use 0 or 1");
  if (a.activation < a.gated || a.activation > int32_t(most)) {
    return refuse(kName, "activation is " + std::to_string(a.activation), kActivations);
  }
  const bool from_fits = a.activation_from >= 0 && a.activation_from < a.out_channels;
  if (a.activation && (!from_fits || a.activation_from % kGeluMultiple != 0)) {
    return refuse(kName, "activation_from is " + std::to_string(a.activation_from),
                  "Rewrite the model with this version of lynx-compile");
  }
  if (a.gated && (a.out_channels - a.activation_from) % kGatedMultiple != 0) {
    return refuse(kName, "gated rows are " + std::to_string(a.out_channels - a.activation_from),
                  "Rewrite the model with this version of lynx-compile");
  }
  return true;
}

bool SparseWeightOp::check_shapes(const Attributes& attributes, const Inputs& in) {
  if (in[kValues].count != 2) return refuse(kName, "values is not a matrix", "Rewrite the model");
  if (in[kMetadata].count != 3) return refuse(kName, "metadata has not 3 dimensions", "Rewrite the model");
  if (in[kWeightBias].count != 1) return refuse(kName, "bias is not a vector", "Rewrite the model");
  const int64_t channels = in[kX].last(), rows = padded_rows(attributes.out_channels);
  if (channels >= 0 && (channels == 0 || channels % kWidthMultiple != 0)) {
    return refuse(kName, "x has " + std::to_string(channels) + " channels, not a multiple of 64",
                  "Keep this linear dense");
  }
  const int64_t half = channels < 0 ? -1 : channels / 2, steps = channels < 0 ? -1 : channels / 64;
  return check_extent(kName, "values", "rows", in[kValues].at[0], rows) &&
         check_extent(kName, "values", "columns", in[kValues].at[1], half) &&
         check_extent(kName, "metadata", "steps of 64 channels", in[kMetadata].at[0], steps) &&
         check_extent(kName, "metadata", "blocks of 64 rows", in[kMetadata].at[1], rows / 64) &&
         check_extent(kName, "metadata", "words", in[kMetadata].at[2], 128) &&
         check_extent(kName, "bias", "elements", in[kWeightBias].at[0], attributes.out_channels);
}

// A weight can only be multiplied by the kernels that read its metadata layout.
bool SparseWeightOp::check_device(const Attributes& attributes, DType dtype) {
  const std::string layout = "metadata_layout is " + std::to_string(attributes.metadata_layout);
  if (!lynx::holds(reader_of(attributes), dtype)) {
    return refuse(
        kName,
        layout + ", and the plugin library was built without its " + traits_of(dtype).name + " kernels",
        "Build it for all GPUs and types, or rewrite the model for the other layout");
  }
  if (check_runs(reader_of(attributes), dtype) != cudaErrorNotSupported) return true;
  return refuse(kName, layout + ", which this GPU does not read",
                "Rewrite the model for this GPU: 90 is for sm_90 alone, 80 for any from sm_80 on");
}

int SparseWeightOp::tactics(const Attributes& attributes, DType dtype) {
  const InstructionSet set = reader_of(attributes);
  return check_runs(set, dtype) == cudaSuccess ? tile_count(set) : 0;
}

size_t SparseWeightOp::workspace(const Attributes& attributes, const Inputs& in, DType dtype) {
  return weight_workspace_bytes(params_of(attributes, in, dtype));
}

cudaError_t SparseWeightOp::launch(const Attributes& attributes, const Inputs& in, DType dtype,
                                   const void* const* inputs, void* y, void* workspace, int tile,
                                   cudaStream_t stream) {
  SparseWeightParams params = params_of(attributes, in, dtype);
  params.x = inputs[kX];
  params.values = inputs[kValues];
  params.metadata = static_cast<const uint32_t*>(inputs[kMetadata]);
  params.bias = inputs[kWeightBias];
  params.y = y;
  params.workspace = workspace;
  return launch_sparse_weight_linear(params, tile, stream);
}

}  // namespace lynx

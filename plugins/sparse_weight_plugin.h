// SPDX-License-Identifier: Apache-2.0
// The TensorRT side of LynxSparseWeightLinear: y = act(x W_s^T + bias), W_s 2:4 and compressed at compile
// time.
#pragma once

#include "kernels/sparse_linear.h"
#include "plugin.h"

namespace lynx {

struct SparseWeightAttributes {
  int32_t out_channels = 0;     // N; values have it padded
  int32_t metadata_layout = 0;  // 80: mma.sp's, for any GPU; 90: wgmma.sp's, for sm_90 alone
  int32_t activation = 0;       // of the output: 0: none, 1: GELU (tanh), 2: GELU (erf), 3: SiLU
  int32_t activation_from = 0;  // first row of the weight that it applies to
  int32_t gated = 0;            // 1: in runs of 16 rows, to the first 8, which the other 8 multiply
};

enum SparseWeightInput : int32_t { kValues = 1, kMetadata, kWeightBias };

struct SparseWeightOp {
  static constexpr char kName[] = "LynxSparseWeightLinear";
  static constexpr const char* kInputNames[] = {"x", "values", "metadata", "bias"};
  using Attributes = SparseWeightAttributes;
  static constexpr auto kInt = nvinfer1::PluginFieldType::kINT32;
  static constexpr AttributeField kFields[] = {
      {"out_channels", kInt, offsetof(Attributes, out_channels)},
      {"metadata_layout", kInt, offsetof(Attributes, metadata_layout)},
      {"activation", kInt, offsetof(Attributes, activation)},
      {"activation_from", kInt, offsetof(Attributes, activation_from)},
      {"gated", kInt, offsetof(Attributes, gated)},
  };
  static constexpr size_t kFieldCount = sizeof kFields / sizeof kFields[0];
  using Inputs = std::array<Extents, 4>;

  // Channels of y: two rows of a gated weight make one.
  static int32_t y_channels(const Attributes& a) {
    return a.gated ? a.activation_from + (a.out_channels - a.activation_from) / 2 : a.out_channels;
  }
  static bool check_attributes(const Attributes& attributes);
  static bool check_shapes(const Attributes& attributes, const Inputs& in);
  static bool check_device(const Attributes& attributes, DType dtype);
  static nvinfer1::DataType input_type(int32_t input, nvinfer1::DataType x) {
    return input == kMetadata ? nvinfer1::DataType::kINT32 : x;
  }
  static const nvinfer1::IDimensionExpr* output_channels(const Attributes& attributes,
                                                         const nvinfer1::DimsExprs*,
                                                         nvinfer1::IExprBuilder& builder) {
    return builder.constant(y_channels(attributes));
  }
  static constexpr char kKernels[] = "", kArchitectures[] = "", kSetting[] = "model.dtype";
  static bool holds(DType dtype) { return lynx::holds(dtype); }
  static int tactics(const Attributes& attributes, DType dtype);
  static int most_tactics(const Attributes&) { return most_tile_count(); }
  static size_t workspace(const Attributes& attributes, const Inputs& in, DType dtype);
  static cudaError_t launch(const Attributes& attributes, const Inputs& in, DType dtype,
                            const void* const* inputs, void* y, void* workspace, int tile,
                            cudaStream_t stream);
};

}  // namespace lynx

// SPDX-License-Identifier: Apache-2.0
// The TensorRT side of LynxFp8Linear and LynxFp8SparseWeightLinear, y = act(s_x s_w (x_q W_q^T) + bias), and
// of their variants that make x themselves. TensorRT knows nothing of FP8: x comes and y goes in 16 bits, and
// e4m3 values of the weight come four to an int32.
#pragma once

#include "kernels/fp8_linear.h"
#include "producer_plugin.h"

namespace lynx {

struct Fp8Attributes {
  int32_t prune = 0;         // LynxFp8Linear: 1: x becomes 2:4
  int32_t out_channels = 0;  // LynxFp8SparseWeightLinear: N; values have it padded
  int32_t activation = 0;    // of the output: 0: none, 1: GELU (tanh), 2: GELU (erf), 3: SiLU, of gated ones
  int32_t activation_from = 0;  // first row of the weight that it applies to
  int32_t gated = 0;            // 1: in runs of 16 rows, to the first 8, which the other 8 multiply
  ProducerAttributes producer;
};

// Names, and inputs in the order of the op: behind the weight's come those of the producer.
template <bool kSparseWeight, Producer kProducer>
struct Fp8Names;

#define LYNX_FP8_NAMES(sparse_weight, producer, name, ...)           \
  template <>                                                        \
  struct Fp8Names<sparse_weight, producer> {                         \
    static constexpr char kName[] = name;                            \
    static constexpr const char* kInputNames[] = {"x", __VA_ARGS__}; \
  }
LYNX_FP8_NAMES(false, Producer::kNone, "LynxFp8Linear", "weight", "weight_scale", "bias");
LYNX_FP8_NAMES(false, Producer::kNorm, "LynxNormFp8Linear", "weight", "weight_scale", "bias", "gain",
               "shift");
LYNX_FP8_NAMES(false, Producer::kGelu, "LynxGeluFp8Linear", "weight", "weight_scale", "bias");
LYNX_FP8_NAMES(false, Producer::kGated, "LynxGatedFp8Linear", "weight", "weight_scale", "bias", "gate");
LYNX_FP8_NAMES(true, Producer::kNone, "LynxFp8SparseWeightLinear", "values", "metadata", "weight_scale",
               "bias");
LYNX_FP8_NAMES(true, Producer::kNorm, "LynxNormFp8SparseWeightLinear", "values", "metadata", "weight_scale",
               "bias", "gain", "shift");
LYNX_FP8_NAMES(true, Producer::kGelu, "LynxGeluFp8SparseWeightLinear", "values", "metadata", "weight_scale",
               "bias");
LYNX_FP8_NAMES(true, Producer::kGated, "LynxGatedFp8SparseWeightLinear", "values", "metadata", "weight_scale",
               "bias", "gate");
#undef LYNX_FP8_NAMES

template <bool kSparseWeight, Producer kProducer>
struct Fp8Op : Fp8Names<kSparseWeight, kProducer> {
  using Attributes = Fp8Attributes;
  using OfProducer = ProducerFields<Attributes, kProducer>;
  static constexpr auto kInt = nvinfer1::PluginFieldType::kINT32;
  static constexpr AttributeField kOwn =
      kSparseWeight ? AttributeField{"out_channels", kInt, offsetof(Attributes, out_channels)}
                    : AttributeField{"prune", kInt, offsetof(Attributes, prune)};
  static constexpr AttributeField kFields[] = {
      kOwn,
      {"activation", kInt, offsetof(Attributes, activation)},
      {"activation_from", kInt, offsetof(Attributes, activation_from)},
      {"gated", kInt, offsetof(Attributes, gated)},
      OfProducer::kFirst,
      OfProducer::kSecond,
  };
  static constexpr size_t kFieldCount = 4 + OfProducer::kCount;

  static constexpr int32_t kValues = 1, kMetadata = 2;  // kValues: all of a dense weight
  static constexpr int32_t kScale = kSparseWeight ? 3 : 2, kBias = kScale + 1;
  static constexpr int32_t kFirst = kScale + 2;  // of the producer
  using Inputs =
      std::array<Extents, sizeof(Fp8Names<kSparseWeight, kProducer>::kInputNames) / sizeof(const char*)>;

  // Channels of y: two rows of a gated weight make one.
  static constexpr int64_t y_channels(const Attributes& a, int64_t rows) {
    return a.gated ? a.activation_from + (rows - a.activation_from) / 2 : rows;
  }
  static bool check_attributes(const Attributes& attributes);
  static bool check_shapes(const Attributes& attributes, const Inputs& in);
  static bool check_device(const Attributes& attributes, DType dtype);
  static constexpr char kKernels[] = "FP8 kernels for ";
  static constexpr char kArchitectures[] = "90a in LYNX_CUDA_ARCHITECTURES and ";
  static constexpr char kSetting[] = "sparsity.precision";
  static bool holds(DType dtype) { return holds_fp8(dtype); }
  static nvinfer1::DataType input_type(int32_t input, nvinfer1::DataType x) {
    if (input == kScale) return nvinfer1::DataType::kFLOAT;
    return input == kValues || (kSparseWeight && input == kMetadata) ? nvinfer1::DataType::kINT32 : x;
  }
  static const nvinfer1::IDimensionExpr* output_channels(const Attributes& attributes,
                                                         const nvinfer1::DimsExprs* inputs,
                                                         nvinfer1::IExprBuilder& builder) {
    if (kSparseWeight) return builder.constant(y_channels(attributes, attributes.out_channels));
    const auto* const rows = inputs[kValues].d[0];  // of a weight: constant
    return attributes.gated ? builder.constant(y_channels(attributes, rows->getConstantValue())) : rows;
  }
  static int tactics(const Attributes& attributes, DType dtype);
  static int most_tactics(const Attributes& attributes);
  static size_t workspace(const Attributes& attributes, const Inputs& in, DType dtype);
  static cudaError_t launch(const Attributes& attributes, const Inputs& in, DType dtype,
                            const void* const* inputs, void* y, void* workspace, int tile,
                            cudaStream_t stream);
};

}  // namespace lynx

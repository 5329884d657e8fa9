// SPDX-License-Identifier: Apache-2.0
// The TensorRT side of LynxSparseLinear and of its forms with a fused producer of x: shapes, dtypes,
// attributes, messages. Kernels live in kernels/.
#pragma once

#include "kernels/sparse_linear.h"
#include "producer_plugin.h"

namespace lynx {

struct SparseLinearAttributes {
  int32_t rank = 0;
  int32_t norm_scale = 0;
  int32_t activation = 0;       // of the output: 0: none, 1: GELU (tanh), 2: GELU (erf)
  int32_t activation_from = 0;  // first output channel that it applies to
  ProducerAttributes producer;
};

// Inputs in the order of the op.
enum SparseLinearInput : int32_t { kWeight = 1, kLoraDown, kBias, kFirst };  // kFirst: of the producer

template <Producer kProducer>
struct SparseLinearNames;

template <>
struct SparseLinearNames<Producer::kNone> {
  static constexpr char kName[] = "LynxSparseLinear";
  static constexpr const char* kInputNames[] = {"x", "weight", "lora_down", "bias"};
};

template <>
struct SparseLinearNames<Producer::kNorm> {
  static constexpr char kName[] = "LynxNormSparseLinear";
  static constexpr const char* kInputNames[] = {"x", "weight", "lora_down", "bias", "gain", "shift"};
};

template <>
struct SparseLinearNames<Producer::kGelu> {
  static constexpr char kName[] = "LynxGeluSparseLinear";
  static constexpr const char* kInputNames[] = {"x", "weight", "lora_down", "bias"};
};

template <>
struct SparseLinearNames<Producer::kGated> {
  static constexpr char kName[] = "LynxGatedSparseLinear";
  static constexpr const char* kInputNames[] = {"x", "weight", "lora_down", "bias", "gate"};
};

template <Producer kProducer>
struct SparseLinearOp : SparseLinearNames<kProducer> {
  using Attributes = SparseLinearAttributes;
  using OfProducer = ProducerFields<Attributes, kProducer>;
  static constexpr auto kInt = nvinfer1::PluginFieldType::kINT32;
  static constexpr AttributeField kFields[] = {
      {"rank", kInt, offsetof(Attributes, rank)},
      {"norm_scale", kInt, offsetof(Attributes, norm_scale)},
      {"activation", kInt, offsetof(Attributes, activation)},
      {"activation_from", kInt, offsetof(Attributes, activation_from)},
      OfProducer::kFirst,
      OfProducer::kSecond,
  };
  static constexpr size_t kFieldCount = 4 + OfProducer::kCount;
  using Inputs = std::array<Extents, sizeof(SparseLinearNames<kProducer>::kInputNames) / sizeof(const char*)>;

  static bool check_attributes(const Attributes& attributes);
  static bool check_shapes(const Attributes& attributes, const Inputs& in);
  static bool check_device(const Attributes& attributes, DType dtype);
  static nvinfer1::DataType input_type(int32_t, nvinfer1::DataType x) { return x; }
  static const nvinfer1::IDimensionExpr* output_channels(const Attributes&, const nvinfer1::DimsExprs* inputs,
                                                         nvinfer1::IExprBuilder&) {
    return inputs[kWeight].d[0];
  }
  static constexpr char kKernels[] = "", kArchitectures[] = "", kSetting[] = "model.dtype";
  static bool holds(DType dtype) { return lynx::holds(dtype); }
  static int tactics(const Attributes&, DType dtype) {
    InstructionSet set;
    return choose_instructions(dtype, &set) == cudaSuccess ? tile_count(set) : 0;
  }
  static int most_tactics(const Attributes&) { return most_tile_count(); }
  static size_t workspace(const Attributes& attributes, const Inputs& in, DType dtype);
  static cudaError_t launch(const Attributes& attributes, const Inputs& in, DType dtype,
                            const void* const* inputs, void* y, void* workspace, int tile,
                            cudaStream_t stream);
};

}  // namespace lynx

// SPDX-License-Identifier: Apache-2.0
// The TensorRT side of LynxSparseLinear: shapes, dtypes, attributes, messages. Kernels live in kernels/.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <string>

namespace lynx {

// The op's attributes, all int32: what an engine stores of the plugin. Weights are inputs.
struct SparseLinearAttributes {
  int32_t rank = 0;
  int32_t norm_scale = 0;
  int32_t has_order = 0;
  int32_t has_centre = 0;
  int32_t has_saliency = 0;
};

// Inputs in the order of the op; all are wired, the has_* flags say which of the last three count.
enum SparseLinearInput : int32_t { kX, kWeight, kLoraDown, kBias, kOrder, kCentre, kSaliency, kInputs };

// One node. Holds no state but its attributes, so that contexts and streams can share nothing by accident.
class SparseLinearPlugin final : public nvinfer1::IPluginV3,
                                 public nvinfer1::IPluginV3OneCore,
                                 public nvinfer1::IPluginV3OneBuild,
                                 public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit SparseLinearPlugin(const SparseLinearAttributes& attributes);
  SparseLinearPlugin(const SparseLinearPlugin&) = delete;  // fields_ points into attributes_: use clone()
  SparseLinearPlugin& operator=(const SparseLinearPlugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t outputs,
                             const nvinfer1::DataType* input_types, int32_t inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t shape_input_count,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t inputs, int32_t outputs) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                          const nvinfer1::DynamicPluginTensorDesc* out,
                          int32_t outputs) const noexcept override;

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs,
                        const nvinfer1::PluginTensorDesc* out, int32_t outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_desc, const nvinfer1::PluginTensorDesc* output_desc,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  SparseLinearAttributes attributes_;
  std::array<nvinfer1::PluginField, 5> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

class SparseLinearCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  SparseLinearCreator();

  // Null, with a logged reason, for an attribute out of range.
  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

 private:
  std::array<nvinfer1::PluginField, 5> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace lynx

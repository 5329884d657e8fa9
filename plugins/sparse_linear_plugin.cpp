// SPDX-License-Identifier: Apache-2.0
#include "sparse_linear_plugin.h"

#include <cuda_runtime_api.h>

#include <exception>
#include <initializer_list>
#include <new>

#include "kernels/sparse24.h"
#include "kernels/sparse_linear.h"
#include "log.h"

namespace lynx {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr char kName[] = "LynxSparseLinear";
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "lynx";
constexpr const char* kInputNames[kInputs] = {"x",     "weight", "lora_down", "bias",
                                              "order", "centre", "saliency"};

// The attributes as TensorRT's fields, pointing into `from`.
std::array<PluginField, 5> fields_of(const SparseLinearAttributes& from) {
  const auto field = [](const char* name, const int32_t& value) {
    return PluginField(name, &value, PluginFieldType::kINT32, 1);
  };
  return {field("rank", from.rank), field("norm_scale", from.norm_scale), field("has_order", from.has_order),
          field("has_centre", from.has_centre), field("has_saliency", from.has_saliency)};
}

// Where a field of that name is kept, or null for one that is not the op's.
int32_t* attribute_named(SparseLinearAttributes& attributes, const std::string& name) {
  if (name == "rank") return &attributes.rank;
  if (name == "norm_scale") return &attributes.norm_scale;
  if (name == "has_order") return &attributes.has_order;
  if (name == "has_centre") return &attributes.has_centre;
  if (name == "has_saliency") return &attributes.has_saliency;
  return nullptr;
}

// Reports an error in the form of all of them: cause, then remedy. Returns false.
bool refuse(const std::string& cause, const std::string& remedy) noexcept {
  try {
    log_error(std::string(kName) + ": " + cause + ". " + remedy + ".");
  } catch (...) {  // no memory left for a message
  }
  return false;
}

bool read_attributes(const nvinfer1::PluginFieldCollection& fields, SparseLinearAttributes& attributes) {
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    const PluginField& field = fields.fields[i];
    int32_t* attribute = attribute_named(attributes, field.name);
    if (attribute == nullptr) continue;
    if (field.data == nullptr || field.length != 1) {
      return refuse(std::string("attribute ") + field.name + " is not one integer", "Rewrite the model");
    }
    if (field.type == PluginFieldType::kINT32) {
      *attribute = *static_cast<const int32_t*>(field.data);
    } else if (field.type == PluginFieldType::kINT64) {
      *attribute = int32_t(*static_cast<const int64_t*>(field.data));
    } else {
      return refuse(std::string("attribute ") + field.name + " is not an integer", "Rewrite the model");
    }
  }
  return true;
}

bool check_attributes(const SparseLinearAttributes& attributes) {
  if (attributes.rank < 0 || attributes.rank > kMaxRank || attributes.rank % kRankMultiple != 0) {
    return refuse("rank is " + std::to_string(attributes.rank),
                  "Use 0 or a multiple of 16 up to " + std::to_string(kMaxRank));
  }
  for (const int32_t flag :
       {attributes.norm_scale, attributes.has_order, attributes.has_centre, attributes.has_saliency}) {
    if (flag != 0 && flag != 1) {
      return refuse("a flag is " + std::to_string(flag), "Use 0 or 1 for norm_scale and the has_ attributes");
    }
  }
  return true;
}

// One tensor's extents; -1 where not known before run time.
struct Extents {
  int32_t count = 0;
  int64_t at[Dims::MAX_DIMS] = {};

  int64_t last() const { return at[count - 1]; }
};

Extents extents_of(const Dims& dims) {
  Extents out;
  out.count = dims.nbDims;
  for (int32_t i = 0; i < dims.nbDims; ++i) out.at[i] = dims.d[i];
  return out;
}

Extents extents_of(const nvinfer1::DimsExprs& dims) {
  Extents out;
  out.count = dims.nbDims;
  for (int32_t i = 0; i < dims.nbDims; ++i)
    out.at[i] = dims.d[i]->isConstant() ? dims.d[i]->getConstantValue() : -1;
  return out;
}

// The tensors' extents for the largest shapes of the profile.
Extents extents_of(const DynamicPluginTensorDesc& tensor) { return extents_of(tensor.max); }
Extents extents_of(const PluginTensorDesc& tensor) { return extents_of(tensor.dims); }

template <class Tensor>
std::array<Extents, kInputs> all_extents(const Tensor* tensors) {
  std::array<Extents, kInputs> out;
  for (int32_t i = 0; i < kInputs; ++i) out[i] = extents_of(tensors[i]);
  return out;
}

bool check_extent(const char* input, const char* what, int64_t found, int64_t wanted) {
  if (found < 0 || wanted < 0 || found == wanted) return true;  // unknown ones are checked later
  return refuse(std::string(input) + " has " + std::to_string(found) + " " + what + " where " +
                    std::to_string(wanted) + " are due",
                "Rewrite the model with this version of lynx-compile");
}

// Checks every known extent against the op's definition.
bool check_shapes(const std::array<Extents, kInputs>& in, const SparseLinearAttributes& attributes) {
  if (in[kX].count < 1) return refuse("x is a scalar", "Give it at least one dimension, [..., K]");
  for (const int32_t i : {kWeight, kLoraDown}) {
    if (in[i].count != 2)
      return refuse(std::string(kInputNames[i]) + " is not a matrix", "Rewrite the model");
  }
  for (const int32_t i : {kBias, kOrder, kCentre, kSaliency}) {
    if (in[i].count != 1)
      return refuse(std::string(kInputNames[i]) + " is not a vector", "Rewrite the model");
  }
  const int64_t channels = in[kX].last(), out_channels = in[kWeight].at[0];
  if (channels >= 0 && (channels == 0 || channels % kBlock != 0)) {
    return refuse("x has " + std::to_string(channels) + " channels, not a multiple of 16",
                  "Keep this linear dense");
  }
  if (attributes.has_order && channels > kMaxOrderedChannels) {
    return refuse(
        "x has " + std::to_string(channels) + " channels and an order",
        "Up to " + std::to_string(kMaxOrderedChannels) + " can be reordered; compile without an order");
  }
  if (out_channels >= 0 && (out_channels == 0 || out_channels % 8 != 0)) {
    return refuse("weight has " + std::to_string(out_channels) + " rows, not a multiple of 8",
                  "Keep this linear dense");
  }
  const int64_t width = channels < 0 ? -1 : padded_width(channels, attributes.rank);
  const int64_t rank_rows = attributes.rank > 0 ? attributes.rank : 1;
  return check_extent("weight", "columns", in[kWeight].at[1], width) &&
         check_extent("lora_down", "rows", in[kLoraDown].at[0], rank_rows) &&
         check_extent("lora_down", "columns", in[kLoraDown].at[1], channels) &&
         check_extent("bias", "elements", in[kBias].at[0], out_channels) &&
         check_extent("order", "elements", in[kOrder].at[0], channels) &&
         check_extent("centre", "elements", in[kCentre].at[0], channels) &&
         check_extent("saliency", "elements", in[kSaliency].at[0], channels);
}

bool check_types(const DataType* types, int32_t inputs) {
  if (inputs != kInputs) {
    return refuse("the node has " + std::to_string(inputs) + " inputs instead of 7", "Rewrite the model");
  }
  if (types[kX] != DataType::kBF16 && types[kX] != DataType::kHALF) {
    return refuse("x is neither bf16 nor fp16", "Export the model in one of them");
  }
  for (int32_t i = 0; i < kInputs; ++i) {
    const DataType wanted = i == kOrder ? DataType::kINT32 : types[kX];
    if (types[i] != wanted) {
      return refuse(std::string(kInputNames[i]) + " has the wrong dtype",
                    i == kOrder ? "Make it int32" : "Give it the dtype of x");
    }
  }
  return true;
}

int64_t rows_of(const Extents& x) {
  int64_t rows = 1;
  for (int32_t i = 0; i + 1 < x.count; ++i) rows *= x.at[i];
  return rows;
}

SparseLinearParams params_of(const SparseLinearAttributes& attributes, const PluginTensorDesc* in,
                             const void* const* inputs, void* y, void* workspace) {
  const Extents x = extents_of(in[kX]);
  SparseLinearParams params;
  params.dtype = in[kX].type == DataType::kBF16 ? DType::kBf16 : DType::kFp16;
  params.rows = rows_of(x);
  params.channels = int(x.last());
  params.out_channels = int(in[kWeight].dims.d[0]);
  params.rank = attributes.rank;
  params.norm_scale = attributes.norm_scale != 0;
  params.x = inputs[kX];
  params.weight = inputs[kWeight];
  params.lora_down = inputs[kLoraDown];
  params.bias = inputs[kBias];
  params.order = attributes.has_order ? static_cast<const int32_t*>(inputs[kOrder]) : nullptr;
  params.centre = attributes.has_centre ? inputs[kCentre] : nullptr;
  params.saliency = attributes.has_saliency ? inputs[kSaliency] : nullptr;
  params.y = y;
  params.workspace = workspace;
  return params;
}

}  // namespace

SparseLinearPlugin::SparseLinearPlugin(const SparseLinearAttributes& attributes)
    : attributes_(attributes),
      fields_(fields_of(attributes_)),
      collection_{int32_t(fields_.size()), fields_.data()} {}

nvinfer1::IPluginCapability* SparseLinearPlugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* SparseLinearPlugin::clone() noexcept {
  return new (std::nothrow) SparseLinearPlugin(attributes_);
}

const char* SparseLinearPlugin::getPluginName() const noexcept { return kName; }
const char* SparseLinearPlugin::getPluginVersion() const noexcept { return kVersion; }
const char* SparseLinearPlugin::getPluginNamespace() const noexcept { return kNamespace; }

int32_t SparseLinearPlugin::getOutputDataTypes(DataType* output_types, int32_t, const DataType* input_types,
                                               int32_t inputs) const noexcept {
  if (!check_types(input_types, inputs)) return -1;
  output_types[0] = input_types[kX];
  return 0;
}

int32_t SparseLinearPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                                            const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                                            int32_t, nvinfer1::IExprBuilder&) noexcept {
  if (input_count != kInputs || !check_shapes(all_extents(inputs), attributes_)) return -1;
  outputs[0] = inputs[kX];
  outputs[0].d[outputs[0].nbDims - 1] = inputs[kWeight].d[0];
  return 0;
}

bool SparseLinearPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                                   int32_t, int32_t) noexcept {
  const PluginTensorDesc& tensor = tensors[position].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (position == kX) return tensor.type == DataType::kBF16 || tensor.type == DataType::kHALF;
  return tensor.type == (position == kOrder ? DataType::kINT32 : tensors[kX].desc.type);
}

int32_t SparseLinearPlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t,
                                            const DynamicPluginTensorDesc*, int32_t) noexcept {
  return check_shapes(all_extents(in), attributes_) ? 0 : -1;
}

size_t SparseLinearPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t,
                                            const DynamicPluginTensorDesc*, int32_t) const noexcept {
  const Extents x = extents_of(in[kX]);
  return workspace_bytes(rows_of(x), int(x.last()), attributes_.rank, attributes_.has_order != 0);
}

int32_t SparseLinearPlugin::onShapeChange(const PluginTensorDesc* in, int32_t, const PluginTensorDesc*,
                                          int32_t) noexcept {
  return check_shapes(all_extents(in), attributes_) ? 0 : -1;
}

int32_t SparseLinearPlugin::enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc*,
                                    const void* const* inputs, void* const* outputs, void* workspace,
                                    cudaStream_t stream) noexcept {
  const SparseLinearParams params = params_of(attributes_, input_desc, inputs, outputs[0], workspace);
  if (params.rows == 0) return 0;
  const cudaError_t error = launch_sparse_linear(params, stream);
  if (error == cudaSuccess) return 0;
  refuse(std::string("the launch failed: ") + cudaGetErrorString(error),
         "Check that the GPU is one that the plugin was built for (sm_80 or later)");
  return -1;
}

nvinfer1::IPluginV3* SparseLinearPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return clone();
}

const nvinfer1::PluginFieldCollection* SparseLinearPlugin::getFieldsToSerialize() noexcept {
  return &collection_;
}

SparseLinearCreator::SparseLinearCreator() {
  static const SparseLinearAttributes defaults;
  fields_ = fields_of(defaults);
  for (PluginField& field : fields_) field.data = nullptr;  // names and types only
  collection_ = {int32_t(fields_.size()), fields_.data()};
}

nvinfer1::IPluginV3* SparseLinearCreator::createPlugin(const char*,
                                                       const nvinfer1::PluginFieldCollection* fields,
                                                       nvinfer1::TensorRTPhase) noexcept {
  try {
    SparseLinearAttributes attributes;
    if (fields != nullptr && !read_attributes(*fields, attributes)) return nullptr;
    if (!check_attributes(attributes)) return nullptr;
    return new SparseLinearPlugin(attributes);
  } catch (const std::exception& error) {
    refuse(std::string("the plugin could not be made: ") + error.what(), "Free memory and try again");
    return nullptr;
  }
}

const char* SparseLinearCreator::getPluginName() const noexcept { return kName; }
const char* SparseLinearCreator::getPluginVersion() const noexcept { return kVersion; }
const char* SparseLinearCreator::getPluginNamespace() const noexcept { return kNamespace; }

}  // namespace lynx

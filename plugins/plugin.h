// SPDX-License-Identifier: Apache-2.0
// What the library's TensorRT plugins do alike. A plugin is Plugin<Op> and its creator Creator<Op>; the Op
// says what is its own, all of it static:
//
//   kName, kInputNames (in the order of the ONNX node; x comes first), kOutputs is always 1
//   Attributes          a plain struct: what an engine stores of the plugin. Weights are inputs.
//   kFields             its members as TensorRT's fields, of which the first kFieldCount are the op's
//   check_attributes    false, with a logged reason, for a value out of range
//   check_shapes        the same for input extents
//   check_device        the same where this library or the GPU at hand, if there is one, cannot run the node
//   input_type          the data type of an input, given x's
//   output_channels     where the output's last extent comes from
//   kKernels, kArchitectures, kSetting   words of what a library may lack, and of the remedy
//   holds               whether this library was built with kernels for an element type, of any GPU
//   tactics             tile configurations that the node can choose from here; 0 where that cannot be told
//   most_tactics        the same on any GPU
//   workspace, launch   the kernels
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <new>
#include <string>

#include "build_id.h"
#include "kernels/sparse_gemm.h"
#include "log.h"

namespace lynx {

constexpr char kPluginVersion[] = "1";
constexpr char kPluginNamespace[] = "lynx";
constexpr int32_t kX = 0;  // input

// The remedy for an activation that there is not.
constexpr char kActivations[] =
    "Use 0 for none, 1 for GELU (tanh), 2 for GELU (erf), or for gated weights 3 for SiLU";

// An attribute: where a field of that name is kept.
struct AttributeField {
  const char* name;
  nvinfer1::PluginFieldType type;  // kINT32 or kFLOAT32; both of 4 bytes
  size_t offset;
};

// One tensor's extents; -1 where not known before run time.
struct Extents {
  int32_t count = 0;
  int64_t at[nvinfer1::Dims::MAX_DIMS] = {};

  int64_t last() const { return at[count - 1]; }

  // Product of all but the last; -1 where one of them is not known.
  int64_t rows() const {
    int64_t product = 1;
    for (int32_t i = 0; i + 1 < count; ++i) {
      if (at[i] < 0) return -1;
      product *= at[i];
    }
    return product;
  }
};

inline Extents extents_of(const nvinfer1::Dims& dims) {
  Extents out;
  out.count = dims.nbDims;
  for (int32_t i = 0; i < dims.nbDims; ++i) out.at[i] = dims.d[i];
  return out;
}

inline Extents extents_of(const nvinfer1::DimsExprs& dims) {
  Extents out;
  out.count = dims.nbDims;
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    out.at[i] = dims.d[i]->isConstant() ? dims.d[i]->getConstantValue() : -1;
  }
  return out;
}

// The tensor's extents for the largest shapes of the profile.
inline Extents extents_of(const nvinfer1::DynamicPluginTensorDesc& tensor) { return extents_of(tensor.max); }
inline Extents extents_of(const nvinfer1::PluginTensorDesc& tensor) { return extents_of(tensor.dims); }

// Reports an error in the form of all of them: cause, then remedy. Returns false.
inline bool refuse(const char* plugin, const std::string& cause, const std::string& remedy) {
  log_error((std::string(plugin) + ": " + cause + ". " + remedy + ".").c_str());
  return false;
}

// What `body` returns, or `failed` when it throws, which TensorRT cannot catch: a message, too, takes memory.
template <class Result, class Body>
Result guarded(Result failed, const Body& body) noexcept {
  try {
    return body();
  } catch (...) {
    log_error("Lynx: memory ran out within a plugin. Free memory and try again.");
    return failed;
  }
}

inline bool is_element(nvinfer1::DataType type) {
  return type == nvinfer1::DataType::kBF16 || type == nvinfer1::DataType::kHALF;
}
inline DType dtype_of(nvinfer1::DataType x) {
  return x == nvinfer1::DataType::kBF16 ? DType::kBf16 : DType::kFp16;
}

// Whether the library was built with kernels of 16 bits for the type, of any instruction set.
inline bool holds(DType dtype) {
  return std::any_of(std::begin(kInstructionSets), std::end(kInstructionSets),
                     [dtype](const InstructionSetTraits& each) { return holds(each.set, dtype); });
}

// Of them, on all GPUs.
inline int most_tile_count() {
  int most = 0;
  for (const InstructionSetTraits& each : kInstructionSets) most = std::max(most, tile_count(each.set));
  return most;
}

// Checks one extent against what the op's definition says.
inline bool check_extent(const char* plugin, const char* input, const char* what, int64_t found,
                         int64_t wanted) {
  if (found < 0 || wanted < 0 || found == wanted) return true;  // unknown ones are checked later
  return refuse(plugin,
                std::string(input) + " has " + std::to_string(found) + " " + what + " where " +
                    std::to_string(wanted) + " are due",
                "Rewrite the model with this version of lynx-compile");
}

// The attributes as TensorRT's fields, pointing into `from`; with null, names and types only.
template <class Op>
std::array<nvinfer1::PluginField, Op::kFieldCount> fields_of(const typename Op::Attributes* from) {
  std::array<nvinfer1::PluginField, Op::kFieldCount> out;
  for (size_t i = 0; i < out.size(); ++i) {
    const AttributeField& field = Op::kFields[i];
    const void* data = from == nullptr ? nullptr : reinterpret_cast<const char*>(from) + field.offset;
    out[i] = nvinfer1::PluginField(field.name, data, field.type, 1);
  }
  return out;
}

// Copies a field's value to where the attribute is kept; TensorRT's parser gives integers in 32 or 64 bits.
template <class Op>
bool read_field(const nvinfer1::PluginField& field, const AttributeField& attribute,
                typename Op::Attributes& attributes) {
  using Type = nvinfer1::PluginFieldType;
  char* const to = reinterpret_cast<char*>(&attributes) + attribute.offset;
  if (field.data == nullptr || field.length != 1) {
    return refuse(Op::kName, std::string("attribute ") + field.name + " is not one number",
                  "Rewrite the model");
  }
  if (field.type == attribute.type) {
    std::memcpy(to, field.data, 4);
    return true;
  }
  if (field.type == Type::kINT64 && attribute.type == Type::kINT32) {
    const int64_t wide = *static_cast<const int64_t*>(field.data);
    const int32_t value = int32_t(wide);
    if (value != wide) {
      return refuse(Op::kName, std::string("attribute ") + field.name + " is " + std::to_string(wide),
                    "Give a number of 32 bits");
    }
    std::memcpy(to, &value, 4);
    return true;
  }
  return refuse(Op::kName, std::string("attribute ") + field.name + " has the wrong type",
                "Rewrite the model");
}

// Every attribute must be given: one that got lost would change results without a word.
template <class Op>
bool read_attributes(const nvinfer1::PluginFieldCollection* fields, typename Op::Attributes& attributes) {
  for (size_t k = 0; k < Op::kFieldCount; ++k) {
    const AttributeField& attribute = Op::kFields[k];
    bool given = false;
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
      if (std::strcmp(fields->fields[i].name, attribute.name) != 0) continue;
      if (!read_field<Op>(fields->fields[i], attribute, attributes)) return false;
      given = true;
    }
    if (!given) {
      return refuse(Op::kName, std::string("attribute ") + attribute.name + " is missing",
                    "Rewrite the model with this version of lynx-compile");
    }
  }
  return true;
}

// One node. Holds no state but its attributes, the type of x and the tactic, so that contexts and streams can
// share nothing by accident.
template <class Op>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  using Attributes = typename Op::Attributes;
  static constexpr int32_t kInputs = int32_t(sizeof(Op::kInputNames) / sizeof(Op::kInputNames[0]));
  using Inputs = std::array<Extents, size_t(kInputs)>;

  explicit Plugin(const Attributes& attributes)
      : attributes_(attributes),
        fields_(fields_of<Op>(&attributes_)),
        collection_{int32_t(fields_.size()), fields_.data()} {}
  Plugin(const Plugin&) = delete;  // fields_ points into attributes_: use clone()
  Plugin& operator=(const Plugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
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

  nvinfer1::IPluginV3* clone() noexcept override {
    auto* const copy = new (std::nothrow) Plugin(attributes_);
    if (copy != nullptr) copy->dtype_ = dtype_, copy->tactic_ = tactic_;
    return copy;
  }

  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t, const nvinfer1::DataType* input_types,
                             int32_t inputs) const noexcept override {
    return guarded(-1, [&] {
      if (!check_types(input_types, inputs)) return -1;
      output_types[0] = input_types[kX];
      return 0;
    });
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*,
                          int32_t, nvinfer1::DimsExprs* outputs, int32_t,
                          nvinfer1::IExprBuilder& builder) noexcept override {
    return guarded(-1, [&] {
      if (input_count != kInputs || !check_shapes(inputs)) return -1;
      outputs[0] = inputs[kX];
      outputs[0].d[outputs[0].nbDims - 1] = Op::output_channels(attributes_, inputs, builder);
      return 0;
    });
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t,
                                 int32_t) noexcept override {
    const nvinfer1::PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position == kX) return is_element(tensor.type) && Op::holds(dtype_of(tensor.type));
    const nvinfer1::DataType x = tensors[kX].desc.type;
    return tensor.type == (position < kInputs ? Op::input_type(position, x) : x);
  }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override {
    return guarded(-1, [&] {
      dtype_ = dtype_of(in[kX].desc.type);
      return check_shapes(in) && Op::check_device(attributes_, dtype_) ? 0 : -1;
    });
  }

  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept override {
    return Op::workspace(attributes_, all_extents(in), dtype_of(in[kX].desc.type));
  }

  // Every tile configuration is a tactic; tactic 0, TensorRT's default, leaves the choice to our dispatcher.
  // Where no GPU is there to time them, there is the default alone.
  int32_t getNbTactics() noexcept override { return Op::tactics(attributes_, dtype_); }

  int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override {
    for (int32_t i = 0; i < count; ++i) tactics[i] = i + 1;
    return 0;
  }

  // What TensorRT caches times under: the attributes, in hexadecimal, and which build of the library, with
  // its kernels and tiles, they were taken with. Null, for no caching, where that cannot be told.
  const char* getTimingCacheID() noexcept override {
    return guarded(static_cast<const char*>(nullptr), [&]() -> const char* {
      static const std::string library = build_id();
      if (library.empty()) return nullptr;
      constexpr char kDigits[] = "0123456789abcdef";
      const auto* bytes = reinterpret_cast<const unsigned char*>(&attributes_);
      cache_id_.clear();
      for (size_t i = 0; i < sizeof(Attributes); ++i)
        cache_id_ += {kDigits[bytes[i] / 16], kDigits[bytes[i] % 16]};
      cache_id_ += "-" + library;
      return cache_id_.c_str();
    });
  }

  int32_t setTactic(int32_t tactic) noexcept override {
    return guarded(-1, [&] {
      if (tactic < 0 || tactic > Op::most_tactics(attributes_)) {
        refuse(Op::kName, "there is no tactic " + std::to_string(tactic),
               "Build the engine again with this plugin library");
        return -1;
      }
      tactic_ = tactic;
      return 0;
    });
  }

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t, const nvinfer1::PluginTensorDesc*,
                        int32_t) noexcept override {
    return guarded(-1, [&] {
      dtype_ = dtype_of(in[kX].type);
      return check_shapes(in) && Op::check_device(attributes_, dtype_) && check_tactic() ? 0 : -1;
    });
  }

  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    return guarded(-1, [&] {
      const Inputs extents = all_extents(in);
      if (extents[kX].rows() == 0) return 0;
      const int tile = tactic_ == 0 ? kAnyTile : tactic_ - 1;
      const DType dtype = dtype_of(in[kX].type);
      const cudaError_t error =
          Op::launch(attributes_, extents, dtype, inputs, outputs[0], workspace, tile, stream);
      if (error == cudaSuccess) return 0;
      refuse(Op::kName, std::string("the launch failed: ") + cudaGetErrorString(error),
             "Check that the GPU is one that the engine and the plugin were built for (sm_80 or later)");
      return -1;
    });
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return clone();
  }

  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  template <class Tensor>
  static Inputs all_extents(const Tensor* tensors) {
    Inputs out;
    for (int32_t i = 0; i < kInputs; ++i) out[size_t(i)] = extents_of(tensors[i]);
    return out;
  }

  template <class Tensor>
  bool check_shapes(const Tensor* tensors) const {
    const Inputs in = all_extents(tensors);
    if (in[kX].count < 1)
      return refuse(Op::kName, "x is a scalar", "Give it at least one dimension, [..., K]");
    if (in[kX].rows() > kMaxRows) {
      return refuse(Op::kName, "x has " + std::to_string(in[kX].rows()) + " rows",
                    "The kernels take up to " + std::to_string(kMaxRows) + ": use smaller batches");
    }
    return Op::check_shapes(attributes_, in);
  }

  static bool check_types(const nvinfer1::DataType* types, int32_t inputs) {
    if (inputs != kInputs) {
      return refuse(
          Op::kName,
          "the node has " + std::to_string(inputs) + " inputs instead of " + std::to_string(kInputs),
          "Rewrite the model");
    }
    if (!is_element(types[kX])) {
      return refuse(Op::kName, "x is neither bf16 nor fp16", "Set model.dtype to bf16 or fp16");
    }
    if (const DType dtype = dtype_of(types[kX]); !Op::holds(dtype)) {
      const std::string type = traits_of(dtype).name;
      const std::string library = "x is " + type + ", and the plugin library was built without ";
      return refuse(Op::kName, library + Op::kKernels + type,
                    std::string("Build it with ") + Op::kArchitectures + type +
                        " in LYNX_ELEMENT_TYPES, or set another " + Op::kSetting);
    }
    for (int32_t i = 0; i < kInputs; ++i) {
      const nvinfer1::DataType due = Op::input_type(i, types[kX]);
      if (types[i] != due) {
        return refuse(Op::kName, std::string(Op::kInputNames[i]) + " has the wrong dtype",
                      due == nvinfer1::DataType::kINT32   ? "Make it int32"
                      : due == nvinfer1::DataType::kFLOAT ? "Make it float32"
                                                          : "Give it the dtype of x");
      }
    }
    return true;
  }

  // An engine for other GPUs than the one it was built on may bring a tactic that this one has not.
  bool check_tactic() const {
    const int known = Op::tactics(attributes_, dtype_);
    if (known == 0 || tactic_ <= known) return true;
    return refuse(Op::kName, "this GPU has no tactic " + std::to_string(tactic_),
                  "Build the engine on this GPU");
  }

  Attributes attributes_;
  DType dtype_ = DType::kBf16;  // of x, as of the last configurePlugin or onShapeChange
  int32_t tactic_ = 0;
  std::array<nvinfer1::PluginField, Op::kFieldCount> fields_;
  nvinfer1::PluginFieldCollection collection_;
  std::string cache_id_;
};

template <class Op>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() : fields_(fields_of<Op>(nullptr)), collection_{int32_t(fields_.size()), fields_.data()} {}

  // Null, with a logged reason, for an attribute that is missing or out of range.
  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    return guarded(static_cast<nvinfer1::IPluginV3*>(nullptr), [&]() -> nvinfer1::IPluginV3* {
      typename Op::Attributes attributes;
      if (!read_attributes<Op>(fields, attributes) || !Op::check_attributes(attributes)) return nullptr;
      return new Plugin<Op>(attributes);
    });
  }

  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

 private:
  std::array<nvinfer1::PluginField, Op::kFieldCount> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace lynx

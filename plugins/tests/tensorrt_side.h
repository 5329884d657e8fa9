// SPDX-License-Identifier: Apache-2.0
// TensorRT's side of the IPluginV3 interfaces, for tests that drive plugins as it does.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "plugin_cases.h"

namespace lynx::test {

using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

// An extent: a constant, or one that is known only at run time.
class Extent final : public nvinfer1::IDimensionExpr, nvinfer1::apiv::VDimensionExpr {
 public:
  explicit Extent(int64_t value) : value_(value) { mImpl = this; }
  bool isConstant() const override { return value_ >= 0; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

 private:
  int64_t value_;
};

// Makes extents, and keeps them. Our plugins compute none from others.
class Extents final : public nvinfer1::IExprBuilder, nvinfer1::apiv::VExprBuilder {
 public:
  Extents() { mImpl = this; }
  const nvinfer1::IDimensionExpr* constant(int64_t value) override {
    extents_.emplace_back(value);
    return &extents_.back();
  }
  const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation, const nvinfer1::IDimensionExpr&,
                                            const nvinfer1::IDimensionExpr&) override {
    return constant(-1);
  }
  const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                    const nvinfer1::IDimensionExpr&) override {
    return nullptr;
  }

 private:
  std::deque<Extent> extents_;  // a deque: their addresses stay
};

struct ResourceContext final : nvinfer1::IPluginResourceContext {
  nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

// The values of a field collection, owned, as an engine file owns them.
class Fields {
 public:
  explicit Fields(const PluginFieldCollection& from) {
    for (int32_t i = 0; i < from.nbFields; ++i) add(from.fields[i], from.fields[i].data);
  }
  // What the ONNX parser gives: of the node's attributes those that the creator declares.
  Fields(const PluginFieldCollection& declared, const std::map<std::string, double>& attributes) {
    for (int32_t i = 0; i < declared.nbFields; ++i) {
      const PluginField& field = declared.fields[i];
      const auto found = attributes.find(field.name);
      if (found == attributes.end()) continue;
      const auto integer = int32_t(found->second);
      const auto real = float(found->second);
      add(field, field.type == PluginFieldType::kFLOAT32 ? static_cast<const void*>(&real) : &integer);
    }
  }

  const PluginFieldCollection* collection() {
    fields_.clear();
    for (const Value& value : values_)
      fields_.emplace_back(value.name.c_str(), value.data, value.type, value.length);
    collection_ = {int32_t(fields_.size()), fields_.data()};
    return &collection_;
  }

  bool operator==(const Fields& other) const {
    return values_.size() == other.values_.size() &&
           std::equal(values_.begin(), values_.end(), other.values_.begin(),
                      [](const Value& a, const Value& b) {
                        return a.name == b.name && a.type == b.type && a.length == b.length &&
                               std::memcmp(a.data, b.data, sizeof a.data) == 0;
                      });
  }

 private:
  struct Value {
    std::string name;
    PluginFieldType type;
    int32_t length;
    alignas(8) char data[8];  // one number
  };

  void add(const PluginField& field, const void* data) {
    Value value{field.name, field.type, field.length, {}};
    std::memcpy(value.data, data, field.type == PluginFieldType::kINT64 ? 8 : 4);
    values_.push_back(std::move(value));
  }

  std::vector<Value> values_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

template <class Capability>
Capability* capability(IPluginV3& plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(plugin.getCapabilityInterface(type));
}
inline auto* core_of(IPluginV3& plugin) {
  return capability<nvinfer1::IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
}
inline auto* build_of(IPluginV3& plugin) {
  return capability<nvinfer1::IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}
inline auto* runtime_of(IPluginV3& plugin) {
  return capability<nvinfer1::IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

inline nvinfer1::Dims dims_of(const std::vector<int64_t>& extents) {
  nvinfer1::Dims out{};
  out.nbDims = int32_t(extents.size());
  std::copy(extents.begin(), extents.end(), out.d);
  return out;
}

inline PluginTensorDesc desc_of(DataType type, const nvinfer1::Dims& dims) {
  PluginTensorDesc out{};
  out.dims = dims, out.type = type, out.format = TensorFormat::kLINEAR, out.scale = 1.0f;
  return out;
}

// Inputs, then the output, for the problem's shapes.
inline std::vector<PluginTensorDesc> static_descs(const Problem& problem) {
  std::vector<PluginTensorDesc> out;
  for (const HostTensor& input : problem.inputs) out.push_back(desc_of(input.type, dims_of(input.dims)));
  nvinfer1::Dims y = out[0].dims;
  y.d[y.nbDims - 1] = problem.out_channels;
  out.push_back(desc_of(problem.type(), y));
  return out;
}

// The same as a network has them whose batch and tokens are decided by each run, up to the problem's own.
inline std::vector<DynamicPluginTensorDesc> dynamic_descs(const Problem& problem) {
  std::vector<DynamicPluginTensorDesc> out;
  for (const PluginTensorDesc& desc : static_descs(problem)) {
    DynamicPluginTensorDesc dynamic{desc, desc.dims, desc.dims, desc.dims};
    if (desc.dims.nbDims == 3 && desc.type != DataType::kINT32) {
      const bool of_tokens = desc.dims.d[1] > 1;  // and not a gain of each batch
      dynamic.desc.dims.d[0] = -1, dynamic.min.d[0] = 1;
      if (of_tokens) dynamic.desc.dims.d[1] = -1, dynamic.min.d[1] = 1;
    }
    out.push_back(dynamic);
  }
  return out;
}

}  // namespace lynx::test

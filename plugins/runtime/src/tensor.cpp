// SPDX-License-Identifier: Apache-2.0
#include "tensor.h"

#include <limits>

namespace lynx {
namespace {

struct ElementType {
  const char* name;         // in manifests: lynx_compile/passes/build.py, DTYPES
  const char* safetensors;  // null: none there
  int32_t tensorrt;         // nvinfer1::DataType
  size_t bytes;
};

constexpr ElementType kTypes[] = {
    {"fp32", "F32", 0, 4},  {"fp16", "F16", 1, 2}, {"int8", "I8", 2, 1},   {"int32", "I32", 3, 4},
    {"bool", "BOOL", 4, 1}, {"uint8", "U8", 5, 1}, {"bf16", "BF16", 7, 2}, {"int64", "I64", 8, 8},
};

}  // namespace

std::string safetensors_dtype(const std::string& name) {
  for (const ElementType& type : kTypes) {
    if (name == type.safetensors) return type.name;
  }
  return "";
}

std::string tensorrt_dtype(int32_t number) {
  for (const ElementType& type : kTypes) {
    if (number == type.tensorrt) return type.name;
  }
  return "";
}

bool tensor_bytes(const Tensor& tensor, size_t* bytes) {
  for (const ElementType& type : kTypes) {
    if (tensor.dtype != type.name) continue;
    uint64_t product = type.bytes;
    bool empty = false;
    for (const int64_t extent : tensor.shape) {
      if (extent < 0) return false;
      if (extent == 0) empty = true;
      if (extent != 0 && product > uint64_t(std::numeric_limits<int64_t>::max()) / uint64_t(extent))
        return false;
      if (extent != 0) product *= uint64_t(extent);
    }
    *bytes = empty ? 0 : size_t(product);
    return true;
  }
  return false;
}

std::string said(const Tensor& tensor) {
  std::string out = tensor.dtype + " [";
  for (size_t i = 0; i < tensor.shape.size(); ++i)
    out += (i == 0 ? "" : ", ") + std::to_string(tensor.shape[i]);
  return out + "]";
}

size_t Tensor::bytes() const {
  size_t out = 0;
  if (!tensor_bytes(*this, &out)) {
    throw Error("The size of '" + name + "', " + said(*this) + ", is not known.",
                "Give its open extents, or use a newer version for a newer dtype.");
  }
  return out;
}

}  // namespace lynx

// SPDX-License-Identifier: Apache-2.0
// The names of element types, in manifests, safetensors files and TensorRT, and their sizes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "lynx/engine.h"

namespace lynx {

// The manifest's name of a safetensors or TensorRT type; empty for one that engines do not have.
std::string safetensors_dtype(const std::string& name);
std::string tensorrt_dtype(int32_t type);

// False for an unknown dtype, an open extent, or more bytes than there can be.
bool tensor_bytes(const Tensor& tensor, size_t* bytes);

// Such as "fp16 [10, 64, 4]".
std::string said(const Tensor& tensor);

}  // namespace lynx

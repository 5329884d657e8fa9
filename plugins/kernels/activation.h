// SPDX-License-Identifier: Apache-2.0
// The activation functions that kernels fuse, in float32.
#pragma once

#include "sparse24.h"

#if defined(__CUDACC__)
#include "warp.h"
#else
#include <cmath>
#endif

namespace lynx {

// GELU, tanh approximation: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). On the device tanh is the
// hardware's, which is off by at most 2^-11 of itself: the result by |x| 2^-12.
LYNX_HOST_DEVICE float gelu_tanh(float x) {
  const float inner = x * (0.7978845608028654f + 0.035677408136300125f * x * x);
#if defined(__CUDA_ARCH__)
  const float tanh = tanh_approx(inner);
#else
  const float tanh = std::tanh(inner);
#endif
  return 0.5f * x * (1.0f + tanh);
}

LYNX_HOST_DEVICE float silu(float x) {
#if defined(__CUDA_ARCH__)
  return __fdividef(x, 1.0f + __expf(-x));
#else
  return x / (1.0f + std::exp(-x));
#endif
}

}  // namespace lynx

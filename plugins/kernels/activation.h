// SPDX-License-Identifier: Apache-2.0
// The activation functions that kernels fuse, in float32.
#pragma once

#include "sparse24.h"
#include "traits.h"

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

// GELU by the error function: x / 2 (1 + erf(x / sqrt(2))).
LYNX_HOST_DEVICE float gelu_erf(float x) {
#if defined(__CUDA_ARCH__)
  const float erf = erff(x * 0.70710678118654752f);
#else
  const float erf = std::erf(x * 0.70710678118654752f);
#endif
  return 0.5f * x * (1.0f + erf);
}

LYNX_HOST_DEVICE float silu(float x) {
#if defined(__CUDA_ARCH__)
  return __fdividef(x, 1.0f + __expf(-x));
#else
  return x / (1.0f + std::exp(-x));
#endif
}

struct GeluTanh {
  LYNX_HOST_DEVICE float operator()(float x) const { return gelu_tanh(x); }
};
struct GeluErf {
  LYNX_HOST_DEVICE float operator()(float x) const { return gelu_erf(x); }
};
struct Silu {
  LYNX_HOST_DEVICE float operator()(float x) const { return silu(x); }
};

// Calls `use` with the function, and not at all with kNone: a loop over many values then branches once.
template <class Use>
LYNX_HOST_DEVICE void with_activation(Activation activation, const Use& use) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kGeluTanh:
      return use(GeluTanh());
    case Activation::kGeluErf:
      return use(GeluErf());
    case Activation::kSilu:
      return use(Silu());
  }
}

// The same with a branch of its own. The compiler makes one of many that ask for the same activation, and the
// steps of all their values at a time may take registers that there are not.
template <class Use>
LYNX_HOST_DEVICE void with_activation_apart(Activation activation, const Use& use) {
  int number = int(activation);
  asm volatile("" : "+r"(number));
  with_activation(Activation(number), use);
}

}  // namespace lynx

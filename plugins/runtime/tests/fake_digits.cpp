// SPDX-License-Identifier: Apache-2.0
// A transformer of digits-flux's inputs that tests/runtime_cpp states in Python: every input counts.
#include <cuda_fp16.h>

#include "fakes.h"

void fake::run(std::map<std::string, Bound>& tensors) {
  const auto half = [&](const char* name, int64_t i) {
    return __half2float(static_cast<const __half*>(tensors.at(name).address)[i]);
  };
  const auto single = [&](const char* name, int64_t i) {
    return static_cast<const float*>(tensors.at(name).address)[i];
  };
  auto* const velocity = static_cast<__half*>(tensors.at("velocity").address);
  const std::vector<int64_t> shape = tensors.at("hidden_states").shape;  // [batch, tokens, channels]
  const int64_t text =
      tensors.at("encoder_hidden_states").shape[1] * tensors.at("encoder_hidden_states").shape[2];
  const int64_t pooled = tensors.at("pooled_projections").shape[1];
  for (int64_t i = 0; i < shape[0] * shape[1] * shape[2]; ++i) {
    const int64_t image = i / (shape[1] * shape[2]), token = i / shape[2] % shape[1];
    float value = 0.75f * half("hidden_states", i);
    value = value - single("timestep", image);
    value = value + 0.1f * half("pooled_projections", image * pooled);
    value = value + 0.05f * half("encoder_hidden_states", image * text);
    value = value + 0.01f * single("img_ids", 3 * token + 2);
    value = value + single("txt_ids", 0);
    velocity[i] = __float2half(value);
  }
}

// SPDX-License-Identifier: Apache-2.0
// What all ops ask of the parameters that they share: those of a producer, and of an epilogue.
#pragma once

#include "sparse_linear.h"
#include "tile_config.h"

namespace lynx {

constexpr bool is_gelu(Activation activation) {
  return activation == Activation::kGeluTanh || activation == Activation::kGeluErf;
}
constexpr bool is_activation(Activation activation) {
  return is_gelu(activation) || activation == Activation::kSilu;
}

template <class Params>
bool activation_begins_well(const Params& p) {
  return p.activation_from >= 0 && p.activation_from < p.out_channels &&
         p.activation_from % kGeluMultiple == 0;
}

template <class Params>
bool plain_epilogue_fits(const Params& p) {
  return p.activation == Activation::kNone || (is_gelu(p.activation) && activation_begins_well(p));
}

template <class Params>
bool epilogue_fits(const Params& p) {
  if (!p.gated) return plain_epilogue_fits(p);
  return is_activation(p.activation) && activation_begins_well(p) &&
         (p.out_channels - p.activation_from) % kGatedMultiple == 0;
}

template <class Params>
bool producer_fits(const Params& p) {
  switch (p.producer) {
    case Producer::kNone:
      return true;
    case Producer::kGelu:
      return is_gelu(p.producer_activation);
    case Producer::kNorm:
      return p.gain && p.shift && p.gain_rows > 0 && p.rows % p.gain_rows == 0 && p.epsilon > 0.0f;
    case Producer::kGated:
      return p.gate != nullptr && is_activation(p.producer_activation) && p.halves >= Halves::kApart &&
             p.halves <= Halves::kGateFirst;
  }
  return false;
}

}  // namespace lynx

// SPDX-License-Identifier: Apache-2.0
// What the TensorRT side of ops that make x themselves has in common: the producer's attributes, inputs and
// checks.
#pragma once

#include "kernels/sparse_linear.h"
#include "plugin.h"

namespace lynx {

struct ProducerAttributes {
  int32_t activation = 1;  // kGelu: 1: GELU (tanh), 2: GELU (erf); kGated: besides, 3: SiLU
  int32_t halves = 0;      // kGated: as Halves numbers them
  int32_t rms = 0;         // kNorm: RMSNorm instead of LayerNorm
  float epsilon = 1e-6f;   // kNorm
};

// The last two fields of an op whose Attributes have the producer's as `producer`, and how many of them it
// has: TensorRT warns of fields that a node does not give.
template <class Attributes, Producer kProducer>
struct ProducerFields {
  static constexpr bool kNorm = kProducer == Producer::kNorm;
  static constexpr auto kInt = nvinfer1::PluginFieldType::kINT32;
  static constexpr size_t kStart = offsetof(Attributes, producer);
  static constexpr AttributeField kRms = {"rms", kInt, kStart + offsetof(ProducerAttributes, rms)};
  static constexpr AttributeField kEpsilon = {"epsilon", nvinfer1::PluginFieldType::kFLOAT32,
                                              kStart + offsetof(ProducerAttributes, epsilon)};
  static constexpr AttributeField kActivation = {"producer_activation", kInt,
                                                 kStart + offsetof(ProducerAttributes, activation)};
  static constexpr AttributeField kHalves = {"halves", kInt, kStart + offsetof(ProducerAttributes, halves)};
  static constexpr AttributeField kFirst = kNorm ? kRms : kActivation;
  static constexpr AttributeField kSecond = kNorm ? kEpsilon : kHalves;
  static constexpr size_t kCount = kProducer == Producer::kNone ? 0 : kProducer == Producer::kGelu ? 1 : 2;
};

inline bool check_producer(const char* plugin, Producer producer, const ProducerAttributes& a) {
  if (a.rms != 0 && a.rms != 1) return refuse(plugin, "rms is " + std::to_string(a.rms), "Use 0 or 1");
  const Activation most = producer == Producer::kGated ? Activation::kSilu : Activation::kGeluErf;
  if (a.activation < 1 || a.activation > int32_t(most)) {
    return refuse(plugin, "producer_activation is " + std::to_string(a.activation),
                  "Use 1 for GELU (tanh), 2 for GELU (erf), or for a gate 3 for SiLU");
  }
  if (a.halves < 0 || a.halves > int32_t(Halves::kGateFirst)) {
    return refuse(plugin, "halves is " + std::to_string(a.halves),
                  "Use 0 for x and gate apart, 1 for x in the first half, 2 for the gate");
  }
  if (!(a.epsilon > 0.0f)) return refuse(plugin, "epsilon is not positive", "Rewrite the model");
  return true;
}

// K: channels of x, where it is but a half of its tensor; -1 where not known before run time.
inline int64_t channels_of(const ProducerAttributes& a, const Extents& x) {
  return a.halves != 0 && x.last() >= 0 ? x.last() / 2 : x.last();
}

inline bool check_halves(const char* plugin, const ProducerAttributes& a, const Extents& x) {
  if (a.halves == 0 || x.last() < 0 || x.last() % 2 == 0) return true;
  return refuse(plugin, "x has " + std::to_string(x.last()) + " channels, which are no two halves",
                "Rewrite the model with this version of lynx-compile");
}

// Inputs of a producer: in[first] is kNorm's gain or kGated's gate, in[first + 1] kNorm's shift.
template <Producer kProducer, class Inputs>
bool check_producer_shapes(const char* plugin, const Inputs& in, int32_t first, int64_t channels) {
  [[maybe_unused]] const Extents& x = in[kX];
  if constexpr (kProducer == Producer::kNorm) {
    const Extents &gain = in[size_t(first)], &shift = in[size_t(first) + 1];
    const int64_t rows = x.rows(), gain_rows = gain.rows();
    if (!check_extent(plugin, "gain", "channels", gain.last(), channels) ||
        !check_extent(plugin, "shift", "channels", shift.last(), channels) ||
        !check_extent(plugin, "shift", "rows", shift.rows(), gain_rows)) {
      return false;
    }
    if (rows > 0 && gain_rows >= 0 && (gain_rows == 0 || rows % gain_rows != 0)) {
      return refuse(plugin,
                    "gain has " + std::to_string(gain_rows) + " rows for " + std::to_string(rows) + " tokens",
                    "Rewrite the model with this version of lynx-compile");
    }
  }
  if constexpr (kProducer == Producer::kGated) {
    const Extents& gate = in[size_t(first)];
    return check_extent(plugin, "gate", "channels", gate.last(), x.last()) &&
           check_extent(plugin, "gate", "rows", gate.rows(), x.rows());
  }
  return true;
}

// Sets what a kernel is told of the producer, but for pointers.
template <Producer kProducer, class Params, class Inputs>
void set_producer_sizes(Params& params, const ProducerAttributes& a, const Inputs& in, int32_t first) {
  params.producer = kProducer;
  params.producer_activation = Activation(a.activation);
  params.halves = Halves(a.halves);
  params.rms = a.rms != 0;
  params.epsilon = a.epsilon;
  if constexpr (kProducer == Producer::kNorm) params.gain_rows = in[size_t(first)].rows();
}

template <Producer kProducer, class Params>
void set_producer_inputs(Params& params, const void* const* inputs, int32_t first) {
  if constexpr (kProducer == Producer::kNorm) params.gain = inputs[first], params.shift = inputs[first + 1];
  if constexpr (kProducer == Producer::kGated) params.gate = inputs[first];
}

}  // namespace lynx

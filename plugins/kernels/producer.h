// SPDX-License-Identifier: Apache-2.0
// What the passes that make x themselves take of an op's parameters alike.
#pragma once

#include "sparse_linear.h"

namespace lynx {

// Sets x and what is made of it: pointers, strides in elements, and the norm's numbers.
template <class Args, class Params>
void set_producer(Args& args, const Params& params) {
  args.x = static_cast<const uint16_t*>(params.x);
  args.x_stride = params.channels;
  args.activation = params.producer_activation;
  if (params.producer == Producer::kNorm) {
    args.gain = static_cast<const uint16_t*>(params.gain);
    args.shift = static_cast<const uint16_t*>(params.shift);
    args.rows_per_gain = params.rows / params.gain_rows;
    args.epsilon = params.epsilon;
    args.rms = params.rms;
  }
  if (params.producer == Producer::kGated) {
    args.gate = static_cast<const uint16_t*>(params.gate);
    if (params.halves != Halves::kApart) args.x_stride *= 2;
    // fault: half of the gate
    if (params.halves == Halves::kXFirst) args.gate += params.channels;
    if (params.halves == Halves::kGateFirst) args.x += params.channels;
  }
}

}  // namespace lynx

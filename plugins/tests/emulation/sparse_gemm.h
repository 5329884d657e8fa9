// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/sparse_linear.h"

namespace emulation {

// What choose_kernels answers.
extern lynx::Kernels kernels;

}  // namespace emulation

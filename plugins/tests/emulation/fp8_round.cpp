// SPDX-License-Identifier: Apache-2.0
#include "device.h"

#include "kernels/fp8_round.cu"

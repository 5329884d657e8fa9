// SPDX-License-Identifier: Apache-2.0
// One launch function per element type and tile configuration; each lives in its own instantiation file.
#pragma once

#include "sparse_linear.h"
#include "tile_config.h"

namespace lynx {

using SparseGemmLaunch = cudaError_t(const SparseLinearParams&, const CompressedOperand&, int device,
                                     cudaStream_t);

SparseGemmLaunch launch_gemm_bf16_medium, launch_gemm_bf16_small;
SparseGemmLaunch launch_gemm_fp16_medium, launch_gemm_fp16_small;

SparseGemmLaunch launch_gemm_sm90_bf16_wide, launch_gemm_sm90_bf16_narrow;
SparseGemmLaunch launch_gemm_sm90_fp16_wide, launch_gemm_sm90_fp16_narrow;

// Number of tile configurations, and the function of one.
int tile_count(Kernels kernels);
SparseGemmLaunch* tile_launch(Kernels kernels, DType dtype, int tile);

}  // namespace lynx

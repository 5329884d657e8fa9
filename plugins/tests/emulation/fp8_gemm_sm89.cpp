// SPDX-License-Identifier: Apache-2.0
#include "device.h"

#include "kernels/fp8_gemm_sm89_bf16_activation.cu"
#include "kernels/fp8_gemm_sm89_bf16_dense.cu"
#include "kernels/fp8_gemm_sm89_bf16_weight.cu"
#include "kernels/fp8_gemm_sm89_fp16_activation.cu"
#include "kernels/fp8_gemm_sm89_fp16_dense.cu"
#include "kernels/fp8_gemm_sm89_fp16_weight.cu"

// SPDX-License-Identifier: Apache-2.0
// The library's two exported functions, by which TensorRT's plugin registry finds the creators and gives a
// logger.
#include "fp8_plugin.h"
#include "log.h"
#include "sparse_linear_plugin.h"
#include "sparse_weight_plugin.h"

#define LYNX_EXPORT extern "C" __attribute__((visibility("default")))

LYNX_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static lynx::Creator<lynx::SparseLinearOp<lynx::Producer::kNone>> sparse_linear;
  static lynx::Creator<lynx::SparseLinearOp<lynx::Producer::kNorm>> norm_sparse_linear;
  static lynx::Creator<lynx::SparseLinearOp<lynx::Producer::kGelu>> gelu_sparse_linear;
  static lynx::Creator<lynx::SparseLinearOp<lynx::Producer::kGated>> gated_sparse_linear;
  static lynx::Creator<lynx::SparseWeightOp> sparse_weight_linear;
  using lynx::Producer;
  static lynx::Creator<lynx::Fp8Op<false, Producer::kNone>> fp8_linear;
  static lynx::Creator<lynx::Fp8Op<false, Producer::kNorm>> norm_fp8_linear;
  static lynx::Creator<lynx::Fp8Op<false, Producer::kGelu>> gelu_fp8_linear;
  static lynx::Creator<lynx::Fp8Op<false, Producer::kGated>> gated_fp8_linear;
  static lynx::Creator<lynx::Fp8Op<true, Producer::kNone>> fp8_weight_linear;
  static lynx::Creator<lynx::Fp8Op<true, Producer::kNorm>> norm_fp8_weight_linear;
  static lynx::Creator<lynx::Fp8Op<true, Producer::kGelu>> gelu_fp8_weight_linear;
  static lynx::Creator<lynx::Fp8Op<true, Producer::kGated>> gated_fp8_weight_linear;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {
      &sparse_linear,          &norm_sparse_linear, &gelu_sparse_linear,     &gated_sparse_linear,
      &sparse_weight_linear,   &fp8_linear,         &norm_fp8_linear,        &gelu_fp8_linear,
      &gated_fp8_linear,       &fp8_weight_linear,  &norm_fp8_weight_linear, &gelu_fp8_weight_linear,
      &gated_fp8_weight_linear};
  count = int32_t(sizeof creators / sizeof creators[0]);
  return creators;
}

LYNX_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { lynx::set_logger_finder(finder); }

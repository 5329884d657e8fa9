// SPDX-License-Identifier: Apache-2.0
// The library's two exported functions, by which TensorRT's plugin registry finds the creators and gives a
// logger.
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
  static nvinfer1::IPluginCreatorInterface* const creators[] = {
      &sparse_linear, &norm_sparse_linear, &gelu_sparse_linear, &gated_sparse_linear, &sparse_weight_linear};
  count = int32_t(sizeof creators / sizeof creators[0]);
  return creators;
}

LYNX_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { lynx::set_logger_finder(finder); }

// SPDX-License-Identifier: Apache-2.0
// The library's two exported functions, by which TensorRT's plugin registry finds the creators and gives a
// logger.
#include "log.h"
#include "sparse_linear_plugin.h"

#define LYNX_EXPORT extern "C" __attribute__((visibility("default")))

LYNX_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static lynx::SparseLinearCreator sparse_linear;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&sparse_linear};
  count = 1;
  return creators;
}

LYNX_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { lynx::set_logger_finder(finder); }

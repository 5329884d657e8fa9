// SPDX-License-Identifier: Apache-2.0
// Messages into TensorRT's log.
#pragma once

#include <NvInferRuntime.h>

namespace lynx {

// Set once by TensorRT when it loads the library.
void set_logger_finder(nvinfer1::ILoggerFinder* finder);

// Logs an error through the logger of the calling engine, builder or runtime; to stderr when there is none.
void log_error(const char* message) noexcept;

}  // namespace lynx

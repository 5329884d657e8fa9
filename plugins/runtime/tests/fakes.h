// SPDX-License-Identifier: Apache-2.0
// What the stand-ins for CUDA and TensorRT 10 let a test see and decide. Linked in place of the real
// libraries; their "device memory" is ordinary memory, so that a fake engine's work is a function of the
// test's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace fake {

// The GPU.
struct Cuda {
  int devices = 1;
  int architecture = 89;
  int fail_allocation = -1;                      // the n-th from now on fails; -1: none
  int allocations = 0, streams = 0, events = 0;  // alive
  std::function<void()> on_copy;                 // called at each copy, if there is one
};
Cuda& cuda();

// TensorRT. An engine's plan is text: the line "fake engine", then for each tensor
// "input|output NAME DTYPE EXTENTS...", dtype as a number of nvinfer1::DataType.
struct TensorRT {
  bool refuse_engine = false, refuse_context = false, refuse_address = false, refuse_run = false;
  bool refuse_library = false;
  int runtimes = 0, engines = 0, contexts = 0;  // alive
  std::vector<std::string> libraries;           // loaded into the registry
};
TensorRT& tensorrt();

struct Bound {
  std::vector<int64_t> shape;
  void* address = nullptr;
};

// What an engine does; the test's own. By tensor name.
void run(std::map<std::string, Bound>& tensors);

}  // namespace fake

// SPDX-License-Identifier: Apache-2.0
// Shows what the runtime makes of a file, and which layout it calls TensorRT by, for tests/runtime_cpp to
// compare:
//
//   runtime_probe sha256 FILE | safetensors FILE | manifest FILE | runs_on FILE GPU | layout 10|11 | library
#include <cstdio>
#include <cstring>
#include <string>

#include "file.h"
#include "lynx/safetensors.h"
#include "manifest.h"
#include "sha256.h"
#include "tensor.h"
#include "tensorrt.h"

namespace {

void print_tensors(const char* what, const std::vector<lynx::Tensor>& tensors) {
  for (const lynx::Tensor& tensor : tensors)
    std::printf("%s %s %s\n", what, tensor.name.c_str(), lynx::said(tensor).c_str());
}

void print_manifest(const lynx::Manifest& manifest) {
  std::printf("engine %s\nbackend %s %s\nplugin %s\nweights %s\n", manifest.engine_sha256.c_str(),
              manifest.backend.c_str(), manifest.backend_version.c_str(), manifest.plugin_sha256.c_str(),
              manifest.weights_file.c_str());
  print_tensors("input", manifest.inputs);
  print_tensors("output", manifest.outputs);
  print_tensors("weight", manifest.weights);
}

void print_layout(const lynx::tensorrt::Layout& layout) {
  std::printf(
      "deserialize %d\ntensor_count %d\ntensor_name %d\ntensor_mode %d\ntensor_shape %d\ntensor_dtype %d\n"
      "create_context %d\nset_tensor_address %d\nset_input_shape %d\ncontext_tensor_shape %d\nenqueue %d\n"
      "load_library %d\n",
      layout.deserialize, layout.tensor_count, layout.tensor_name, layout.tensor_mode, layout.tensor_shape,
      layout.tensor_dtype, layout.create_context, layout.set_tensor_address, layout.set_input_shape,
      layout.context_tensor_shape, layout.enqueue, layout.load_library);
}

// By each code that this CPU runs.
void print_sha256(const lynx::FileBytes& file) {
  for (const lynx::Sha256Blocks blocks : {&lynx::sha256_blocks_portable, lynx::sha256_blocks_of_the_cpu()}) {
    if (blocks == nullptr) continue;
    lynx::Sha256 digest(blocks);
    digest.update(file.data.get(), file.bytes);
    std::printf("%s\n", digest.hex().c_str());
  }
}

void probe(const std::string& what, const std::string& of, const std::string& gpu) {
  if (what == "sha256") {
    print_sha256(lynx::read_file(of, "file"));
  } else if (what == "runs_on") {
    std::printf("%s\n", lynx::runs_on(lynx::read_manifest(of), gpu) ? "yes" : "no");
  } else if (what == "safetensors") {
    const lynx::SafetensorsFile file(of);
    for (const auto& entry : file.entries()) {
      std::vector<std::byte> bytes(entry.bytes);
      file.read(entry, bytes.data());
      std::printf("%s %s %s\n", entry.tensor.name.c_str(), lynx::said(entry.tensor).c_str(),
                  lynx::sha256(bytes.data(), bytes.size()).c_str());
    }
  } else if (what == "manifest") {
    print_manifest(lynx::read_manifest(of));
  } else if (what == "layout") {
    print_layout(of == "10" ? lynx::tensorrt::kTensorRT10 : lynx::tensorrt::kTensorRT11);
  } else {
    const lynx::tensorrt::Library library = lynx::tensorrt::library();
    std::printf("%s %s %s\n", library.backend.c_str(), library.version.c_str(),
                library.layout == &lynx::tensorrt::kTensorRT10 ? "10" : "11");
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    probe(argc > 1 ? argv[1] : "", argc > 2 ? argv[2] : "", argc > 3 ? argv[3] : "");
  } catch (const lynx::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return 0;
}

// SPDX-License-Identifier: Apache-2.0
// Draws digits with the engine of engines/digits-flux.yaml: denoises a seed file's noise and writes a picture
// of it.
//
//   python -m calib.digits_flux.seed seed.safetensors
//   digits engines/digits-flux.engine seed.safetensors digits.png [LIBRARY]
//
// LIBRARY is the plugin library; without it, the one beside the engine, or the engine's own copy.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "lynx/engine.h"
#include "lynx/safetensors.h"
#include "png.h"

namespace {

// calib/digits_flux: a token is a patch of 2 x 2 pixels, an image 8 x 8 tokens.
constexpr size_t kPatch = 2, kSide = 8, kSize = kPatch * kSide, kTokens = kSide * kSide;
constexpr size_t kPixels = kSize * kSize;
constexpr size_t kColumns = 10, kCell = kSize + 1, kMagnify = 4;  // of the picture; a line between images
constexpr float kLine = 0.4f;

void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw lynx::Error("CUDA failed (" + std::string(cudaGetErrorString(error)) + ").",
                      "Check the GPU with nvidia-smi.");
}

// ---- Numbers, float32 here and in the engine's dtype there

std::vector<char> to_dtype(const std::vector<float>& values, const std::string& dtype) {
  std::vector<char> out(values.size() * (dtype == "fp32" ? 4 : 2));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == "fp32") {
      std::memcpy(&out[4 * i], &values[i], 4);
    } else if (dtype == "fp16") {
      const __half half = __float2half(values[i]);
      std::memcpy(&out[2 * i], &half, 2);
    } else if (dtype == "bf16") {
      const __nv_bfloat16 half = __float2bfloat16(values[i]);
      std::memcpy(&out[2 * i], &half, 2);
    } else {
      throw lynx::Error("The engine has an input of " + dtype + ".", "Give a digits-flux engine.");
    }
  }
  return out;
}

std::vector<float> from_dtype(const std::vector<char>& bytes, const std::string& dtype) {
  std::vector<float> out(bytes.size() / (dtype == "fp32" ? 4 : 2));
  for (size_t i = 0; i < out.size(); ++i) {
    if (dtype == "fp32") {
      std::memcpy(&out[i], &bytes[4 * i], 4);
    } else if (dtype == "fp16") {
      __half half;
      std::memcpy(&half, &bytes[2 * i], 2);
      out[i] = __half2float(half);
    } else {
      __nv_bfloat16 half;
      std::memcpy(&half, &bytes[2 * i], 2);
      out[i] = __bfloat162float(half);
    }
  }
  return out;
}

std::vector<float> floats(const lynx::SafetensorsFile& file, const std::string& name) {
  const lynx::SafetensorsFile::Entry& entry = file.at(name);
  if (entry.tensor.dtype != "fp32")
    throw lynx::Error("'" + name + "' of the seed file is " + entry.tensor.dtype + ".",
                      "Write the file again.");
  std::vector<float> out(entry.bytes / 4);
  file.read(entry, out.data());
  return out;
}

// ---- The engine

// Device memory for each input and output, and a stream.
class Transformer {
 public:
  explicit Transformer(lynx::Engine& engine) : engine_(engine) {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    for (const auto* tensors : {&engine.inputs(), &engine.outputs()}) {
      for (const lynx::Tensor& tensor : *tensors) {
        check(cudaMalloc(&memory_[tensor.name], tensor.bytes()));
        engine.bind(tensor.name, memory_[tensor.name]);
      }
    }
  }
  ~Transformer() {
    for (const auto& [name, address] : memory_) cudaFree(address);
    cudaStreamDestroy(stream_);
  }
  Transformer(const Transformer&) = delete;
  Transformer& operator=(const Transformer&) = delete;

  void set(const lynx::Tensor& input, const std::vector<float>& values) {
    const std::vector<char> bytes = to_dtype(values, input.dtype);
    if (bytes.size() != input.bytes()) {
      throw lynx::Error(
          "The seed file has " + std::to_string(values.size()) + " numbers for '" + input.name + "'.",
          "Write one for this engine's batch.");
    }
    check(
        cudaMemcpyAsync(memory_.at(input.name), bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream_));
    check(cudaStreamSynchronize(stream_));  // before `bytes` goes
  }

  std::vector<float> run() {
    const lynx::Tensor& velocity = engine_.outputs().at(0);
    std::vector<char> bytes(velocity.bytes());
    engine_.enqueue(stream_);
    check(cudaMemcpyAsync(bytes.data(), memory_.at(velocity.name), bytes.size(), cudaMemcpyDeviceToHost,
                          stream_));
    check(cudaStreamSynchronize(stream_));
    return from_dtype(bytes, velocity.dtype);
  }

 private:
  lynx::Engine& engine_;
  cudaStream_t stream_ = nullptr;
  std::map<std::string, void*> memory_;
};

const lynx::Tensor& input_named(const lynx::Engine& engine, const std::string& name) {
  for (const lynx::Tensor& input : engine.inputs()) {
    if (input.name == name) return input;
  }
  throw lynx::Error("The engine has no input '" + name + "'.", "Give a digits-flux engine.");
}

// Euler's method on the flow from noise (sigma 1) to the image (sigma 0), as FlowMatchEulerDiscreteScheduler
// does it.
std::vector<float> denoise(lynx::Engine& engine, const lynx::SafetensorsFile& seed) {
  const lynx::Tensor& latents_input = input_named(engine, "hidden_states");
  const lynx::Tensor& timestep_input = input_named(engine, "timestep");
  std::vector<float> latents = floats(seed, "latents");
  const std::vector<float> sigmas = floats(seed, "sigmas"), timesteps = floats(seed, "timesteps");
  if (sigmas.size() != timesteps.size() + 1 || engine.outputs().at(0).shape != latents_input.shape)
    throw lynx::Error("The seed file or the engine is not digits-flux's.", "Write the seed file again.");
  Transformer transformer(engine);
  for (const lynx::Tensor& input : engine.inputs()) {
    if (&input != &latents_input && &input != &timestep_input)
      transformer.set(input, floats(seed, input.name));
  }
  const size_t batch = timestep_input.bytes() / to_dtype({0.0f}, timestep_input.dtype).size();
  for (size_t step = 0; step < timesteps.size(); ++step) {
    transformer.set(latents_input, latents);
    transformer.set(timestep_input, std::vector<float>(batch, timesteps[step]));
    const std::vector<float> velocity = transformer.run();
    const float length = sigmas[step + 1] - sigmas[step];
    for (size_t i = 0; i < latents.size(); ++i) latents[i] += length * velocity[i];
  }
  return latents;
}

// ---- The picture

uint8_t grey(float brightness) {
  return uint8_t(std::nearbyint(255.0f * std::min(std::max(0.0f, brightness), 1.0f)));  // NaN: black
}

// Latents [n, tokens, 4] in [-1, 1] as a sheet of images, kColumns a row.
void write_sheet(const std::string& path, const std::vector<float>& latents) {
  const size_t images = latents.size() / kPixels, rows = (images + kColumns - 1) / kColumns;
  const size_t width = kColumns * kCell * kMagnify, height = rows * kCell * kMagnify;
  std::vector<uint8_t> pixels(width * height, grey(kLine));
  for (size_t y = 0; y < height; ++y) {
    for (size_t x = 0; x < width; ++x) {
      const size_t row = y / kMagnify % kCell, column = x / kMagnify % kCell;
      const size_t image = y / kMagnify / kCell * kColumns + x / kMagnify / kCell;
      if (row == kSize || column == kSize || image >= images) continue;
      const size_t token = row / kPatch * kSide + column / kPatch;
      const size_t channel = row % kPatch * kPatch + column % kPatch;
      const float value = latents[(image * kTokens + token) * kPatch * kPatch + channel];
      pixels[y * width + x] = grey((value + 1.0f) / 2.0f);
    }
  }
  write_png(path, pixels, uint32_t(width), uint32_t(height));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4 && argc != 5) {
    std::fprintf(stderr, "usage: digits ENGINE SEED.safetensors OUT.png [LIBRARY]\n");
    return 2;
  }
  try {
    lynx::Options options;
    if (argc == 5) options.plugin_library = argv[4];
    const lynx::SafetensorsFile seed(argv[2]);
    lynx::Engine engine = lynx::Engine::open(argv[1], options);
    write_sheet(argv[3], denoise(engine, seed));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 3;
  }
  std::printf("%s\n", argv[3]);
  return 0;
}

// SPDX-License-Identifier: Apache-2.0
#include "weights.h"

#include <algorithm>

#include "sha256.h"
#include "tensor.h"

namespace lynx {
namespace {

constexpr size_t kAlignment = 256;           // of every tensor, as TensorRT wants it
constexpr size_t kPiece = size_t(16) << 20;  // bytes of pinned memory, of which there are two
constexpr const char* kStale = "Copy the engine's files again, all of them, or compile it again.";

// A tensor's bytes in the file and its place on the GPU.
struct Range {
  size_t begin, end;
  std::byte* to;
};

// Sorted by place in the file; allocates their memory.
std::vector<Range> place(const WeightsFile& weights, const std::vector<Tensor>& wanted, Weights& out) {
  std::vector<Range> ranges;
  std::vector<size_t> offsets;
  size_t total = 0;
  for (const Tensor& tensor : wanted) {
    const SafetensorsFile::Entry& entry = entry_named(weights.path, weights.header.entries, tensor.name);
    ranges.push_back({size_t(entry.begin), size_t(entry.begin) + entry.bytes, nullptr});
    offsets.push_back(total);
    total += (entry.bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  out.memory = device_memory(total, "the weights");
  for (size_t i = 0; i < wanted.size(); ++i) {
    ranges[i].to = static_cast<std::byte*>(out.memory.get()) + offsets[i];
    out.addresses[wanted[i].name] = ranges[i].to;
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  return ranges;
}

// Queues the copies of what of `piece`, bytes begin .. end of the file, belongs to a tensor.
void copy_piece(const std::vector<Range>& ranges, size_t begin, size_t end, const std::byte* piece,
                cudaStream_t stream) {
  for (const Range& range : ranges) {
    const size_t first = std::max(range.begin, begin), last = std::min(range.end, end);
    if (first >= last) continue;
    check(cudaMemcpyAsync(range.to + (first - range.begin), piece + (first - begin), last - first,
                          cudaMemcpyHostToDevice, stream),
          "copying the weights");
  }
}

}  // namespace

std::unique_ptr<WeightsFile> open_weights(const std::string& path, const std::vector<Tensor>& wanted) {
  if (path.empty()) return nullptr;
  std::unique_ptr<WeightsFile> out(new WeightsFile{path, {path, "weights file"}, {}});
  out->header = read_header(path, out->file);
  for (const Tensor& tensor : wanted) {
    const Tensor& found = entry_named(path, out->header.entries, tensor.name).tensor;
    if (found.dtype == tensor.dtype && found.shape == tensor.shape) continue;
    throw Error(
        path + ": '" + tensor.name + "' is " + said(found) + ", and the engine takes " + said(tensor) + ".",
        kStale);
  }
  return out;
}

Weights load_weights(const WeightsFile& weights, const std::string& sha256,
                     const std::vector<Tensor>& wanted) {
  const File& file = weights.file;
  const std::vector<std::byte>& header = weights.header.bytes;
  Weights out;
  const std::vector<Range> ranges = place(weights, wanted, out);
  const Stream stream = make_stream();
  const PinnedMemory pinned[2] = {pinned_memory(kPiece), pinned_memory(kPiece)};
  const Event copied[2] = {make_event(), make_event()};
  Sha256 digest;
  digest.update(header.data(), header.size());  // the very bytes that were understood
  try {
    for (size_t begin = header.size(), turn = 0; begin < file.bytes(); begin += kPiece, turn ^= 1) {
      const size_t bytes = std::min(kPiece, file.bytes() - begin);
      auto* const piece = static_cast<std::byte*>(pinned[turn].get());
      check(cudaEventSynchronize(copied[turn].get()),
            "copying the weights");  // the piece before the last is gone
      file.read(begin, piece, bytes);
      digest.update(piece, bytes);
      copy_piece(ranges, begin, begin + bytes, piece, stream.get());
      check(cudaEventRecord(copied[turn].get(), stream.get()), "copying the weights");
    }
  } catch (...) {  // the GPU may still read the pinned memory that is freed then
    cudaStreamSynchronize(stream.get());
    throw;
  }
  check(cudaStreamSynchronize(stream.get()), "copying the weights");
  if (digest.hex() != sha256)
    throw Error(weights.path + " is damaged, or of another engine (SHA-256).", kStale);
  return out;
}

}  // namespace lynx

// SPDX-License-Identifier: Apache-2.0
// The C++ runtime against stand-ins for CUDA and TensorRT 10: order of calls, lifetimes, every clash of
// files, and mutated files. Needs no GPU. Built with the address and undefined-behaviour sanitizers.
#include <elf.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fakes.h"
#include "host_code.h"
#include "log.h"
#include "lynx/engine.h"
#include "lynx/safetensors.h"
#include "manifest.h"
#include "sha256.h"
#include "tensorrt.h"

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

int passed = 0, failed = 0;

void report(bool ok, const std::string& name, const std::string& detail = "") {
  std::printf("%s %s%s%s\n", ok ? "PASS" : "FAIL", name.c_str(), detail.empty() ? "" : ": ", detail.c_str());
  std::fflush(stdout);
  ++(ok ? passed : failed);
}

// That `work` throws one lynx::Error, whose cause holds `cause`, and which says what to do.
void refuses(const std::string& name, const std::string& cause, const std::function<void()>& work) {
  try {
    work();
    report(false, name, "nothing was thrown");
  } catch (const lynx::Error& error) {
    const bool says = error.cause().find(cause) != std::string::npos && error.remedy().size() > 4;
    report(says && error.what() == error.cause() + " " + error.remedy(), name, error.what());
  } catch (const std::exception& error) {
    report(false, name, std::string("not an Error: ") + error.what());
  }
}

const std::byte* bytes_of(const std::string& text) { return reinterpret_cast<const std::byte*>(text.data()); }
std::string digest(const std::string& text) { return lynx::sha256(bytes_of(text), text.size()); }

// ---- Files of an engine

void write(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

std::string safetensors(const json& header, const std::string& data, uint64_t length_off = 0) {
  const std::string text = header.dump();
  const uint64_t length = text.size() + length_off;
  std::string out;
  for (int i = 0; i < 8; ++i) out += char(length >> (8 * i) & 0xff);
  return out + text + data;
}

json entry(const std::string& dtype, const std::vector<int64_t>& shape, int64_t begin, int64_t end) {
  return {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {begin, end}}};
}

// A library of `bytes`, the table of sections last.
std::string library_of(size_t bytes, char content) {
  Elf64_Ehdr header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = ELFCLASS64, header.e_ident[EI_DATA] = ELFDATA2LSB,
  header.e_ident[EI_VERSION] = 1;
  header.e_machine = EM_X86_64, header.e_shentsize = 64, header.e_shnum = 2, header.e_shoff = bytes - 128;
  std::string out(bytes, content);
  std::memcpy(out.data(), &header, sizeof header);
  return out;
}

// A folder with flux.engine, its manifest, its library and its weights: y = x * weight[0], and `count`
// numbers more.
class Files {
 public:
  explicit Files(int32_t count = 100) {
    char name[] = "/tmp/lynx_runtime_XXXXXX";
    folder = ::mkdtemp(name);
    plan = "fake engine\ninput x 0 2 3\ninput weight 0 4\ninput large 3 " + std::to_string(count) +
           "\noutput y 0 2 3\n";
    std::string numbers(16 + 4 * size_t(count), '\0');
    const float weight[4] = {3.0f, 0.0f, 0.0f, 0.0f};
    std::memcpy(numbers.data(), weight, sizeof weight);
    for (int32_t i = 0; i < count; ++i) std::memcpy(&numbers[16 + 4 * size_t(i)], &i, 4);
    weights = safetensors(
        {{"weight", entry("F32", {4}, 0, 16)}, {"large", entry("I32", {count}, 16, 16 + 4 * count)}},
        numbers);
    library = library_of(500, 'a');
    manifest = {
        {"format_version", 2},
        {"engine", {{"file", "flux.engine"}, {"bytes", plan.size()}, {"sha256", digest(plan)}}},
        {"backend", {{"name", "tensorrt"}, {"version", "10.14.1.48"}}},
        {"gpus", {"sm80", "sm89"}},
        {"plugin", {{"library", "liblynx_plugin.so"}, {"sha256", digest(library)}, {"embedded", false}}},
        {"inputs", {{{"name", "x"}, {"dtype", "fp32"}, {"shape", {2, 3}}}}},
        {"outputs", {{{"name", "y"}, {"dtype", "fp32"}, {"shape", {2, 3}}}}},
        {"weights",
         {{"mode", "external"},
          {"file", "flux.safetensors"},
          {"sha256", digest(weights)},
          {"tensors",
           {{{"name", "weight"}, {"dtype", "fp32"}, {"shape", {4}}},
            {{"name", "large"}, {"dtype", "int32"}, {"shape", {count}}}}}}}};
    save();
  }
  ~Files() { fs::remove_all(folder); }
  Files(const Files&) = delete;
  Files& operator=(const Files&) = delete;

  void save() const {
    write(engine(), plan);
    write(folder / "flux.json", manifest.dump());
    write(folder / "flux.safetensors", weights);
    write(folder / "liblynx_plugin.so", library);
  }
  // Another plan, with a manifest that fits.
  void set_plan(const std::string& bytes) {
    plan = bytes;
    manifest["engine"]["bytes"] = plan.size(), manifest["engine"]["sha256"] = digest(plan);
  }
  std::string engine() const { return (folder / "flux.engine").string(); }

  fs::path folder;
  std::string plan, weights, library;
  json manifest;
};

// ---- SHA-256: FIPS 180-4's examples; tests/runtime_cpp compares it with Python's

void test_sha256_by(const std::string& code, lynx::Sha256Blocks blocks) {
  const auto of = [&](const std::string& text, size_t piece) {
    lynx::Sha256 digest(blocks);
    for (size_t at = 0; at < text.size(); at += piece)
      digest.update(bytes_of(text) + at, std::min(piece, text.size() - at));
    return digest.hex();
  };
  const auto is = [&](const std::string& name, const std::string& text, const std::string& due) {
    report(of(text, 1 << 20) == due, "SHA-256 by " + code + " of " + name);
  };
  is("nothing", "", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  is("abc", "abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  is("two blocks", "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
     "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  is("a million a", std::string(1000000, 'a'),
     "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  bool same = true;
  for (size_t bytes = 0; bytes < 300; ++bytes) {
    std::string text(bytes, '\0');
    for (size_t i = 0; i < bytes; ++i) text[i] = char(7 * i + bytes);
    for (const size_t piece : {1, 7, 63, 64, 65, 130}) same &= of(text, piece) == digest(text);
  }
  report(same, "SHA-256 by " + code + " in pieces");
}

void test_sha256() {
  test_sha256_by("plain C++", lynx::sha256_blocks_portable);
  if (lynx::sha256_blocks_of_the_cpu() == nullptr) return report(true, "this CPU has no SHA instructions");
  test_sha256_by("the CPU", lynx::sha256_blocks_of_the_cpu());
}

// ---- safetensors

void test_safetensors(const fs::path& folder) {
  const std::string path = (folder / "t.safetensors").string();
  const std::string data("0123456789abcdef");
  const json good = {{"a", entry("F16", {2, 2}, 0, 8)},
                     {"b", entry("I64", {1}, 8, 16)},
                     {"none", entry("F32", {0, 3}, 8, 8)},
                     {"__metadata__", {{"format", "pt"}}}};
  write(path, safetensors(good, data));
  const lynx::SafetensorsFile file(path);
  bool ok = file.entries().size() == 3 && file.at("a").bytes == 8 && file.at("a").tensor.dtype == "fp16" &&
            file.at("b").tensor.shape == std::vector<int64_t>{1} && file.at("none").bytes == 0;
  char b[8];
  file.read(file.at("b"), b);
  ok &= std::memcmp(b, "89abcdef", 8) == 0;
  report(ok, "safetensors: tensors are where the header says");
  fs::resize_file(path, fs::file_size(path) - 1);
  refuses("safetensors: cut off behind its back", "was cut off while it was read",
          [&] { file.read(file.at("b"), b); });
  refuses("safetensors: no such tensor", "no tensor 'c'", [&] { file.at("c"); });

  const auto bad = [&](const std::string& name, const std::string& cause, const std::string& bytes) {
    write(path, bytes);
    refuses("safetensors: " + name, cause, [&] { lynx::SafetensorsFile{path}; });
  };
  const auto with = [&](const char* key, const json& value) {
    json header = good;
    header[key] = value;
    return safetensors(header, data);
  };
  bad("empty", "ends within its header", "");
  bad("cut in the length", "ends within its header", safetensors(good, data).substr(0, 7));
  bad("cut in the header", "ends within its header", safetensors(good, data).substr(0, 40));
  bad("cut in the data", "lies outside the file",
      safetensors(good, data).substr(0, safetensors(good, data).size() - 1));
  bad("longer than its tensors", "take 16 bytes, and there are 17", safetensors(good, data + "x"));
  bad("a length beyond the file", "ends within its header", safetensors(good, data, 10000));
  bad("a length of 2^63", "would take", safetensors(good, data, uint64_t(1) << 63));
  bad("a length that wraps", "would take", safetensors(good, data, ~uint64_t(0) - good.dump().size()));
  bad("header no JSON", "is no JSON", safetensors("x", data, 1));
  bad("header no mapping", "is no mapping", safetensors(json::array(), ""));
  std::string twice = R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1})";
  twice.insert(0, {char(twice.size()), 0, 0, 0, 0, 0, 0, 0});
  bad("a tensor twice", "is there twice", twice);
  bad("overlap", "overlaps another tensor", with("b", entry("I64", {1}, 7, 15)));
  bad("gap", "leaves a gap", safetensors({{"b", entry("I64", {1}, 8, 16)}}, data));
  bad("end before begin", "outside the file", with("b", entry("I64", {1}, 16, 8)));
  bad("end beyond the file", "outside the file", with("b", entry("I64", {1}, 8, 1 << 20)));
  bad("negative offset", "is wrong", with("b", entry("I64", {1}, -8, 16)));
  bad("shape too large for its bytes", "does not fit its bytes", with("b", entry("I64", {2}, 8, 16)));
  bad("shape that overflows", "does not fit its bytes",
      with("b", entry("I64", {int64_t(1) << 40, int64_t(1) << 40}, 8, 16)));
  bad("negative extent", "is wrong", with("b", entry("I64", {-1}, 8, 16)));
  bad("nine extents", "is wrong", with("b", entry("I64", {1, 1, 1, 1, 1, 1, 1, 1, 1}, 8, 16)));
  bad("unknown dtype", "dtype is unknown", with("b", entry("Q9", {1}, 8, 16)));
  bad("a key too many", "is wrong",
      with("b", {{"dtype", "I64"}, {"shape", {1}}, {"data_offsets", {8, 16}}, {"x", 1}}));
  bad("an offset that is no integer", "is wrong",
      with("b", {{"dtype", "I64"}, {"shape", {1}}, {"data_offsets", {8.5, 16}}}));
  refuses("safetensors: missing", "does not exist", [] { lynx::SafetensorsFile{"/nowhere/x.safetensors"}; });
  refuses("safetensors: a folder", "cannot be read", [&] { lynx::SafetensorsFile{folder.string()}; });
}

// ---- The engine

float x_memory[64] __attribute__((aligned(256))), y_memory[64] __attribute__((aligned(256)));

bool nothing_left() {
  const fake::TensorRT& t = fake::tensorrt();
  const fake::Cuda& c = fake::cuda();
  return t.runtimes + t.engines + t.contexts == 0 && c.allocations + c.streams + c.events == 0;
}

void test_run() {
  const Files files(6000000);  // more than one piece of the upload
  {
    auto engine = std::make_unique<lynx::Engine>(lynx::Engine::open(files.engine()));
    report(engine->inputs().size() == 1 && engine->inputs()[0].name == "x" &&
               engine->inputs()[0].bytes() == 24 && engine->outputs().size() == 1 &&
               engine->weights().size() == 2,
           "inputs, outputs and weights are the manifest's");
    report(fake::tensorrt().libraries.size() == 1, "the plugin library was loaded");
    refuses("run before binding", "refuses to run", [&] { engine->enqueue(nullptr); });
    refuses("a name that is none", "no tensor 'z'", [&] { engine->bind("z", x_memory); });
    refuses("no memory", "multiple of 256", [&] { engine->bind("x", nullptr); });
    refuses("memory between", "multiple of 256", [&] { engine->bind("x", x_memory + 1); });
    engine->bind("x", x_memory), engine->bind("y", y_memory);
    for (int i = 0; i < 6; ++i) x_memory[i] = float(i + 1);
    engine->enqueue(nullptr);
    report(y_memory[0] == 3.0f && y_memory[5] == 18.0f, "run with the weights from the file");
    report(engine->shape("y") == std::vector<int64_t>({2, 3}), "shape of an output");
    engine->set_shape("x", {1, 3});
    report(engine->shape("x") == std::vector<int64_t>({1, 3}), "shape of an input, set");
    refuses("a shape of other rank", "refuses the shape", [&] { engine->set_shape("x", {1}); });
    refuses("nine extents", "at most 8", [&] { engine->set_shape("x", std::vector<int64_t>(9, 1)); });

    lynx::Context second = engine->create_context();
    static float other[64] __attribute__((aligned(256)));
    refuses("contexts share no addresses", "refuses to run", [&] { second.enqueue(nullptr); });
    second.bind("x", x_memory), second.bind("y", other);
    static const float lora[4] __attribute__((aligned(256))) = {-1.0f, 0.0f, 0.0f, 0.0f};
    second.bind("weight", const_cast<float*>(lora));
    engine.reset();  // the context goes on
    second.enqueue(nullptr);
    report(other[2] == -3.0f, "a context outlives its engine, and takes another weight");
    report(fake::tensorrt().engines == 1 && fake::tensorrt().contexts == 1,
           "and the engine's first context is gone");
  }
  report(nothing_left(), "all is freed");
}

// A mapping would end the process here.
// As files/outputs.py names them.
void test_names() {
  const std::pair<const char*, const char*> names[] = {
      {"FLUX.1-dev", "FLUX.1-dev.json"}, {"x.plan", "x.plan.json"}, {".engine", ".engine.json"}};
  for (const auto& [engine, manifest] : names) {
    const Files files;
    fs::rename(files.engine(), files.folder / engine);
    fs::rename(files.folder / "flux.json", files.folder / manifest);
    report(lynx::Engine::open((files.folder / engine).string()).inputs().size() == 1, manifest);
  }
}

void test_weights_cut_off() {
  const Files files(6000000);
  fake::cuda().on_copy = [&] {
    fake::cuda().on_copy = nullptr;
    fs::resize_file(files.folder / "flux.safetensors", 1 << 20);
  };
  refuses("weights cut off while they are copied", "was cut off while it was read",
          [&] { lynx::Engine::open(files.engine()); });
  report(nothing_left(), "and nothing is left behind");
}

// Two compilations of one model: everything fits but the digests.
void test_files_of_two_runs() {
  const Files one;
  Files other;
  const size_t at = other.weights.size() - 1;
  other.weights[at] = char(other.weights[at] ^ 1);
  other.manifest["weights"]["sha256"] = digest(other.weights);
  other.set_plan(other.plan + "# another run\n");
  other.save();
  const auto mixed = [&](const std::string& name, const char* file, const std::string& cause) {
    const Files mix;
    for (const char* each : {"flux.engine", "flux.json", "flux.safetensors"}) {
      const fs::path& from = each == std::string(file) ? other.folder : one.folder;
      fs::copy_file(from / each, mix.folder / each, fs::copy_options::overwrite_existing);
    }
    refuses(name, cause, [&] { lynx::Engine::open(mix.engine()); });
  };
  mixed("the engine of another run", "flux.engine", "is too long");
  mixed("the manifest of another run", "flux.json", "is cut off");
  mixed("the weights of another run", "flux.safetensors", "is damaged, or of another engine");
  lynx::Engine::open(other.engine());
  report(nothing_left(), "each by itself runs");
}

void test_versions() {
  using lynx::tensorrt::kTensorRT10, lynx::tensorrt::kTensorRT11, lynx::tensorrt::layout_of;
  const auto is = [](int major, int minor, const lynx::tensorrt::Layout* layout) {
    report(layout_of(major, minor) == layout,
           "layout of version " + std::to_string(major) + "." + std::to_string(minor));
  };
  is(10, 13, &kTensorRT10), is(10, 14, &kTensorRT10), is(10, 16, &kTensorRT10);
  is(11, 0, &kTensorRT11), is(11, 4, &kTensorRT11), is(1, 7, &kTensorRT11);
  for (const auto& [major, minor] : std::vector<std::pair<int, int>>{
           {10, 12}, {10, 17}, {11, 5}, {1, 6}, {1, 8}, {12, 0}, {9, 3}, {0, 0}, {2, 7}}) {
    is(major, minor, nullptr);
  }
}

void test_moves() {
  const Files files;
  std::vector<lynx::Engine> engines;
  for (int i = 0; i < 3; ++i) engines.push_back(lynx::Engine::open(files.engine()));
  engines.erase(engines.begin());
  engines[0] = std::move(engines[1]);
  engines.pop_back();
  engines[0].bind("x", x_memory), engines[0].bind("y", y_memory);
  engines[0].enqueue(nullptr);
  report(fake::tensorrt().libraries.size() == 1, "a library is loaded once");
  engines.clear();
  report(nothing_left(), "engines can be moved");
}

// Each file wrong in each way: one Error, nothing left behind.
void test_clashes() {
  const auto clash = [](const std::string& name, const std::string& cause,
                        const std::function<void(Files&)>& spoil) {
    Files files;
    spoil(files);
    files.save();
    refuses(name, cause, [&] { lynx::Engine::open(files.engine()); });
    fake::cuda() = {};
    fake::TensorRT fresh;
    fresh.libraries = fake::tensorrt().libraries;
    const bool clean = nothing_left();
    fake::tensorrt() = fresh;
    report(clean, name + ": nothing is left behind");
  };
  const auto set = [](const char* pointer, const json& value) {
    return [=](Files& files) { files.manifest[json::json_pointer(pointer)] = value; };
  };
  clash("another TensorRT",
        "was built by tensorrt 10.13.0.35, and this program runs with tensorrt 10.14.1.48",
        set("/backend/version", "10.13.0.35"));
  clash("the other TensorRT", "was built by tensorrt_rtx", set("/backend/name", "tensorrt_rtx"));
  clash("another GPU", "was built by tensorrt for sm90, and the GPU here is sm89, which cannot run that",
        set("/gpus", json::array({"sm90"})));
  clash("engine too long", "is too long", set("/engine/bytes", 3));
  clash("engine cut off", "is cut off", set("/engine/bytes", 4000));
  clash("engine of another digest", "is damaged, or of another manifest",
        set("/engine/sha256", std::string(64, 'a')));
  clash("library of another digest", "and ", set("/plugin/sha256", std::string(64, 'a')));
  clash("weights of another digest", "is damaged, or of another engine",
        set("/weights/sha256", std::string(64, 'a')));
  clash("weights file missing", "does not exist", set("/weights/file", "other.safetensors"));
  clash("weights file a path", "is no file name", set("/weights/file", "../flux.safetensors"));
  clash("library a path", "is no file name", set("/plugin/library", "/lib/x.so"));
  clash("library dots", "is no file name", set("/plugin/library", ".."));
  clash("weight of another shape", "and the engine takes fp32 [2]", [](Files& files) {
    files.manifest["weights"]["tensors"][0]["shape"] = {2};
    std::string plan = files.plan;
    files.set_plan(plan.replace(plan.find("weight 0 4"), 10, "weight 0 2"));
  });
  clash("input of another dtype", "has no input 'x', fp16 [2, 3]", set("/inputs/0/dtype", "fp16"));
  clash("output of another shape", "has no output 'y'", set("/outputs/0/shape", {2, 4}));
  clash("input that the manifest lacks", "has an input 'x'", set("/inputs", json::array()));
  clash("no format version", "no manifest of format version 2",
        [](Files& f) { f.manifest.erase("format_version"); });
  clash("another format version", "no manifest of format version 2", set("/format_version", 1));
  clash("format version true", "no manifest of format version 2", set("/format_version", true));
  clash("manifest no object", "no manifest of format version 2", [](Files& files) { files.manifest = 3; });
  for (const char* key : {"engine", "backend", "gpus", "plugin", "inputs", "outputs", "weights"}) {
    clash(std::string("manifest without ") + key, std::string("'") + key + "' is missing",
          [=](Files& files) { files.manifest.erase(key); });
    clash(std::string("manifest's ") + key + " a number", std::string("'") + key + "' is no",
          [=](Files& files) { files.manifest[key] = 7; });
  }
  clash("a digest that is none", "'engine.sha256' is no SHA-256", set("/engine/sha256", "ABC"));
  clash("a size below zero", "'engine.bytes' is no integer", set("/engine/bytes", -1));
  clash("a size that is no integer", "'engine.bytes' is no integer", set("/engine/bytes", 1e300));
  clash("an extent of -2", "is no integer of -1", set("/inputs/0/shape/0", -2));
  clash("nine extents", "more than 8", set("/inputs/0/shape", std::vector<int>(9, 1)));
  clash("a tensor twice", "is there twice", set("/outputs/0/name", "x"));
  clash("weights neither embedded nor external", "neither embedded nor external",
        set("/weights/mode", "none"));
  clash("embedded weights with a file", "is for external weights", set("/weights/mode", "embedded"));
  clash("no GPU", "No CUDA device was found", [](Files&) { fake::cuda().devices = 0; });
  clash("no memory for the weights", "does not hold the weights",
        [](Files&) { fake::cuda().fail_allocation = 0; });
  clash("no pinned memory", "allocating pinned memory", [](Files&) { fake::cuda().fail_allocation = 2; });
  clash("TensorRT refuses the engine", "TensorRT says: this is no engine.",
        [](Files&) { fake::tensorrt().refuse_engine = true; });
  clash("TensorRT makes no context", "TensorRT says: no context was made.",
        [](Files&) { fake::tensorrt().refuse_context = true; });
  clash("TensorRT refuses an address", "TensorRT says: an address was refused.",
        [](Files&) { fake::tensorrt().refuse_address = true; });
  clash("host code that is not the library", "carries host code", [](Files& files) {
    files.set_plan(files.plan +
                   std::string("\x7f"
                               "ELF\2\1\1\0\0\0\0\0\0\0\0\0\3\0\x3e\0",
                               20) +
                   std::string(80, 0));
  });
  Files files;
  fs::remove(files.folder / "liblynx_plugin.so");
  refuses("no library", "which is neither beside it nor inside it",
          [&] { lynx::Engine::open(files.engine()); });
  write(files.folder / "flux.json", "{\"format_version\": 2");
  refuses("manifest cut off", "is cut off or no JSON", [&] { lynx::Engine::open(files.engine()); });
  write(files.folder / "flux.json", R"({"format_version": 2, "format_version": 2})");
  refuses("manifest with a key twice", "is there twice", [&] { lynx::Engine::open(files.engine()); });
  write(files.folder / "flux.json", std::string((16 << 20) + 1, ' '));
  refuses("manifest too large", "larger than 16 MiB", [&] { lynx::Engine::open(files.engine()); });
  write(files.folder / "flux.json", std::string(200000, '['));
  refuses("manifest too deep", "is cut off or no JSON", [&] { lynx::Engine::open(files.engine()); });
  fs::remove(files.folder / "flux.json");
  refuses("no manifest", "The manifest", [&] { lynx::Engine::open(files.engine()); });
  refuses("no engine", "does not exist", [&] { lynx::Engine::open("/nowhere/flux.engine"); });
  Files other;
  other.library = library_of(500, 'b'), other.manifest["plugin"]["sha256"] = digest(other.library);
  other.save();
  refuses("a second library in one process", "has loaded a plugin library of SHA-256 ",
          [&] { lynx::Engine::open(other.engine()); });
}

// ---- Libraries inside an engine

void test_host_code() {
  const std::string library = library_of(1000, 'a'), other = library_of(1000, 'b');
  const auto copies = [&](const std::string& plan) {
    return lynx::check_host_code("plan", bytes_of(plan), plan.size(), digest(library));
  };
  std::string cuda = library_of(300, 'c');
  cuda[offsetof(Elf64_Ehdr, e_machine)] = char(190);
  report(copies("nothing in it") == 0, "a plan without libraries");
  report(copies("before" + library + "between" + library) == 2, "a plan with two copies of the library");
  report(copies(cuda + library + cuda) == 1, "code for the GPU is none for the host");
  report(copies("\x7f"
                "ELF\2\1\1 text") == 0,
         "an ELF's first bytes at the end of a plan");
  const auto refused = [&](const std::string& name, const std::string& plan) {
    refuses("host code: " + name, "carries host code", [&] { copies(plan); });
  };
  refused("another library", other);
  refused("another behind the first", library + other);
  refused("cut off", library.substr(0, 990));
  std::string no_sections = library;
  no_sections[offsetof(Elf64_Ehdr, e_shnum)] = 0;
  refused("without sections", no_sections);
  std::string far = library;
  far[offsetof(Elf64_Ehdr, e_shoff) + 7] = char(0xff);
  refused("with sections beyond the end", far);
  std::string narrow = library;
  narrow[EI_CLASS] = ELFCLASS32;
  refused("of 32 bits", narrow);
}

// Files of an engine that carries its library and whose library is not beside it.
void embed(Files& files) {
  files.set_plan(files.plan + files.library + "\n");
  files.manifest["plugin"]["sha256"] = digest(files.library);
  files.save();
  fs::remove(files.folder / "liblynx_plugin.so");
}

void test_embedded() {
  Files files, other;
  embed(files);
  const size_t before = fake::tensorrt().libraries.size();
  lynx::Engine::open(files.engine());
  report(fake::tensorrt().libraries.size() == before && nothing_left(),
         "an engine with its own copy of the library needs no file");
  other.library = library_of(500, 'b');
  embed(other);
  refuses("an engine with another library inside", "has loaded a plugin library of SHA-256 ",
          [&] { lynx::Engine::open(other.engine()); });
}

// TensorRT loads what an engine carries, so that its digest counts from then on. In a process where no
// library is yet.
void test_embedded_first() {
  std::fflush(stdout);
  const pid_t child = ::fork();
  if (child == 0) {
    Files files, other;
    embed(files);
    other.library = library_of(500, 'b'), other.manifest["plugin"]["sha256"] = digest(other.library);
    other.save();
    lynx::Engine::open(files.engine());
    report(fake::tensorrt().libraries.empty(), "no file is loaded for an engine that carries its library");
    refuses("another library after it", "has loaded a plugin library of SHA-256 ",
            [&] { lynx::Engine::open(other.engine()); });
    std::fflush(stdout);
    fs::remove_all(files.folder), fs::remove_all(other.folder);
    std::_Exit(failed);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  report(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a library inside an engine counts as loaded");
}

void test_log() {
  const Files files;
  std::vector<std::string> messages;
  lynx::set_log(
      [&](int severity, const char* message) { messages.push_back(std::to_string(severity) + message); });
  fake::tensorrt().refuse_engine = true;
  refuses("with a log", "TensorRT says", [&] { lynx::Engine::open(files.engine()); });
  report(messages == std::vector<std::string>{"1this is no engine."}, "messages reach the log");
  lynx::set_log([](int, const char*) { throw std::runtime_error("a log that throws"); });
  refuses("with a log that throws", "TensorRT says", [&] { lynx::Engine::open(files.engine()); });
  lynx::set_log({});
  fake::tensorrt().refuse_engine = false;
}

// An error belongs to the call whose thread it came in; one of a thread without a call may belong to any.
void test_errors_of_threads() {
  const lynx::CallErrors here;
  std::string there;
  std::thread([&] {
    const lynx::CallErrors errors;
    lynx::log_message(1, "of the other thread.");
    there = errors.said();
  }).join();
  lynx::log_message(1, "of this one.");
  report(there == " TensorRT says: of the other thread.", "the other thread's error", there);
  report(here.said() == " TensorRT says: of this one.", "this thread's error", here.said());
  {
    const lynx::CallErrors next;
    report(next.said().empty(), "a new call has no errors");
    lynx::log_message(2, "a warning");
    for (int i = 0; i < 20; ++i) lynx::log_message(1, std::to_string(i).c_str());
    report(next.said() == " TensorRT says: 12; 13; 14; 15; 16; 17; 18; 19.", "the last errors", next.said());
  }
  std::thread([] { lynx::log_message(0, "of a worker of TensorRT's"); }).join();
  report(here.said() == " TensorRT says: of this one; of a worker of TensorRT's.", "a worker's error",
         here.said());
}

// ---- Mutations: an Error or a good reading, never a crash or a read outside the file

std::string mutated(const std::string& bytes, std::mt19937& random) {
  std::string out = bytes;
  const int changes = 1 + int(random() % 4);
  for (int i = 0; i < changes && !out.empty(); ++i) {
    const size_t at = random() % out.size();
    switch (random() % 5) {
      case 0:
        out[at] = char(random());
        break;
      case 1:
        out.erase(at, 1 + random() % 8);
        break;
      case 2:
        out.insert(at, std::string(1 + random() % 4, "0123456789-{}[]\",:e.\0"[random() % 21]));
        break;
      case 3:
        out.resize(at);
        break;
      default:
        out.insert(at, out, random() % out.size(), random() % 32);
        break;
    }
  }
  return out;
}

// How many of 10,000 mutations were refused; -1 when one was neither refused nor read.
int refused_mutations(const std::string& bytes, const fs::path& path, const std::function<void()>& read_it) {
  std::mt19937 random(1);
  int refused = 0;
  for (int i = 0; i < 10000; ++i) {
    write(path, mutated(bytes, random));
    try {
      read_it();
    } catch (const lynx::Error&) {
      ++refused;
    } catch (const std::exception& error) {
      report(false, "mutation " + std::to_string(i), error.what());
      return -1;
    }
  }
  return refused;
}

void test_mutations(const fs::path& folder) {
  const Files files;
  const fs::path manifest = folder / "m.json", tensors = folder / "m.safetensors";
  const int manifests =
      refused_mutations(files.manifest.dump(), manifest, [&] { lynx::read_manifest(manifest.string()); });
  report(manifests > 2000 && manifests < 10000, "10,000 mutated manifests",
         std::to_string(manifests) + " refused");
  const std::string good =
      safetensors({{"a", entry("F16", {2, 2}, 0, 8)}, {"b", entry("I64", {1}, 8, 16)}}, "0123456789abcdef");
  unsigned sum = 0;
  const int headers = refused_mutations(good, tensors, [&] {
    const lynx::SafetensorsFile file(tensors.string());
    for (const auto& one : file.entries()) {
      std::string bytes(one.bytes, '\0');
      file.read(one, bytes.data());  // an Error, which fails the test, for a tensor outside the file
      for (const char byte : bytes) sum += unsigned(byte);
    }
  });
  report(headers > 5000 && headers < 10000 && sum > 0, "10,000 mutated safetensors headers",
         std::to_string(headers) + " refused");
}

}  // namespace

// y = x * weight[0], if `large` came as it is in the file.
void fake::run(std::map<std::string, Bound>& tensors) {
  const auto* const x = static_cast<const float*>(tensors.at("x").address);
  const auto* const weight = static_cast<const float*>(tensors.at("weight").address);
  const auto* const large = static_cast<const int32_t*>(tensors.at("large").address);
  auto* const y = static_cast<float*>(tensors.at("y").address);
  bool whole = true;
  for (int32_t i = 0; i < tensors.at("large").shape[0]; ++i) whole &= large[i] == i;
  for (int i = 0; i < 6; ++i) y[i] = whole ? x[i] * weight[0] : -1e9f;
}

int main() {
  char name[] = "/tmp/lynx_runtime_XXXXXX";
  const fs::path folder = ::mkdtemp(name);
  test_embedded_first();
  test_sha256();
  test_safetensors(folder);
  test_versions();
  test_run();
  test_names();
  test_weights_cut_off();
  test_files_of_two_runs();
  test_moves();
  test_clashes();
  test_host_code();
  test_embedded();
  test_log();
  test_errors_of_threads();
  test_mutations(folder);
  fs::remove_all(folder);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

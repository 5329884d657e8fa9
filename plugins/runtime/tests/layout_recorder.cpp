// SPDX-License-Identifier: Apache-2.0
// Stands in for TensorRT towards NVIDIA's Python bindings, and prints which function of which table they
// call: what they were built with is the layout. Built as a shared library under TensorRT's name by
// tests/runtime_cpp/test_layout.py.
#include <cstdint>
#include <cstdio>
#include <typeinfo>
#include <utility>

namespace {

constexpr int kSlots = 160;
enum Class { kRuntime, kEngine, kContext, kRegistry, kClasses };
constexpr const char* kNames[kClasses] = {"runtime", "engine", "context", "registry"};

struct Object {
  void** functions;
  void* implementation;
};
Object interfaces[kClasses], implementations[kClasses];

// A function of some table: returns the interface that the real one would make, or something that is not
// null.
template <int kClass, int kSlot>
void* record() {
  std::printf("%s %d\n", kNames[kClass], kSlot);
  std::fflush(stdout);
  return &interfaces[kClass == kRuntime ? kEngine : kContext];
}

struct Polymorphic {
  virtual ~Polymorphic() = default;
};

// Behind what the C++ ABI keeps before a table: an offset and a type.
struct Table {
  intptr_t offset = 0;
  const std::type_info* type = &typeid(Polymorphic);
  void* functions[kSlots];
};
Table tables[kClasses], interface_tables[kClasses];

template <int kClass, int... kSlot>
void fill(std::integer_sequence<int, kSlot...>) {
  ((tables[kClass].functions[kSlot] = reinterpret_cast<void*>(&record<kClass, kSlot>)), ...);
  for (void*& function : interface_tables[kClass].functions)
    function = reinterpret_cast<void*>(+[](void*) -> void* { return nullptr; });
  implementations[kClass] = {tables[kClass].functions, nullptr};
  interfaces[kClass] = {interface_tables[kClass].functions, &implementations[kClass]};
}

__attribute__((constructor)) void fill_all() {
  using Slots = std::make_integer_sequence<int, kSlots>;
  fill<kRuntime>(Slots{}), fill<kEngine>(Slots{}), fill<kContext>(Slots{}), fill<kRegistry>(Slots{});
}

}  // namespace

extern "C" {
void* createInferRuntime_INTERNAL(void*, int32_t) { return &interfaces[kRuntime]; }
void* getPluginRegistry() { return &implementations[kRegistry]; }  // its own table has its functions
void* getBuilderPluginRegistry(int32_t) { return nullptr; }
void* createInferBuilder_INTERNAL(void*, int32_t) { return nullptr; }
void* createInferRefitter_INTERNAL(void*, void*, int32_t) { return nullptr; }
void* createNvOnnxParser_INTERNAL(void*, void*, int32_t) { return nullptr; }
void* createNvOnnxParserRefitter_INTERNAL(void*, void*, int32_t) { return nullptr; }
int32_t getNvOnnxParserVersion() { return 0; }
bool initLibNvInferPlugins(void*, const char*) { return true; }
}

// The part of the CUDA runtime that a launcher may call, on an emulated device: what would have to wait for the device,
// or could not be captured in a CUDA graph, is not here and does not link. settings.capability says what the device is.
#include <cstdio>
#include <map>
#include <set>
#include <string>

#include "emulator.h"

namespace vqk::emulator {

namespace {

cudaError_t last_error = cudaSuccess;
std::map<const void*, int> shared_allowed;
std::set<std::string> launched;

std::set<std::string>& listed() {
  static std::set<std::string> names;
  return names;
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t refusal(const Launch& l) {
  const uint64_t threads = static_cast<uint64_t>(l.block.x) * l.block.y * l.block.z;
  if (!threads || threads > 1024 || l.block.z > 64 || !l.grid.x || !l.grid.y || !l.grid.z)
    return cudaErrorInvalidConfiguration;
  if (l.grid.x > 0x7fffffffu || l.grid.y > 65535 || l.grid.z > 65535) return cudaErrorInvalidConfiguration;
  size_t limit = kStaticShared;
  if (const auto found = shared_allowed.find(l.function); found != shared_allowed.end())
    limit = std::max<size_t>(limit, found->second);
  return l.shared_bytes > limit ? cudaErrorInvalidValue : cudaSuccess;
}

// Of a multiprocessor. A block may have all of its shared memory but 1 KB.
struct Multiprocessor {
  int shared_kb, threads;
};
const Multiprocessor& multiprocessor() {
  static const std::map<int, Multiprocessor> all = {{80, {164, 2048}}, {86, {100, 1536}},  {89, {100, 1536}},
                                                    {90, {228, 2048}}, {100, {228, 2048}}, {120, {100, 1536}}};
  if (!all.count(settings.capability)) fail("no device of compute capability %d is emulated", settings.capability);
  return all.at(settings.capability);
}
int shared_of_multiprocessor() { return multiprocessor().shared_kb << 10; }

}  // namespace

void (*launch_instead)(const Launch&);

void another_device() {
  shared_allowed.clear();
  last_error = cudaSuccess;
}

void list_kernel(const char* type_name) { listed().insert(type_name); }

std::vector<std::string> kernels_never_launched() {
  std::vector<std::string> names;
  for (const std::string& name : listed())
    if (!launched.count(name)) names.push_back(name);
  return names;
}

void launch(Launch l) {
  if (remember(refusal(l)) != cudaSuccess) return;
  launched.insert(l.type_name);
  const auto asked = shared_allowed.find(l.function);
  l.static_left = asked == shared_allowed.end() ? kStaticShared - static_cast<int64_t>(l.shared_bytes)
                                                : shared_of_multiprocessor() - 1024 - asked->second;
  if (launch_instead) launch_instead(l);
  else run(l);
}

}  // namespace vqk::emulator

using vqk::emulator::fail;
using vqk::emulator::settings;

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int shared = vqk::emulator::shared_of_multiprocessor();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = settings.multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = settings.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = settings.capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared - 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = vqk::emulator::kStaticShared; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = vqk::emulator::multiprocessor().threads; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrL2CacheSize: *value = 40 << 20; break;
    default: fail("cudaDeviceGetAttribute(%d) is not emulated: add it to tests/cuda/runtime.cpp", attribute);
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  using namespace vqk::emulator;
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    fail("cudaFuncSetAttribute(%d) is not emulated", attribute);
  if (value < 0 || value > shared_of_multiprocessor() - 1024) return remember(cudaErrorInvalidValue);
  shared_allowed[function] = value;
  return cudaSuccess;
}

// No more than two, so that loops over tasks go round more than once; registers and static shared memory do not count.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared_bytes) {
  using namespace vqk::emulator;
  const auto found = shared_allowed.find(function);
  const size_t allowed = found == shared_allowed.end() ? kStaticShared : std::max<size_t>(kStaticShared, found->second);
  if (shared_bytes > allowed) return *blocks = 0, remember(cudaErrorInvalidValue);
  const int by_threads = multiprocessor().threads / std::max(threads, 32);
  const int by_shared = shared_of_multiprocessor() / static_cast<int>(shared_bytes + 1024);
  *blocks = std::min({by_threads, by_shared, 2});
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  if (bytes) std::memset(at, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  if (kind != cudaMemcpyDeviceToDevice)
    fail("cudaMemcpyAsync between host and device: a launcher must not wait for either");
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaPeekAtLastError() { return vqk::emulator::last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = vqk::emulator::last_error;
  vqk::emulator::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                     ? "no error"
         : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
         : error == cudaErrorInvalidValue         ? "invalid argument"
                                                  : "another error";
}

}  // extern "C"

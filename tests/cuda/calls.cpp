// Reads calls of operators from a file, makes them on emulated devices and writes what came out:
//
//     program CALLS RESULTS
//
// Each call runs several times, with other orders of threads, copies that land early or late and other numbers of
// multiprocessors: all must give the same bits. Everything in the files is int64 but the elements of arrays; texts and
// arrays are padded to 8 bytes. tests/cuda_harness.py is the other end.
#include "calls.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>

#include "emulator.h"

namespace vqk::emulator {
namespace {

std::map<std::string, Function>& functions() {
  static std::map<std::string, Function> all;
  return all;
}

std::vector<std::pair<void*, int64_t>> allocations;  // of the call that runs

void* allocate(int64_t bytes, int64_t offset) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, static_cast<size_t>(offset + bytes))) fail("no memory for an array");
  std::memset(memory, 0xff, static_cast<size_t>(offset + bytes));
  allocations.emplace_back(memory, offset + bytes);
  return static_cast<unsigned char*>(memory) + offset;
}

void free_all() {
  for (const auto& [memory, bytes] : allocations) std::free(memory);
  allocations.clear();
}

class Reader {
 public:
  explicit Reader(const unsigned char* at) : at_(at) {}
  int64_t integer() {
    int64_t value;
    std::memcpy(&value, at_, 8);
    at_ += 8;
    return value;
  }
  std::string text() {
    const int64_t size = integer();
    return {reinterpret_cast<const char*>(skip(size)), static_cast<size_t>(size)};
  }
  const unsigned char* skip(int64_t bytes) {
    const unsigned char* here = at_;
    at_ += (bytes + 7) / 8 * 8;
    return here;
  }
  Array array(bool filled) {
    Array a;
    a.type = static_cast<int>(integer());
    if (a.type < 0) return a;
    a.shape.resize(integer());
    for (int64_t& size : a.shape) size = integer();
    const int64_t offset = integer(), bytes = a.bytes();
    if (bytes) a.data = static_cast<unsigned char*>(allocate(bytes, offset));
    if (filled && bytes) std::memcpy(a.data, skip(bytes), bytes);
    return a;
  }
  Call call() {
    Call c;
    c.arguments.resize(integer());
    for (Call::Argument& a : c.arguments) {
      a.integers.resize(integer());
      for (int64_t& value : a.integers) value = integer();
      const int64_t count = integer();
      for (int64_t i = 0; i < count; ++i) a.arrays.push_back(array(true));
    }
    const int64_t count = integer();
    for (int64_t i = 0; i < count; ++i) c.outputs.push_back(array(false));
    return c;
  }

 private:
  const unsigned char* at_;
};

std::string bytes_of(const std::vector<Array>& arrays) {
  std::string all;
  for (const Array& a : arrays) {
    all.append(reinterpret_cast<const char*>(a.data), a.bytes());
    all.resize((all.size() + 7) / 8 * 8);
  }
  return all;
}

std::string inputs_of(const Call& call) {
  std::string all;
  for (const Call::Argument& a : call.arguments) all += bytes_of(a.arrays);
  return all;
}

void append(std::string* out, const std::string& text) {
  const int64_t size = static_cast<int64_t>(text.size());
  out->append(reinterpret_cast<const char*>(&size), 8);
  out->append(text);
  out->resize((out->size() + 7) / 8 * 8);
}

// What is wrong, or nothing; then `outputs` holds what came out.
std::string make_call(Reader* reader, std::string* outputs) {
  const std::string op = reader->text();
  const unsigned seed = static_cast<unsigned>(reader->integer());
  const int runs = static_cast<int>(reader->integer());
  settings.capability = static_cast<int>(reader->integer());
  settings.rough = reader->integer();
  const auto function = functions().find(op);
  if (function == functions().end()) return "there is no call of " + op + " in this program";
  const Reader start = *reader;
  std::string first;
  for (int run = 0; run < runs; ++run) {
    settings.seed = seed + run;
    settings.early = run % 2;
    settings.multiprocessors = 1 + static_cast<int>(settings.seed % 3);
    *reader = start;
    another_device();
    Call call = reader->call();
    const std::string before = inputs_of(call);
    const char* const refused = function->second(call);
    *outputs = bytes_of(call.outputs);
    const bool changed = before != inputs_of(call);
    free_all();
    if (refused) return refused;
    if (changed) return "the launcher or a kernel has changed an input";
    if (run == 0) first = *outputs;
    else if (*outputs != first) return "the result depends on the order of threads, on the copies or on the device";
  }
  return {};
}

}  // namespace

int64_t Array::bytes() const {
  constexpr int64_t kSizes[] = {4, 8, 2, 2, 8, 4, 1};
  int64_t bytes = type < 0 ? 0 : kSizes[type];
  for (int64_t size : shape) bytes *= size;
  return bytes;
}

void* Call::workspace(int64_t bytes) { return bytes ? allocate(bytes, 0) : nullptr; }

bool add_call(const char* op, Function function) { return functions().emplace(op, function).second; }

}  // namespace vqk::emulator

int main(int count, char** words) {
  using namespace vqk::emulator;
  if (count != 3) return std::fprintf(stderr, "usage: %s CALLS RESULTS\n", words[0]), 2;
  std::ifstream file(words[1], std::ios::binary);
  const std::string calls{std::istreambuf_iterator<char>(file), {}};
  Reader reader(reinterpret_cast<const unsigned char*>(calls.data()));
  std::string results;
  for (int64_t left = reader.integer(); left > 0; --left) {
    const std::string label = reader.text();
    std::fprintf(stderr, "%s\n", label.c_str());  // the last one is where the program ended
    std::string outputs;
    const std::string wrong = make_call(&reader, &outputs);
    append(&results, wrong);
    if (wrong.empty()) results += outputs;
  }
  for (const std::string& name : kernels_never_launched()) append(&results, name);
  std::ofstream(words[2], std::ios::binary) << results;
}

// For the PTX emulator, in a shared library: one call, whose launches go to `launch_hook` instead of onto fibers.
extern "C" {

void vqk_set_launch_hook(void (*hook)(const vqk::emulator::Launch*)) {
  static void (*hooked)(const vqk::emulator::Launch*);
  hooked = hook;
  vqk::emulator::launch_instead = [](const vqk::emulator::Launch& l) { hooked(&l); };
}

int64_t vqk_allocations(void** places, int64_t* sizes, int64_t room) {
  int64_t count = 0;
  for (const auto& [memory, bytes] : vqk::emulator::allocations)
    if (count < room) places[count] = memory, sizes[count++] = bytes;
  return count;
}

// `results` has room for the outputs; returns what is wrong.
const char* vqk_call(const unsigned char* bytes, unsigned char* results) {
  static std::string wrong;
  std::string outputs;
  vqk::emulator::Reader reader(bytes);
  wrong = vqk::emulator::make_call(&reader, &outputs);
  std::memcpy(results, outputs.data(), wrong.empty() ? outputs.size() : 0);
  return wrong.c_str();
}

}  // extern "C"

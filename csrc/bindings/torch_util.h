// What every binding needs from PyTorch, and the only file with torch includes: checks, contiguity,
// allocation, threads, device guard and stream. LibTorch's stable ABI only (torch/csrc/stable,
// torch/headeronly), so that one binary serves torch 2.10 and newer, with and without CUDA.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "vqk/launch.h"
#include "vqk/simd.h"

namespace vqk::bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline const char* dtype_name(ScalarType s) {
  switch (s) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline DType dtype(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: fail(op, "dtype must be float32, float64, bfloat16 or float16, not ", dtype_name(t.scalar_type()));
  }
}

// float, or double where the input is double: the dtype of distances, losses and sums.
inline ScalarType accumulate_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Asked first: a call that changes nothing costs a microsecond in the dispatcher.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Contiguous, with the shape, dtype and device that the kernel relies on.
inline Tensor input(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> sizes,
                    ScalarType scalar_type, const Tensor& device_of) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) same = same && t.size(d++) == size;
  if (!same) {
    std::ostringstream expected;
    for (int64_t size : sizes) expected << (expected.tellp() ? ", " : "") << size;
    fail(op, name, " has shape ", shape(t), ", expected [", expected.str(), "]");
  }
  if (t.scalar_type() != scalar_type)
    fail(op, name, " is ", dtype_name(t.scalar_type()), ", expected ", dtype_name(scalar_type));
  if (t.device() != device_of.device()) fail(op, name, " is on another device than the first argument");
  return as_contiguous(t);
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* layout) {
  if (t.dim() != dim) fail(op, name, " has shape ", shape(t), ", expected ", layout);
}

// A new tensor beside `like`, by the shim itself: the dispatcher would look new_empty up by its name, call after call.
// Large host memory arrives fresh from the system; in huge pages it costs 512 times fewer page faults, which otherwise
// take longer than a memory-bound kernel. The first and last pages, too: the mapping begins at a huge one.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType scalar_type) {
  int64_t strides[4], d = static_cast<int64_t>(sizes.size()), step = 1;
  for (auto size = sizes.end(); size != sizes.begin(); step *= *size > 1 ? *size : 1) --size, strides[--d] = step;
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar_type)), device_type, device_index, &handle));
  Tensor t(handle);
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20, kSmallPage = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr()), bytes = t.numel() * t.element_size();
  if (t.is_cpu() && bytes > 4 * kPage) {
    const uintptr_t first = begin / kSmallPage * kSmallPage;  // what precedes is malloc's
    madvise(reinterpret_cast<void*>(first), begin + bytes - first, MADV_HUGEPAGE);  // only a hint: may be refused
  }
#endif
  return t;
}

inline Estimator estimator(const char* op, int64_t value) {
  if (value < 0 || value > 2) fail(op, "estimator ", value, " is none of 0 (ste), 1 (rotation), 2 (reflection)");
  return static_cast<Estimator>(value);
}

inline Metric metric(const char* op, int64_t value) {
  if (value < 0 || value > 2) fail(op, "metric ", value, " is none of 0 (l2), 1 (cosine), 2 (dot)");
  return static_cast<Metric>(value);
}

inline void check_range(const char* op, int64_t bad, int64_t K) {
  if (bad >= 0) fail(op, "index ", bad, " is out of range for codebook_size ", K, "; allowed: -1 (skipped) .. ", K - 1);
}

// PyTorch's threads. Who is done helps: on a busy machine a static split would wait for its slowest part.
inline Parallel torch_threads(const char* op) {
  if (const char* error = simd_error()) fail(op, error);
  auto run = [](int64_t tasks, void (*body)(void*, int64_t), void* ctx) {
    const int64_t threads = torch::stable::get_num_threads(), workers = threads < tasks ? threads : tasks;
    TaskRuns runs(tasks, workers);
    auto worker = [&](int64_t begin, int64_t) { runs.work(begin, [&](int64_t task) { body(ctx, task); }); };
    torch::stable::parallel_for(0, workers, 1, worker);
  };
  return {run, static_cast<int>(torch::stable::get_num_threads())};
}

#ifdef VQK_WITH_CUDA
void* cuda_stream(const char* op, const Tensor&);  // module.cpp

inline void check_cuda(const char* op, const char* error) {
  if (error) fail(op, error);
}
#endif

}  // namespace vqk::bind

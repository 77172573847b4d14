// vqkernels._native: the CPU kernels on NumPy arrays, with threads of its own and no PyTorch.
// vqkernels/numpy.py checks and reshapes; what arrives here is C-contiguous with explicit heads.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "vqk/launch.h"
#include "vqk/simd.h"

namespace py = pybind11;

namespace vqk {
namespace {

thread_local int call_threads = 1;

// Starts threads - 1 threads and works along.
void run_tasks(int64_t tasks, void (*body)(void*, int64_t), void* ctx) {
  const int64_t workers = std::min<int64_t>(call_threads, tasks);
  TaskRuns runs(tasks, workers);
  std::exception_ptr error;
  std::mutex lock;
  auto work = [&](int64_t worker) {
    try {
      runs.work(worker, [&](int64_t task) { body(ctx, task); });
    } catch (...) {
      std::lock_guard<std::mutex> guard(lock);
      error = std::current_exception();
      runs.stop();
    }
  };
  std::vector<std::thread> pool;
  for (int64_t t = 1; t < workers; ++t) pool.emplace_back(work, t);
  work(0);
  for (std::thread& t : pool) t.join();
  if (error) std::rethrow_exception(error);
}

// Runs a kernel without the GIL on `threads` threads.
template <class Kernel, class Params>
void launch(Kernel kernel, const Params& params, int threads) {
  if (const char* error = simd_error()) throw py::value_error(error);
  py::gil_scoped_release release;
  call_threads = threads;
  kernel(params, Parallel{run_tasks, threads});
}

DType dtype(const py::array& a) {
  switch (a.dtype().char_()) {
    case 'f': return DType::f32;
    case 'd': return DType::f64;
    case 'e': return DType::f16;
    default: throw py::value_error("dtype must be float32, float64 or float16");
  }
}

py::dtype accumulate_dtype(const py::array& a) { return py::dtype(a.dtype().char_() == 'd' ? "float64" : "float32"); }

const void* data(const py::array& a) {
  if (!(a.flags() & py::array::c_style)) throw py::value_error("array is not C-contiguous");
  return a.data();
}

const int64_t* indices_data(const py::array& a) {
  if (a.dtype().char_() != 'l' || a.itemsize() != 8) throw py::value_error("indices must be int64");
  return static_cast<const int64_t*>(data(a));
}

const bool* mask_data(const py::object& mask) {
  return mask.is_none() ? nullptr : static_cast<const bool*>(data(mask.cast<py::array>()));
}

py::array empty(const py::dtype& type, const std::vector<int64_t>& shape) { return py::array(type, shape); }

int64_t* longs(py::array& a) { return static_cast<int64_t*>(a.mutable_data()); }

void check_range(const char* op, int64_t bad, int64_t K) {
  if (bad >= 0)
    throw py::value_error(std::string(op) + ": index " + std::to_string(bad) + " is out of range for codebook_size " +
                          std::to_string(K) + "; allowed: -1 (skipped) .. " + std::to_string(K - 1));
}

py::tuple nearest_codeword(const py::array& z, const py::array& codebook, const py::object& mask, int metric,
                           bool certified, int threads) {
  int64_t H = z.shape(0), N = z.shape(1), D = z.shape(2);
  py::array indices = empty(py::dtype("int64"), {H, N}), distances = empty(accumulate_dtype(z), {H, N});
  launch(cpu::nearest_codeword,
         NearestCodewordParams{.z = data(z),
                               .codebook = data(codebook),
                               .mask = mask_data(mask),
                               .indices = longs(indices),
                               .distances = distances.mutable_data(),
                               .H = H,
                               .N = N,
                               .K = codebook.shape(1),
                               .D = D,
                               .dtype = dtype(z),
                               .metric = static_cast<Metric>(metric),
                               .certified = certified},
         threads);
  return py::make_tuple(indices, distances);
}

py::tuple residual_quantize(const py::array& z, const std::vector<py::array>& codebooks, const py::object& mask,
                            int metric, int threads) {
  int64_t H = z.shape(0), N = z.shape(1), D = z.shape(2), Q = codebooks.size();
  std::vector<const void*> books;
  std::vector<int64_t> K;
  for (const py::array& c : codebooks) books.push_back(data(c)), K.push_back(c.shape(1));
  py::array indices = empty(py::dtype("int64"), {H, N, Q}), quantized = empty(z.dtype(), {H, N, D}),
            losses = empty(accumulate_dtype(z), {Q});
  int64_t valid = 0;
  launch(cpu::residual_quantize,
         ResidualQuantizeParams{.z = data(z),
                                .codebooks = books.data(),
                                .K = K.data(),
                                .mask = mask_data(mask),
                                .indices = longs(indices),
                                .quantized = quantized.mutable_data(),
                                .losses = losses.mutable_data(),
                                .valid = &valid,
                                .H = H,
                                .N = N,
                                .Q = Q,
                                .D = D,
                                .dtype = dtype(z),
                                .metric = static_cast<Metric>(metric)},
         threads);
  return py::make_tuple(indices, quantized, losses);
}

py::array codebook_usage(const py::array& indices, int64_t K, int threads) {
  int64_t S = indices.shape(0), N = indices.shape(1), bad = -1;
  py::array counts = empty(py::dtype("int64"), {S, K});
  launch(cpu::codebook_usage,
         CodebookUsageParams{
             .indices = indices_data(indices), .counts = longs(counts), .bad = &bad, .S = S, .N = N, .K = K},
         threads);
  check_range("codebook_usage", bad, K);
  return counts;
}

py::tuple codeword_sums(const py::array& z, const py::array& indices, int64_t K, int threads) {
  int64_t H = z.shape(0), N = z.shape(1), D = z.shape(2), bad = -1;
  py::array sums = empty(accumulate_dtype(z), {H, K, D}), counts = empty(py::dtype("int64"), {H, K});
  launch(cpu::codeword_sums,
         CodewordSumsParams{.z = data(z),
                            .indices = indices_data(indices),
                            .sums = sums.mutable_data(),
                            .counts = longs(counts),
                            .bad = &bad,
                            .H = H,
                            .N = N,
                            .K = K,
                            .D = D,
                            .dtype = dtype(z)},
         threads);
  check_range("codeword_sums", bad, K);
  return py::make_tuple(sums, counts);
}

std::string level(const std::string& name) {
  if (!name.empty())
    if (const char* error = set_simd_level(name.c_str())) throw py::value_error(error);
  return simd_name(simd_level());
}

}  // namespace
}  // namespace vqk

PYBIND11_MODULE(_native, m) {
  m.doc() = "The CPU kernels of vqkernels on NumPy arrays. Use vqkernels.numpy, which checks its arguments.";
  m.def("nearest_codeword", &vqk::nearest_codeword);
  m.def("residual_quantize", &vqk::residual_quantize);
  m.def("codebook_usage", &vqk::codebook_usage);
  m.def("codeword_sums", &vqk::codeword_sums);
  m.def("simd_level", &vqk::level, py::arg("name") = "",
        "The SIMD level in use; with a name (portable, avx2, avxvnni, avx512, vnni, amx, auto) sets it first.");
  m.def("simd_detected", [] { return vqk::simd_name(vqk::simd_detected()); }, "The best SIMD level this CPU runs.");
}

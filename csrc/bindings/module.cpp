// The part of vqkernels._C that belongs to no single op: the SIMD level and the CUDA stream.
#include "torch_util.h"

#ifdef VQK_WITH_CUDA
#include <dlfcn.h>
#endif

namespace vqk::bind {

// -1: the level in use; 0 to 5, as vqk/simd.h numbers them: use it from now on; 6: the best this CPU runs.
// Returns the level in use.
static int64_t set_level(int64_t level) {
  if (level < -1 || level > 6)
    fail("simd_level", level,
         " is none of -1 (ask), 0 (portable), 1 (avx2), 2 (avxvnni), 3 (avx512), 4 (vnni), 5 (amx), 6 (auto)");
  if (level >= 0) {
    const char* name = level == 6 ? "auto" : simd_name(static_cast<Simd>(level));
    if (const char* error = set_simd_level(name)) fail("simd_level", error);
  }
  return static_cast<int64_t>(simd_level());
}

static double fma_peak() { return cpu::fma_peak_gflops(torch_threads("fma_peak_gflops")); }

#ifdef VQK_WITH_CUDA
// The stable way to a cudaStream_t needs torch 2.13; this function exists since 2.10, but only in a
// torch built with CUDA, so it is looked up when a CUDA tensor arrives instead of being linked. Python
// loads torch's libraries without RTLD_GLOBAL: the library has to be asked by name, it is loaded already.
void* cuda_stream(const char* op, const Tensor& t) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  if (!get)
    fail(op, "this torch has no CUDA (aoti_torch_get_current_cuda_stream is missing); install a CUDA build of torch");
  void* stream = nullptr;
  if (get(t.get_device_index(), &stream) != 0)
    fail(op, "torch refused the current CUDA stream of device ", t.get_device_index());
  return stream;
}
#endif

}  // namespace vqk::bind

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&vqk::bind::set_level));
  m.impl("fma_peak_gflops", TORCH_BOX(&vqk::bind::fma_peak));
}

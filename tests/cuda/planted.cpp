#include <cuda_runtime.h>

#include "calls.h"

namespace vqk::cuda {
const char* planted(int bug, const float* x, const void* half, const int* codes, float* sums, float* out, int* counts,
                    int N, int D, int K, cudaStream_t stream);
}

VQK_CALL(planted) {
  const Array &x = call.in(1), &counts = call.out(2);
  return vqk::cuda::planted(static_cast<int>(call.integer(0)), x.as<float>(), call.in(2).data, call.in(3).as<int>(),
                            call.out(0).as<float>(), call.out(1).as<float>(), counts.as<int>(),
                            static_cast<int>(x.size(0)), static_cast<int>(x.size(1)), static_cast<int>(counts.size(0)),
                            nullptr);
}

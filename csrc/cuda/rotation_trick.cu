// rotation_trick_backward: dz from z, q, grad; the formulas are those of csrc/cpu/estimator_kernel.h.
//
//   in   z, q, grad [N,D]; out dz [N,D]; float, double, bf16 or f16
//   dz = gamma (g - 2 r (r.g) + 2 zhat (qhat.g)), r = (zhat + qhat) / |zhat + qhat|, gamma = |q| / |z|
//
//   warp = one row   | lane 0 | lane 1 | ... | lane 31 | lane 0 | ...     16 bytes a lane, of z, q and g
//     z, q, g --five dots, warp sum--> a, b, c --> dz = a g + b z + c q
//   kPieces > 0: the row stays in registers (D up to 32 kPieces pieces); 0: read again, from the caches.
//
// Kinds: rotation and reflection differ in a, b, c alone; "ste" is a copy of grad. Degenerate rows (z or q zero or not
// finite, lengths more than 1e6 apart, no plane of rotation) get g bit for bit: docs/numerics.md.
// Work and bytes: 16 flops an element against 4 element sizes of traffic: memory bound; data-centre GPUs have the
// double throughput to hide the dots, others (1/64 rate) may not.
// Numerics: dots and the final sum in double: they cancel where z is close to -q.
// Determinism: fixed order of additions; rows are independent.
// Shared memory: none. Registers: 128 at most: 2 blocks of 8 warps a multiprocessor.
// Limits: none in N and D; rows that are not whole pieces, or not aligned, are read element by element.
// Run on emulators only: timings and tuning are open.
#include "estimator.cuh"
#include "vqk/launch.h"

namespace vqk::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Piece {
  T x[kWidth];
};

// kWidth elements a load; kPieces of them a lane kept in registers, or 0.
template <class T, int kWidth, int kPieces>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const T* __restrict__ z, const T* __restrict__ q, const T* __restrict__ grad, T* __restrict__ dz,
                    int64_t N, int64_t pieces, Estimator estimator) {
  using P = Piece<T, kWidth>;
  const int lane = threadIdx.x % 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; row < N; row += step) {
    const P* zr = reinterpret_cast<const P*>(z) + row * pieces;
    const P* qr = reinterpret_cast<const P*>(q) + row * pieces;
    const P* gr = reinterpret_cast<const P*>(grad) + row * pieces;
    P* out = reinterpret_cast<P*>(dz) + row * pieces;
    P zv[kPieces ? kPieces : 1], qv[kPieces ? kPieces : 1], gv[kPieces ? kPieces : 1];
    Dots dots{};
    auto add = [&](const P& a, const P& b, const P& c) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) dots.add(to_double(a.x[i]), to_double(b.x[i]), to_double(c.x[i]));
    };
    if constexpr (kPieces > 0) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int64_t at = lane + 32 * i;
        if (at < pieces) zv[i] = zr[at], qv[i] = qr[at], gv[i] = gr[at];
      }
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (lane + 32 * i < pieces) add(zv[i], qv[i], gv[i]);
    } else {
      for (int64_t at = lane; at < pieces; at += 32) add(zr[at], qr[at], gr[at]);
    }
    dots = {warp_sum(dots.zz), warp_sum(dots.qq), warp_sum(dots.zq), warp_sum(dots.zg), warp_sum(dots.qg)};
    const Weights w = weights(dots, estimator);
    auto combine = [&](const P& a, const P& b, const P& c) {
      P result = c;
      if (w.straight()) return result;
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        round_to(w.apply(to_double(a.x[i]), to_double(b.x[i]), to_double(c.x[i])), &result.x[i]);
      return result;
    };
    if constexpr (kPieces > 0) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (lane + 32 * i < pieces) out[lane + 32 * i] = combine(zv[i], qv[i], gv[i]);
    } else {
      for (int64_t at = lane; at < pieces; at += 32) out[at] = combine(zr[at], qr[at], gr[at]);
    }
  }
}

template <class T, int kWidth, int kPieces>
void launch(const RotationTrickBackwardParams& p, int64_t pieces, cudaStream_t stream) {
  VQK_LAUNCH_TASKS((backward_kernel<T, kWidth, kPieces>), (p.N + kThreads / 32 - 1) / (kThreads / 32), kThreads, 0,
                   stream, static_cast<const T*>(p.z), static_cast<const T*>(p.q), static_cast<const T*>(p.grad),
                   static_cast<T*>(p.dz), p.N, pieces, p.estimator);
}

template <class T>
void launch_for(const RotationTrickBackwardParams& p, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const uintptr_t pointers = reinterpret_cast<uintptr_t>(p.z) | reinterpret_cast<uintptr_t>(p.q) |
                             reinterpret_cast<uintptr_t>(p.grad) | reinterpret_cast<uintptr_t>(p.dz);
  if (p.D % kWidth || pointers % 16) return launch<T, 1, 0>(p, p.D, stream);
  const int64_t pieces = p.D / kWidth;
  if (pieces <= 32) launch<T, kWidth, 1>(p, pieces, stream);
  else if (pieces <= 64) launch<T, kWidth, 2>(p, pieces, stream);
  else launch<T, kWidth, 0>(p, pieces, stream);
}

}  // namespace

const char* rotation_trick_backward(const RotationTrickBackwardParams& p, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (p.N == 0 || p.D == 0) return nullptr;
  if (p.estimator == Estimator::ste) {
    const int64_t size = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
    cudaMemcpyAsync(p.dz, p.grad, p.N * p.D * size, cudaMemcpyDeviceToDevice, stream);
    return launch_error();
  }
  switch (p.dtype) {
    case DType::f64: launch_for<double>(p, stream); break;
    case DType::bf16: launch_for<__nv_bfloat16>(p, stream); break;
    case DType::f16: launch_for<__half>(p, stream); break;
    default: launch_for<float>(p, stream); break;
  }
  return launch_error();
}

}  // namespace vqk::cuda

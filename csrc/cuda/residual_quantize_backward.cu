// residual_quantize_backward: dz = J^T grad + sum_l commitment_scale[l] r_l, with r_l = r_{l-1} - c_l, r_0 = z; the
// estimator's formulas are those of csrc/cpu/estimator_kernel.h.
//
//   in   z, grad [H,N,D]; Q codebooks [H,K_l,D]; indices int64 [H,N,Q], -1: the row gets dz = 0
//   out  dz [H,N,D]; float, double, bf16 or f16
//
//   D <= 256:  warp = one row            thread: 16-byte pieces t, t + 32, ... of the row, all in registers:
//   above:     16 warps = one row        pieces t, t + 512, ...: 8 elements whatever the dtype
//
//     z --r -= c_l; q += c_l; acc += scale_l r, level after level--> q, acc
//     z, q, g --five dots, warp sum (and through shared memory)--> a, b, c --> dz = a g + b z + c q + acc
//   per_level: the estimator of every level goes from r_{l-1} to c_l instead, and the Jacobians add up in acc.
//
// Work and bytes: about 4 Q + 16 flops an element (18 Q per level) against 3 element sizes of traffic, and 8 Q bytes a
// row; the codewords come from the second-level cache, Q element sizes: memory bound for small Q, then bound by that
// cache. Recomputing the residuals saves keeping Q N D values from the forward pass.
// Numerics: residuals, q and acc in float (double for double), one rounding a level as in the forward pass; dots and the
// final sum in double: they cancel where z is close to -q.
// Determinism: fixed order of additions; rows are independent.
// Shared memory: 640 bytes where 16 warps share a row. Registers: 85 to 128: 16 warps a multiprocessor.
// Limits: D up to 4096; Q up to 128: pointers and sizes of the codebooks are kernel arguments, so a CUDA graph keeps
// them. An index that is not in its codebook makes the row's gradient NaN: the host would have to wait for the device to
// report it.
// Run on emulators only: timings and tuning are open.
#include "estimator.cuh"
#include "pieces.cuh"
#include "vqk/launch.h"

namespace vqk::cuda {
namespace {

constexpr int kWarpFeatures = 256;  // of a row that one warp keeps in registers
constexpr int kMostWarps = 16;      // that share a row
constexpr int64_t kMostLevels = 128;

struct Codebooks {
  const void* data[kMostLevels];
  int64_t K[kMostLevels];
};

// Sums over the threads of a row, the same for each of them; `shared` where a row has several warps.
template <int kRowWarps>
__device__ inline void row_sums(Dots& t, double (&shared)[5][kMostWarps]) {
  double* const values[5] = {&t.zz, &t.qq, &t.zq, &t.zg, &t.qg};
#pragma unroll
  for (int i = 0; i < 5; ++i) *values[i] = warp_sum(*values[i]);
  if constexpr (kRowWarps > 1) {
    __syncthreads();  // earlier sums have been read
#pragma unroll
    for (int i = 0; i < 5; ++i)
      if (threadIdx.x % 32 == 0) shared[i][threadIdx.x / 32] = *values[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      double sum = 0;
#pragma unroll 4  // all at once would not fit into the registers
      for (int w = 0; w < kRowWarps; ++w) sum += shared[i][w];
      *values[i] = sum;
    }
  }
}

// Warps of a block in which kRowWarps share a row.
constexpr int block_warps(int row_warps) { return row_warps > 8 ? row_warps : 8; }

template <class T, int kRowWarps, bool kPerLevel>
__global__ void __launch_bounds__(32 * block_warps(kRowWarps), kMostWarps / block_warps(kRowWarps))
    backward_kernel(const T* __restrict__ z, const int64_t* __restrict__ indices, const T* __restrict__ grad,
                    const wide_t<T>* __restrict__ scale, T* __restrict__ dz, int64_t H, int64_t N, int Q, int D,
                    Estimator estimator, bool aligned, const Codebooks books) {
  using R = wide_t<T>;
  constexpr int kWidth = Piece<T>::kWidth, kPieces = kWarpFeatures / (32 * kWidth);
  constexpr int kRowThreads = 32 * kRowWarps, kRows = block_warps(kRowWarps) / kRowWarps;
  VQK_SHARED(double, shared, [5][kMostWarps]);
  const int thread = threadIdx.x % kRowThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kRowThreads; row < H * N;
       row += static_cast<int64_t>(gridDim.x) * kRows) {
    const int64_t h = row / N;
    const int64_t* index = indices + row * Q;
    bool skipped = false, unknown = false;
    for (int l = 0; l < Q; ++l) {
      skipped |= index[l] < 0;
      unknown |= index[l] >= books.K[l];
    }
    if (skipped || unknown) {
      Piece<T> constant;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) round_to(skipped ? 0.0 : nan(""), &constant.x[i]);
#pragma unroll
      for (int p = 0; p < kPieces; ++p)
        store_piece(dz + row * D, (thread + p * kRowThreads) * kWidth, D, aligned, constant);
      continue;
    }
    auto load = [&](const T* from, int p) {
      return load_piece(from, (thread + p * kRowThreads) * kWidth, D, aligned);
    };
    auto codeword = [&](int l) { return static_cast<const T*>(books.data[l]) + (h * books.K[l] + index[l]) * D; };
    // q: c_1 + ... + c_Q, or, per level, the residual
    R q[kPieces][kWidth], acc[kPieces][kWidth];
    Piece<T> g[kPieces];
#pragma unroll
    for (int p = 0; p < kPieces; ++p) g[p] = load(grad + row * D, p);
    if constexpr (kPerLevel) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const Piece<T> x = load(z + row * D, p);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) q[p][i] = static_cast<R>(to_double(x.x[i])), acc[p][i] = 0;
      }
#pragma unroll 1
      for (int l = 0; l < Q; ++l) {
        const T* c = codeword(l);
        Weights w{1, 0, 0};
        if (estimator != Estimator::ste) {
          Dots t{};
#pragma unroll
          for (int p = 0; p < kPieces; ++p) {
            const Piece<T> x = load(c, p);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) t.add(q[p][i], to_double(x.x[i]), to_double(g[p].x[i]));
          }
          row_sums<kRowWarps>(t, shared);
          w = weights(t, estimator);
        }
        const double s = scale[l];
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
          const Piece<T> x = load(c, p);  // again, from the first-level cache: registers are dearer
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            const R before = q[p][i], value = static_cast<R>(to_double(x.x[i]));
            q[p][i] = before - value;
            acc[p][i] = static_cast<R>(acc[p][i] + w.apply(before, value, to_double(g[p].x[i])) + s * q[p][i]);
          }
        }
      }
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        Piece<T> out;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) round_to(acc[p][i], &out.x[i]);
        store_piece(dz + row * D, (thread + p * kRowThreads) * kWidth, D, aligned, out);
      }
    } else {
      Dots t{};
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const Piece<T> x = load(z + row * D, p);
        R r[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) r[i] = static_cast<R>(to_double(x.x[i])), q[p][i] = 0, acc[p][i] = 0;
        for (int l = 0; l < Q; ++l) {
          const Piece<T> c = load(codeword(l), p);
          const R s = scale[l];
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            const R value = static_cast<R>(to_double(c.x[i]));
            r[i] -= value;
            q[p][i] += value;
            acc[p][i] += s * r[i];
          }
        }
#pragma unroll
        for (int i = 0; i < kWidth; ++i) t.add(to_double(x.x[i]), q[p][i], to_double(g[p].x[i]));
      }
      Weights w{1, 0, 0};
      if (estimator != Estimator::ste) {
        row_sums<kRowWarps>(t, shared);
        w = weights(t, estimator);
      }
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const Piece<T> x = load(z + row * D, p);
        Piece<T> out;
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          round_to(w.apply(to_double(x.x[i]), q[p][i], to_double(g[p].x[i])) + acc[p][i], &out.x[i]);
        store_piece(dz + row * D, (thread + p * kRowThreads) * kWidth, D, aligned, out);
      }
    }
  }
}

template <class T, int kRowWarps>
void launch(const ResidualQuantizeBackwardParams& p, cudaStream_t stream) {
  using R = wide_t<T>;
  Codebooks books{};
  const T *z = static_cast<const T*>(p.z), *grad = static_cast<const T*>(p.grad);
  T* dz = static_cast<T*>(p.dz);
  bool aligned = rows_aligned(p.D, z, grad, dz);
  for (int l = 0; l < p.Q; ++l) {
    books.data[l] = p.codebooks[l], books.K[l] = p.K[l];
    aligned = aligned && rows_aligned(p.D, static_cast<const T*>(p.codebooks[l]));
  }
  constexpr int kRows = block_warps(kRowWarps) / kRowWarps, kThreads = 32 * block_warps(kRowWarps);
  const int64_t tasks = (p.H * p.N + kRows - 1) / kRows;
  const R* scale = static_cast<const R*>(p.commitment_scale);
  const int Q = static_cast<int>(p.Q), D = static_cast<int>(p.D);
  if (p.per_level)
    VQK_LAUNCH_TASKS((backward_kernel<T, kRowWarps, true>), tasks, kThreads, 0, stream, z, p.indices, grad, scale, dz,
               p.H, p.N, Q, D, p.estimator, aligned, books);
  else
    VQK_LAUNCH_TASKS((backward_kernel<T, kRowWarps, false>), tasks, kThreads, 0, stream, z, p.indices, grad, scale,
               dz, p.H, p.N, Q, D, p.estimator, aligned, books);
}

}  // namespace

const char* residual_quantize_backward(const ResidualQuantizeBackwardParams& p, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (p.D > kWarpFeatures * kMostWarps)
    return "D is above 4096, the most that the CUDA kernel keeps in registers; use_backend(\"triton\") takes any D";
  if (p.Q > kMostLevels)
    return "there are more than 128 codebooks, the most that the CUDA kernel takes; use_backend(\"triton\") takes any number";
  if (p.H * p.N == 0 || p.D == 0) return nullptr;
  for_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.D <= kWarpFeatures) launch<T, 1>(p, stream);
    else launch<T, kMostWarps>(p, stream);
  });
  return launch_error();
}

}  // namespace vqk::cuda

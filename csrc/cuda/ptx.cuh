// What CUDA C++ cannot say by itself: PTX instructions, shared memory and launches. The only file with inline assembly.
// With VQK_EMULATED everything here comes from tests/cuda/emulator.h, and a kernel is ordinary C++.
//
//   VQK_SHARED(float, tile, [8][32]);             static shared memory, aligned to 16 bytes
//   VQK_DYNAMIC_SHARED(float, buffer);            a pointer to the launch's shared memory, aligned to 128 bytes
//   VQK_LAUNCH((kernel<T, 4>), grid, block, shared_bytes, stream, arguments...);
//
// Fragments of mma, with g = lane / 4 and t = lane % 4, elements of 16 bits in pairs, the lower one in the lower half:
//   m16n8k16   a: (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8)   b: (k = 2t, n = g) (2t + 8, g)
//   m16n8k8    a: (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4)       b: (k = t, n = g) (t + 4, g)
//   both       c: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
// ldmatrix_x4: lane i gives the address of row i % 8 of matrix i / 8, 16 bytes; register m of a lane gets row g, 16-bit
// elements 2t and 2t + 1 of matrix m.
#pragma once
#ifdef VQK_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define VQK_SHARED(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__
#define VQK_DYNAMIC_SHARED(T, name)                               \
  extern __shared__ __align__(128) unsigned char vqk_shared_[];   \
  T* const name = reinterpret_cast<T*>(vqk_shared_)
#define VQK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)

namespace vqk::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, in the background; zeros, and nothing is read, where not valid. Both addresses
// are multiples of 16, also where not valid.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until at most N of this thread's committed groups are under way. Other threads see the data after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

#define VQK_MMA(shape_and_types)                                                                         \
  asm volatile("mma.sync.aligned." shape_and_types                                                       \
               " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"                                \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// c += a b for a [16,16] and b [16,8]
__device__ __forceinline__ void mma_bf16_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  VQK_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}

__device__ __forceinline__ void mma_f16_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  VQK_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}

// c += a b for a [16,8] and b [8,8]; elements from to_tf32
__device__ __forceinline__ void mma_tf32_1688(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  VQK_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}

#undef VQK_MMA

// The nearest number of 11 significant bits, halves away from zero, as the bits of a float.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return bits;
}

}  // namespace vqk::cuda
#endif

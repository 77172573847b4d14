// CUDA kernels on the CPU: what csrc/cuda/ptx.cuh takes instead of PTX when VQK_EMULATED is defined.
//
// The .cu files compile as C++. Every thread of a block is a fiber; the lanes of a warp meet in shuffles, votes and
// mma, the threads of a block in barriers (emulator.cpp schedules them). What each piece makes visible:
//
//   shared memory    0xFF in every byte (NaN, -1) at the start of a block; red zones between variables under ASan
//   meetings         a lane that is missing, gone or elsewhere; barriers that not all threads reach; deadlock
//   cp.async         lands when its group is waited for, or at once (settings.early): both must give the same
//   order            random blocks, warps and lanes; TSan sees no order but barriers, __syncwarp and the launch's end
//   tensor cores     float32 sums, or as bad as they are said to be (settings.rough)
//   launches         refused as a device would refuse them: threads, empty grids, dynamic and static shared memory
//   host functions   those that a launcher may call; a missing one (cudaMalloc, any synchronisation) does not link
//
// Not here: textures, clusters, TMA, wgmma, grid-wide barriers, inline assembly outside ptx.cuh, and time.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <typeinfo>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ shared_memory_is_declared_by_VQK_SHARED

namespace vqk::emulator {

struct Settings {
  unsigned seed = 1;
  bool early = false;  // background copies land at once
  bool rough = false;  // tensor cores round as badly as they may
  int multiprocessors = 2;
  int capability = 80;  // 80 for 8.0
};
extern Settings settings;

struct Place {  // in the source
  const char *file, *what;
  int line;
};
#define VQK_PLACE(what)                                                 \
  ([]() -> const vqk::emulator::Place* {                                \
    static constexpr vqk::emulator::Place place{__FILE__, what, __LINE__}; \
    return &place;                                                      \
  }())

struct Thread {
  uint3 thread, block;
  dim3 block_size, grid;
  int lane;
};
extern Thread* current;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Meets the other threads of the block, or the lanes of `mask`; `act` sees what each of them brought, before any goes
// on. `ordered`: what was written before is visible after.
using Act = void (*)(int count, void* const* brought);  // null where the mask has no lane
void meet_block(const Place*, Act = nullptr, void* mine = nullptr);
void meet_warp(unsigned mask, const Place*, bool ordered, Act = nullptr, void* mine = nullptr);

void* shared_variable(const Place*, size_t bytes);
void* dynamic_shared();
void fence();

// Background copies: remembered by the calling thread, and done by it.
struct Copy {
  void* to;
  const void* from;
};
void copy_later(Copy);
void commit_copies();
bool next_copy(int groups_left, Copy*);  // false: at most that many groups are under way

struct Launch {
  const void* function;
  const char* type_name;  // mangled, holds the kernel's name and its template arguments
  dim3 grid, block;
  size_t shared_bytes;
  int count;  // of arguments
  void* const* arguments;
  const size_t* sizes;
  void (*body)(void*);
  void* context;
  int64_t static_left = 0;  // bytes that dynamic shared memory leaves for static variables; launch() sets it
};
constexpr int kStaticShared = 48 << 10;         // what a kernel may use without asking
void another_device();                          // forgets what launchers have asked of the last one
void launch(Launch);                            // remembers a refusal, as the device would
void run(const Launch&);                        // on fibers
extern void (*launch_instead)(const Launch&);   // if not null, takes the place of `run`
void list_kernel(const char* type_name);
std::vector<std::string> kernels_never_launched();  // of all that the program could launch

template <auto kernel>
struct Kernel;
template <class... P, void (*kernel)(P...)>
struct Kernel<kernel> {
  inline static const bool listed = (list_kernel(typeid(Kernel).name()), true);
  static void launch_on(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, P... arguments) {
    (void)listed;
    std::tuple<P...> all(arguments...);
    std::apply(
        [&](auto&... each) {
          void* const places[] = {&each...};
          const size_t sizes[] = {sizeof each...};
          auto body = [](void* context) { std::apply(kernel, *static_cast<std::tuple<P...>*>(context)); };
          launch({reinterpret_cast<const void*>(kernel), typeid(Kernel).name(), grid, block, shared_bytes,
                  static_cast<int>(sizeof...(P)), places, sizes, body, &all});
        },
        all);
  }
};

// ------------------------------------------------------------------------------------------- exchanges within a warp

struct Shuffle {
  uint64_t value;
  int source;
};
void shuffle(int, void* const*);

template <class T>
T shuffled(unsigned mask, T value, int source, const Place* place) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  Shuffle mine{0, source};
  std::memcpy(&mine.value, &value, sizeof(T));
  meet_warp(mask, place, false, shuffle, &mine);
  std::memcpy(&value, &mine.value, sizeof(T));
  return value;
}

struct Vote {
  uint64_t value;
  unsigned lanes;  // with a value that is not zero, or the same
};
void vote(int, void* const*);
void match(int, void* const*);

template <class T>
unsigned voted(unsigned mask, T value, Act act, const Place* place) {
  Vote mine{0, 0};
  std::memcpy(&mine.value, &value, sizeof(T));
  meet_warp(mask, place, false, act, &mine);
  return mine.lanes;
}

void reduce_add(int, void* const*);
void reduce_min(int, void* const*);
void reduce_max(int, void* const*);
void reduce_or(int, void* const*);

template <class T>
T reduced(unsigned mask, T value, Act act, const Place* place) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>, "__reduce_*_sync takes 32-bit integers");
  int64_t mine = value;
  meet_warp(mask, place, false, act, &mine);
  return static_cast<T>(mine);
}

inline unsigned everyone() { return ~0u; }
inline unsigned everyone(unsigned mask) { return mask; }

int counted(int predicate, const Place*);  // threads of the block whose predicate holds

// A value that the compiler cannot fuse with what follows: the build fuses multiply and add as nvcc does.
template <class T>
inline T rounded(T x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#else
  asm("" : "+w"(x));
#endif
  return x;
}

}  // namespace vqk::emulator

#define threadIdx (vqk::emulator::current->thread)
#define blockIdx (vqk::emulator::current->block)
#define blockDim (vqk::emulator::current->block_size)
#define gridDim (vqk::emulator::current->grid)
#define warpSize 32

#define VQK_SHARED(T, name, ...)                              \
  auto& name = *static_cast<std::type_identity_t<T __VA_ARGS__>*>( \
      vqk::emulator::shared_variable(VQK_PLACE(#name), sizeof(T __VA_ARGS__)))
#define VQK_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(vqk::emulator::dynamic_shared())
#define VQK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  vqk::emulator::Kernel<kernel>::launch_on(grid, block, shared_bytes, stream, __VA_ARGS__)

#define __syncthreads() vqk::emulator::meet_block(VQK_PLACE("__syncthreads"))
#define __syncthreads_count(p) vqk::emulator::counted((p) != 0, VQK_PLACE("__syncthreads_count"))
#define __syncthreads_or(p) (vqk::emulator::counted((p) != 0, VQK_PLACE("__syncthreads_or")) > 0)
#define __syncthreads_and(p) (vqk::emulator::counted((p) == 0, VQK_PLACE("__syncthreads_and")) == 0)
#define __syncwarp(...) vqk::emulator::meet_warp(vqk::emulator::everyone(__VA_ARGS__), VQK_PLACE("__syncwarp"), true)
#define VQK_SHUFFLE(mask, value, source, what) vqk::emulator::shuffled(mask, value, source, VQK_PLACE(what))
#define VQK_LANE (vqk::emulator::current->lane)
#define __shfl_sync(mask, value, source) VQK_SHUFFLE(mask, value, static_cast<int>(source) & 31, "__shfl_sync")
#define __shfl_xor_sync(mask, value, bits) \
  VQK_SHUFFLE(mask, value, VQK_LANE ^ (static_cast<int>(bits) & 31), "__shfl_xor_sync")
#define __shfl_down_sync(mask, value, by) \
  VQK_SHUFFLE(mask, value, VQK_LANE + static_cast<int>(by) < 32 ? VQK_LANE + static_cast<int>(by) : VQK_LANE, "__shfl_down_sync")
#define __shfl_up_sync(mask, value, by) \
  VQK_SHUFFLE(mask, value, VQK_LANE < static_cast<int>(by) ? VQK_LANE : VQK_LANE - static_cast<int>(by), "__shfl_up_sync")
#define VQK_VOTE(mask, p, what) vqk::emulator::voted(mask, static_cast<int>((p) != 0), vqk::emulator::vote, VQK_PLACE(what))
#define __ballot_sync(mask, p) VQK_VOTE(mask, p, "__ballot_sync")
#define __any_sync(mask, p) (VQK_VOTE(mask, p, "__any_sync") != 0)
#define __all_sync(mask, p) (VQK_VOTE(mask, !(p), "__all_sync") == 0)
#define __match_any_sync(mask, v) vqk::emulator::voted(mask, v, vqk::emulator::match, VQK_PLACE("__match_any_sync"))
#define VQK_REDUCE(mask, v, how) vqk::emulator::reduced(mask, v, vqk::emulator::how, VQK_PLACE(#how))
#define __reduce_add_sync(mask, v) VQK_REDUCE(mask, v, reduce_add)
#define __reduce_min_sync(mask, v) VQK_REDUCE(mask, v, reduce_min)
#define __reduce_max_sync(mask, v) VQK_REDUCE(mask, v, reduce_max)
#define __reduce_or_sync(mask, v) VQK_REDUCE(mask, v, reduce_or)

// ------------------------------------------------------------------------------- atomics: relaxed, as on the device

template <class T, class F>
inline T vqk_atomic(T* p, F change) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static_assert(sizeof(T) == sizeof(Bits));
  Bits* const place = reinterpret_cast<Bits*>(p);
  Bits before = __atomic_load_n(place, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(place, &before, std::bit_cast<Bits>(T(change(std::bit_cast<T>(before)))), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return std::bit_cast<T>(before);
}
// clang-format off
template <class T> inline T atomicAdd(T* p, std::type_identity_t<T> v) { return vqk_atomic(p, [=](T x) { return x + v; }); }
template <class T> inline T atomicSub(T* p, std::type_identity_t<T> v) { return vqk_atomic(p, [=](T x) { return x - v; }); }
template <class T> inline T atomicMin(T* p, std::type_identity_t<T> v) { return vqk_atomic(p, [=](T x) { return v < x ? v : x; }); }
template <class T> inline T atomicMax(T* p, std::type_identity_t<T> v) { return vqk_atomic(p, [=](T x) { return x < v ? v : x; }); }
template <class T> inline T atomicOr(T* p, std::type_identity_t<T> v) { return vqk_atomic(p, [=](T x) { return x | v; }); }
template <class T> inline T atomicAnd(T* p, std::type_identity_t<T> v) { return vqk_atomic(p, [=](T x) { return x & v; }); }
template <class T> inline T atomicExch(T* p, std::type_identity_t<T> v) { return vqk_atomic(p, [=](T) { return v; }); }
template <class T> inline T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return vqk_atomic(p, [=](T x) { return x == expected ? v : x; });
}

// -------------------------------------------------------------------------- device functions that the host has not

inline void __threadfence() { vqk::emulator::fence(); }
inline void __threadfence_block() { vqk::emulator::fence(); }
inline void __trap() { vqk::emulator::fail("the kernel stopped itself"); }
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcg(T* p, std::type_identity_t<T> v) { *p = v; }
template <class T> inline void __stcs(T* p, std::type_identity_t<T> v) { *p = v; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __dadd_rn(double a, double b) { return vqk::emulator::rounded(vqk::emulator::rounded(a) + vqk::emulator::rounded(b)); }
inline double __dsub_rn(double a, double b) { return vqk::emulator::rounded(vqk::emulator::rounded(a) - vqk::emulator::rounded(b)); }
inline double __dmul_rn(double a, double b) { return vqk::emulator::rounded(a * b); }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return vqk::emulator::rounded(vqk::emulator::rounded(a) + vqk::emulator::rounded(b)); }
inline float __fsub_rn(float a, float b) { return vqk::emulator::rounded(vqk::emulator::rounded(a) - vqk::emulator::rounded(b)); }
inline float __fmul_rn(float a, float b) { return vqk::emulator::rounded(a * b); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
#define VQK_MIN_MAX(T) \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
VQK_MIN_MAX(int) VQK_MIN_MAX(unsigned) VQK_MIN_MAX(long) VQK_MIN_MAX(unsigned long) VQK_MIN_MAX(long long) VQK_MIN_MAX(unsigned long long)
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
// clang-format on

// ------------------------------------------------------------------------------------------------- PTX instructions

namespace vqk::cuda {

inline void do_copy(const emulator::Copy& c) {
  struct alignas(16) Piece {
    unsigned char bytes[16];
  };
  *static_cast<Piece*>(c.to) = c.from ? *static_cast<const Piece*>(c.from) : Piece{};
}

inline void cp_async16(void* shared, const void* global, bool valid) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
    emulator::fail("cp.async: an address is no multiple of 16: %p to %p", global, shared);
  const emulator::Copy copy{shared, valid ? global : nullptr};
  if (emulator::settings.early) do_copy(copy);
  else emulator::copy_later(copy);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int N>
inline void cp_async_wait() {
  for (emulator::Copy copy; emulator::next_copy(N, &copy);) do_copy(copy);
}

struct Rows {
  const void* mine;
  const uint32_t* rows[4];
};
void ldmatrix_rows(int, void* const*);  // emulator.cpp, like the products below
inline void ldmatrix_at(uint32_t (&r)[4], const void* row, const emulator::Place* place) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    emulator::fail("ldmatrix: the address of a row is no multiple of 16: %p", row);
  Rows rows{row, {}};
  emulator::meet_warp(~0u, place, false, ldmatrix_rows, &rows);
  for (int m = 0; m < 4; ++m) r[m] = rows.rows[m][emulator::current->lane % 4];
}
#define ldmatrix_x4(r, row) ldmatrix_at(r, row, VQK_PLACE("ldmatrix_x4"))

struct Fragments {
  uint32_t a[4], b[2];
  float c[4];
};
void mma_bf16(int, void* const*);
void mma_f16(int, void* const*);
void mma_tf32(int, void* const*);
inline void mma_at(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emulator::Act act,
                   const emulator::Place* place) {
  Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  emulator::meet_warp(~0u, place, false, act, &mine);
  for (int i = 0; i < 4; ++i) c[i] = mine.c[i];
}
#define mma_bf16_16816(c, a, b0, b1) mma_at(c, a, b0, b1, vqk::cuda::mma_bf16, VQK_PLACE("mma_bf16_16816"))
#define mma_f16_16816(c, a, b0, b1) mma_at(c, a, b0, b1, vqk::cuda::mma_f16, VQK_PLACE("mma_f16_16816"))
#define mma_tf32_1688(c, a, b0, b1) mma_at(c, a, b0, b1, vqk::cuda::mma_tf32, VQK_PLACE("mma_tf32_1688"))

inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::isfinite(x) ? (bits + 0x1000) & 0xffffe000 : bits;
}

}  // namespace vqk::cuda

// The coarse pass of the searches on tensor cores, and the copies it multiplies (proofs: docs/numerics.md).
//
// A score near s(c) = |c|^2/2 - z.c (dot, cosine: -z.c) is computed on copies of z and the codebook, each multiplied by
// a power of two that brings its largest magnitude to [2^8, 2^9) and rounded to what the arithmetic multiplies exactly:
//
//     score = half_norm[c] - ratio[z] * (z.c)        ratio: of the two scales
//
// What rounding costs is measured, row by row and for the codebook, and enters the bound; values too small for products
// to be normal numbers become zero, which is measured likewise. Copies are padded with zeros to whole tiles and to
// whole mma steps of 32 bytes, so the hot loop has no masks and every address is a multiple of 16.
//
//     block: 128 rows x 128 codewords a tile, 4 warps of 64 x 64          shared memory, 16 KB a chunk
//
//         rows     +--------+--------+                   resident   [rows: every chunk][codes: stages]
//         128      | warp 0 | warp 2 |                   else       [rows: stages][codes: stages]
//         x        +--------+--------+
//         chunk    | warp 1 | warp 3 |  64 x 64: 4 x 8   chunk = 128 bytes of each of 128 rows (64 or 32 features)
//                  +--------+--------+  accumulators     piece p (16 bytes) of row r lies at place p ^ (r % 8):
//                    codes 128 x chunk                   neither cp.async nor ldmatrix meets a bank twice
//
// cp.async fetches one or two chunks ahead, across tiles; one barrier a chunk. How many stages and which rows are
// resident depends on the architecture: tiles.cuh. ldmatrix moves bytes: bf16, fp16 and tf32 have the same addresses.
// Registers: 128 accumulators and 8 x (best, second, index, ratio) a thread: two blocks a multiprocessor where shared
// memory allows.
#pragma once
#include "search.cuh"
#include "tiles.cuh"

namespace vqk::cuda {

constexpr int kMaxRatio = 60;       // of exponents of row and codebook, beyond which there is no bound
constexpr int kSafeExponent = 400;  // of float64 values whose squares neither overflow nor vanish
constexpr int64_t kMaxFeatures = 1 << 16;

// What a coarse pass multiplies: round() gives the bits of one value, |x| < 2^9, and what they stand for.
struct Fp16 {
  static constexpr int kBytes = 2;
  static constexpr bool kTensorCores = true;
  __device__ static uint32_t round(float x, float& y) {
    const __half h = __float2half_rn(fabsf(x) < 0x1p-14f ? 0.0f : x);
    y = __half2float(h);
    return __half_as_ushort(h);
  }
  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_f16_16816(c, a, b0, b1);
  }
};

struct Bf16 {
  static constexpr int kBytes = 2;
  static constexpr bool kTensorCores = true;
  __device__ static uint32_t round(float x, float& y) {
    const __nv_bfloat16 h = __float2bfloat16_rn(fabsf(x) < 0x1p-60f ? 0.0f : x);
    y = __bfloat162float(h);
    return __bfloat16_as_ushort(h);
  }
  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16_16816(c, a, b0, b1);
  }
};

struct Tf32 {
  static constexpr int kBytes = 4;
  static constexpr bool kTensorCores = true;
  __device__ static uint32_t round(float x, float& y) {
    const uint32_t bits = to_tf32(fabsf(x) < 0x1p-60f ? 0.0f : x);
    y = __uint_as_float(bits);
    return bits;
  }
  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_tf32_1688(c, a, b0, b1);
  }
};

struct Fp32 {  // without tensor cores: few.cuh
  static constexpr int kBytes = 4;
  static constexpr bool kTensorCores = false;
  __device__ static uint32_t round(float x, float& y) {
    y = fabsf(x) < 0x1p-60f ? 0.0f : x;
    return __float_as_uint(y);
  }
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Bytes of a row's copy: whole steps of 32.
template <class Arithmetic>
__host__ __device__ int64_t copy_bytes(int64_t D) {
  return (D * Arithmetic::kBytes + 31) / 32 * 32;
}

// floor(log2(x)), exactly; 0 where x is 0.
__device__ inline int exponent(double x) {
  return x > 0 ? static_cast<int>(__double_as_longlong(x) >> 52) - 1023 : 0;
}
__device__ inline double power_of_two(int e) { return __longlong_as_double(static_cast<long long>(e + 1023) << 52); }
__device__ inline float power_of_two_float(int e) { return __uint_as_float(static_cast<uint32_t>(e + 127) << 23); }

// What brings a largest magnitude of exponent e to [2^8, 2^9), or as close as there is a number for it. Two factors: of
// float32 one would not always be a number.
template <class T>
struct Scale {
  wide_t<T> first, second;
  __device__ explicit Scale(int e) {
    const int s = 8 - e < 1023 ? 8 - e : 1023;
    if constexpr (std::is_same_v<T, double>) first = power_of_two(s), second = 1;
    else first = power_of_two_float(s / 2), second = power_of_two_float(s - s / 2);
  }
  __device__ wide_t<T> operator()(T x) const { return static_cast<wide_t<T>>(to_double(x)) * first * second; }
};

// Eight lanes work on one row; all get the result.
__device__ inline double group_max(double x) {
  for (int offset = 4; offset > 0; offset >>= 1) x = fmax(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}
template <class F>
__device__ F group_sum(F x) {
  for (int offset = 4; offset > 0; offset >>= 1) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// The largest |x[d]|, -1 where a value is not finite or the row is not wanted.
template <class T>
__device__ double largest_magnitude(const T* x, int64_t D, bool wanted) {
  wide_t<T> largest = 0;
  for (int64_t d = threadIdx.x % 8; d < D && wanted; d += 8) {
    const wide_t<T> v = fabs(static_cast<wide_t<T>>(to_double(x[d])));
    largest = v <= largest ? largest : v < static_cast<wide_t<T>>(HUGE_VAL) ? v : static_cast<wide_t<T>>(HUGE_VAL);
  }
  const double all = group_max(wanted ? static_cast<double>(largest) : HUGE_VAL);
  return finite(all) ? all : -1;
}

struct Lengths {
  double row2, lost2;  // squares: of the scaled row, and of what rounding took away; never too small, 2^-8 too large
};

// Scales and rounds a row; store(i, word) gets its copy, 4 bytes at a time. Rows not usable become zero.
template <class Arithmetic, class T, class Store>
__device__ Lengths copy_row(const T* x, int64_t D, bool usable, int e, const Store& store) {
  constexpr int kPerWord = 4 / Arithmetic::kBytes;
  const Scale<T> scale(e);
  const int words = static_cast<int>(copy_bytes<Arithmetic>(D) / 4);
  float squares = 0, lost = 0;  // a lane adds an eighth of at most 2^16 squares: less than 2^-10 off
  for (int i = threadIdx.x % 8; i < words; i += 8) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < kPerWord; ++j) {
      const int64_t d = static_cast<int64_t>(i) * kPerWord + j;
      if (!usable || d >= D) continue;
      const wide_t<T> v = scale(x[d]);
      float y;
      word |= Arithmetic::round(static_cast<float>(v), y) << (16 * j);
      const float error = static_cast<float>(v - y);
      squares += static_cast<float>(v) * static_cast<float>(v);
      lost += error * error;
    }
    store(i, word);
  }
  return {group_sum(squares) * (1 + 0x1p-9), group_sum(lost) * (1 + 0x1p-9)};
}

// Of one head's codebook, over its finite codewords; doubles, and atomicMax sees their bits.
struct Largest {
  unsigned long long magnitude, row2, lost2;
};
__device__ inline void raise(unsigned long long& to, double x) {
  atomicMax(&to, static_cast<unsigned long long>(__double_as_longlong(x)));
}
__device__ inline double value_of(unsigned long long bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}

// What a row's scores need, and the distance within which they do not decide: 2 eps, +inf where row and codebook are
// too unlike for a bound, -1 where the row has no nearest codeword or is not asked for.
struct Margin {
  float ratio, margin;
};

// Not below sqrt(x), and at most 2^-18 or 2^-50 above. The exact one calls a function, which costs registers.
__device__ inline double length_of(double x) {
  const float y = static_cast<float>(x);
  return y > 0x1p-100f ? static_cast<double>(y * rsqrtf(y)) * (1 + 0x1p-19) : 0x1p-50;
}

template <class Arithmetic, class T>
__device__ Margin row_margin(int64_t D, double magnitude, Lengths row, const Largest& codebook, bool l2) {
  if (magnitude < 0) return {1, -1};
  const double c_magnitude = value_of(codebook.magnitude);
  const int e = exponent(magnitude), ce = exponent(c_magnitude);
  const int apart = l2 && magnitude > 0 ? e - ce : 0;
  bool bounded = abs(apart) <= kMaxRatio;
  if constexpr (std::is_same_v<T, double>) bounded = bounded && abs(e) <= kSafeExponent && abs(ce) <= kSafeExponent;
  const double ratio = power_of_two(bounded ? apart : 0);
  const double eps =
      copied_error_bound(D, length_of(row.row2), length_of(row.lost2), length_of(value_of(codebook.row2)),
                         length_of(value_of(codebook.lost2)), ratio, l2, Arithmetic::kTensorCores);
  return {static_cast<float>(ratio), bounded ? static_cast<float>(2 * eps * (1 + 0x1p-20)) : HUGE_VALF};
}

constexpr int kCopyThreads = 256;
constexpr int64_t kCopyRows = kCopyThreads / 8;

template <class Kernel>
dim3 copy_grid(Kernel kernel, int64_t H, int64_t rows) {
  return grid_of_columns(kernel, kCopyThreads, 0, (rows + kCopyRows - 1) / kCopyRows, H);
}

namespace {  // each file has kernels of its own

template <class T>
__global__ void __launch_bounds__(kCopyThreads)
    largest_kernel(const T* __restrict__ codebook, Largest* largest, int64_t H, int64_t K, int64_t D) {
  for (int64_t h = blockIdx.y; h < H; h += gridDim.y)
    for (int64_t first = blockIdx.x * kCopyRows; first < K; first += gridDim.x * kCopyRows) {
      const int64_t k = first + threadIdx.x / 8;
      const double magnitude = largest_magnitude(codebook + (h * K + k) * D, D, k < K);
      if (threadIdx.x % 8 == 0 && magnitude > 0) raise(largest[h].magnitude, magnitude);
    }
}

// half_norms [H,padded_K]: |c|^2/2 of the scaled codeword, 0 for dot and cosine; +inf: never wins.
template <class Arithmetic, class T>
__global__ void __launch_bounds__(kCopyThreads)
    copy_codebook_kernel(const T* __restrict__ codebook, Largest* largest, char* __restrict__ copy,
                         float* __restrict__ half_norms, int64_t H, int64_t K, int64_t padded_K, int64_t D, bool l2) {
  const int64_t bytes = copy_bytes<Arithmetic>(D);
  for (int64_t h = blockIdx.y; h < H; h += gridDim.y) {
    const int e = exponent(value_of(largest[h].magnitude));
    for (int64_t first = blockIdx.x * kCopyRows; first < padded_K; first += gridDim.x * kCopyRows) {
      const int64_t k = first + threadIdx.x / 8, to = h * padded_K + k;
      const T* x = codebook + (h * K + k) * D;
      const bool usable = largest_magnitude(x, D, k < K) >= 0;
      uint32_t* words = reinterpret_cast<uint32_t*>(copy + to * bytes);
      const Lengths lengths = copy_row<Arithmetic>(x, D, usable, e, [&](int i, uint32_t word) { words[i] = word; });
      double square = 0;
      const Scale<T> scale(e);
      for (int64_t d = threadIdx.x % 8; d < D && usable && l2; d += 8) {
        const double v = scale(x[d]);
        square += v * v;
      }
      square = group_sum(square);
      if (threadIdx.x % 8) continue;
      half_norms[to] = usable ? static_cast<float>(0.5 * square) : HUGE_VALF;
      if (usable) raise(largest[h].row2, lengths.row2), raise(largest[h].lost2, lengths.lost2);
    }
  }
}

}  // namespace

// A codebook as the coarse pass has it. Lies in a workspace.
struct CoarseCodebook {
  const char* copy;         // [H,padded_K,copy_bytes]
  const float* half_norms;  // [H,padded_K]
  const Largest* largest;   // [H]
  int64_t padded_K;
};

template <class Arithmetic>
CoarseCodebook take_codebook(Scratch& scratch, int64_t H, int64_t K, int64_t D) {
  const int64_t padded_K = round_up(K, kTile);
  const char* copy = scratch.take<char>(H * padded_K * copy_bytes<Arithmetic>(D));
  const float* half_norms = scratch.take<float>(H * padded_K);
  return {copy, half_norms, scratch.take<Largest>(H), padded_K};
}

template <class Arithmetic, class T>
void copy_codebook(const void* codebook, const CoarseCodebook& to, int64_t H, int64_t K, int64_t D, bool l2,
                   cudaStream_t stream) {
  Largest* largest = const_cast<Largest*>(to.largest);
  cudaMemsetAsync(largest, 0, H * sizeof(Largest), stream);
  VQK_LAUNCH(largest_kernel<T>, copy_grid(largest_kernel<T>, H, K), kCopyThreads, 0, stream,
             static_cast<const T*>(codebook), largest, H, K, D);
  VQK_LAUNCH((copy_codebook_kernel<Arithmetic, T>), copy_grid(copy_codebook_kernel<Arithmetic, T>, H, to.padded_K),
             kCopyThreads, 0, stream, static_cast<const T*>(codebook), largest, const_cast<char*>(to.copy),
             const_cast<float*>(to.half_norms), H, K, to.padded_K, D, l2);
}

// Where a thread's accumulators belong: rows first_row + 16 m + 8 i, codes first_code + 8 n + j of a tile, for
// acc[m][n][2 i + j].
struct Place {
  int first_row, first_code;
  __device__ Place() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    first_row = 64 * (warp % 2) + lane / 4;
    first_code = 64 * (warp / 2) + 2 * (lane % 4);
  }
};
using Accumulators = float[4][8][4];

__device__ inline int shared_place(int row, int piece) { return row * kTile + ((piece ^ (row & 7)) << 4); }

// Chunks of a row's copy.
__host__ __device__ inline int chunks_of(int64_t copy_bytes) { return static_cast<int>((copy_bytes + kTile - 1) / kTile); }

// The row of kTiles for the current device.
inline Tiles device_tiles() {
  return tiles_of(10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor));
}

// So much dynamic shared memory for the next launches; a device that has less refuses them.
template <class Kernel>
void allow_shared(Kernel kernel, int bytes) {
  cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Dot products of a block's 128 rows with the codewords of tiles [tile, last_tile): epilogue(tile, accumulators) for
// each. `rows`, `codes`: copies; row_at(i): the row in `rows` of row i of the tile. rows null: the copy lies in shared
// memory already, resident. All threads call it; shared memory is free again when it returns.
template <class Arithmetic, class RowAt, class Epilogue>
__device__ __forceinline__ void coarse_pass(const Tiles& tiles, char* shared, const char* rows, const char* codes,
                                            int64_t bytes, int tile, int last_tile, const RowAt& row_at,
                                            const Epilogue& epilogue) {
  const int chunks = chunks_of(bytes), stages = tiles.stages;
  const bool resident = chunks <= tiles.resident;
  char* const code_chunks = shared + (resident ? chunks : stages) * kChunkBytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // The next chunk to fetch.
  int fetch_tile = tile, fetch_chunk = 0, fetch_stage = 0;
  bool fetch_rows = rows != nullptr;
  auto fetch = [&]() {
    if (fetch_tile < last_tile) {
      const int piece = threadIdx.x % 8, first = threadIdx.x / 8;
      const int64_t offset = static_cast<int64_t>(fetch_chunk) * kTile + piece * 16;
      if (offset < bytes) {
        const char* code = codes + (static_cast<int64_t>(fetch_tile) * kTile + first) * bytes + offset;
        char* to = code_chunks + fetch_stage * kChunkBytes + shared_place(first, piece);
#pragma unroll
        for (int i = 0; i < kTile; i += 16) cp_async16(to + i * kTile, code + i * bytes, true);
        if (fetch_rows) {
          to = shared + (resident ? fetch_chunk : fetch_stage) * kChunkBytes + shared_place(first, piece);
#pragma unroll
          for (int i = 0; i < kTile; i += 16)
            cp_async16(to + i * kTile, rows + row_at(first + i) * bytes + offset, true);
        }
      }
      if (++fetch_chunk == chunks) {
        fetch_chunk = 0, ++fetch_tile;
        if (resident) fetch_rows = false;
      }
      fetch_stage = fetch_stage + 1 == stages ? 0 : fetch_stage + 1;
    }
    cp_async_commit();
  };
  for (int i = 0; i < stages - 1; ++i) fetch();

  const int row_in = 64 * (warp % 2) + lane % 16, row_piece = lane / 16;
  const int code_in = 64 * (warp / 2) + lane % 8 + lane / 16 * 8, code_piece = lane / 8 % 2;
  int stage = 0;
  Accumulators acc;
  for (; tile < last_tile; ++tile) {
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < 8; ++n) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (stages == 2) cp_async_wait<0>();
      else cp_async_wait<1>();
      __syncthreads();  // everyone's copies have landed, and the chunk before has been read
      fetch();
      const char* a_chunk = shared + (resident ? chunk : stage) * kChunkBytes;
      const char* b_chunk = code_chunks + stage * kChunkBytes;
      const int64_t left = bytes - static_cast<int64_t>(chunk) * kTile;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        if (step * 32 >= left) break;
        uint32_t a[4][4];
#pragma unroll
        for (int m = 0; m < 4; ++m) ldmatrix_x4(a[m], a_chunk + shared_place(row_in + 16 * m, 2 * step + row_piece));
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          uint32_t b[4];
          ldmatrix_x4(b, b_chunk + shared_place(code_in + 8 * n, 2 * step + code_piece));
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            Arithmetic::mma(acc[m][n], a[m], b[0], b[1]);
            Arithmetic::mma(acc[m][n + 1], a[m], b[2], b[3]);
          }
        }
      }
      stage = stage + 1 == stages ? 0 : stage + 1;
    }
    epilogue(tile, acc);
  }
  __syncthreads();  // every copy has been waited for; those that come next may use the same place
}

// Of some codewords the lowest score, its index, on ties the lowest, and the lowest of the others.
struct Lowest {
  float best, second;
  int index;

  __device__ void join(const Lowest& other) {
    const bool theirs = other.best < best || (other.best == best && other.index < index);
    second = fminf(fminf(second, other.second), theirs ? best : other.best);
    if (theirs) best = other.best, index = other.index;
  }
  __device__ Lowest from_lane(int bits) const {  // of lane ^ bits
    return {__shfl_xor_sync(kFullWarp, best, bits), __shfl_xor_sync(kFullWarp, second, bits),
            __shfl_xor_sync(kFullWarp, index, bits)};
  }
};
constexpr Lowest kNothing = {HUGE_VALF, HUGE_VALF, 0x7fffffff};

// coarse_pass's accumulators into a thread's eight rows, row 2 m + i being first_row + 16 m + 8 i. ratio_of(r): of row r.
template <class RatioOf>
__device__ __forceinline__ void keep_lowest(const Accumulators& acc, const float* half_norms, int tile,
                                            const RatioOf& ratio_of, Lowest (&lowest)[8]) {
  float ratio[8];
#pragma unroll
  for (int r = 0; r < 8; ++r) ratio[r] = ratio_of(r);
  const int first_code = tile * kTile + Place().first_code;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 half = *reinterpret_cast<const float2*>(half_norms + first_code + 8 * n);
#pragma unroll
    for (int r = 0; r < 8; ++r)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float score = __fmaf_rn(-ratio[r], acc[r / 2][n][r % 2 * 2 + j], j ? half.y : half.x);
        lowest[r].second = fminf(lowest[r].second, fmaxf(lowest[r].best, score));
        if (score < lowest[r].best) lowest[r].index = first_code + 8 * n + j;
        lowest[r].best = fminf(lowest[r].best, score);
      }
  }
}

// For each of a block's rows, bit c of the tile where codeword c's score is not above the row's limit (shared memory).
using Survivors = unsigned[kTile][kTile / 32];

template <class RatioOf>
__device__ __forceinline__ void mark_survivors(const Accumulators& acc, const float* half_norms, int tile,
                                               const RatioOf& ratio_of, const float (&limits)[kTile],
                                               Survivors& bits) {
  const Place place;
#pragma unroll
  for (int word = 0; word < 2; ++word) {
    const int code = place.first_code + 32 * word;
    float half[8];  // of codes code, code + 1, code + 8, ...
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float h = half_norms[tile * kTile + code + i / 2 * 8 + i % 2];
      half[i] = h < HUGE_VALF ? h : NAN;  // never wins, even where the limit is infinite
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const float ratio = ratio_of(r), limit = limits[place.first_row + 8 * r];
      unsigned mark = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float score = __fmaf_rn(-ratio, acc[r / 2][4 * word + i / 2][r % 2 * 2 + i % 2], half[i]);
        if (score <= limit) mark |= 1u << (i / 2 * 8 + i % 2);
      }
      if (mark) atomicOr(&bits[place.first_row + 8 * r][code / 32], mark << code % 32);
    }
  }
}

// The canonical choice so far of one row.
struct Choice {
  double value = HUGE_VAL;
  int64_t index = -1;
  bool hopeless = false;  // a sum of overflowing products is not a number: the row has no nearest codeword

  template <class Row, class Code>
  __device__ void compare(const Row* x, const Code* codebook, int64_t k, int64_t D, bool l2) {
    double total = 0;
    for (int64_t d = 0; d < D; ++d) total = canonical_step(total, to_double(x[d]), to_double(codebook[k * D + d]), l2);
    hopeless = hopeless || total != total;
    keep_lower(l2 ? total : -total, k, value, index);
  }
};

// Compares row threadIdx.x with its survivors, lowest index first, and clears them.
template <class Row, class Code>
__device__ void compare_survivors(Survivors& bits, int tile, const Row* x, const Code* codebook, int64_t D, bool l2,
                                  Choice& choice) {
#pragma unroll 1  // rare, and long enough once
  for (int w = 0; w < kTile / 32; ++w) {
    unsigned left = bits[threadIdx.x][w];
    bits[threadIdx.x][w] = 0;
    for (; left; left &= left - 1)
      choice.compare(x, codebook, static_cast<int64_t>(tile) * kTile + 32 * w + __ffs(static_cast<int>(left)) - 1, D,
                     l2);
  }
}

}  // namespace vqk::cuda

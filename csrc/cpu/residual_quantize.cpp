// residual_quantize, forward: r_0 = z; k_l = nearest(r_{l-1}); r_l = r_{l-1} - c_l; quantized = (c_1 + c_2) + ...
//
// z [H,N,D], codebooks Q x [H,K_l,D] -> indices [H,N,Q], quantized [H,N,D], losses [Q], valid [1].
// Every level's codebook is packed once per call; then a task takes a block of rows through all levels
// while its residual (block x D floats) stays in cache:
//
//   z block -> residual -> search level 1 -> residual -= c -> search level 2 -> ... -> quantized, losses
//
// Work: Q * 2NKD flops in the coarse pass of nearest_codeword_kernel.h; z read once, quantized written once.
// Numerics: residual and quantized in float (double for f64), one rounding per subtraction or addition.
// Losses: per row in fp64, rows added in order within a block, blocks added in order; the block size
// depends on H and N alone, so every output is the same whatever the number of threads or the SIMD level.
// Rows that are masked or not finite, or whose residual overflows, get index -1 at every level.
#include <algorithm>
#include <cstring>

#include "nearest_codeword.h"

namespace vqk::cpu {
namespace {

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

uint16_t to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                                              // below 2^-14: a multiple of 2^-24
    float y;
    std::memcpy(&y, &magnitude, 4);
    y += 0.5f;  // the addition rounds to 2^-24, to nearest even
    uint32_t rounded;
    std::memcpy(&rounded, &y, 4);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

template <class T>
void store_row(const T* from, DType dtype, int64_t D, void* to) {
  uint16_t* half = static_cast<uint16_t*>(to);
  if (dtype == DType::bf16)
    for (int64_t d = 0; d < D; ++d) half[d] = to_bf16(static_cast<float>(from[d]));
  else if (dtype == DType::f16)
    for (int64_t d = 0; d < D; ++d) half[d] = to_f16(static_cast<float>(from[d]));
  else
    std::memcpy(to, from, D * sizeof(T));
}

template <class T>
bool all_finite(const T* x, int64_t D) {
  T sum = 0;  // x - x is 0, or NaN where x is not finite
  for (int64_t d = 0; d < D; ++d) sum += x[d] - x[d];
  return sum == 0;
}

// Scratch of one task, for up to `rows` rows.
template <class T>
struct Block {
  char* search;      // the search kernel's own
  int64_t* index;    // [Q][rows]
  double* square;    // [Q][rows] squared length of the level's residual
  T* residual;       // [rows][D]
  T* normalized;     // [rows][D], cosine only
  bool* skip;        // [rows] masked, or found invalid

  static size_t bytes(const SearchKernel& kernel, const ResidualQuantizeParams& p, int64_t rows) {
    Block<T> block{};
    return block.carve(nullptr, kernel, p, rows) - static_cast<char*>(nullptr);
  }

  char* carve(char* memory, const SearchKernel& kernel, const ResidualQuantizeParams& p, int64_t rows) {
    auto take = [&](auto*& pointer, size_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory);
      memory += (count * sizeof(*pointer) + 63) / 64 * 64;
    };
    take(search, kernel.scratch_bytes(static_cast<int>(rows), p.D));
    take(index, rows * p.Q);
    take(square, rows * p.Q);
    take(residual, rows * p.D);
    take(normalized, p.metric == Metric::cosine ? rows * p.D : 0);
    take(skip, rows);
    return memory;
  }
};

// One level for n rows: searches, notes index and squared residual, subtracts. Rows that turn out
// invalid are skipped from then on.
template <class T>
void run_level(const SearchKernel& kernel, const Codebook& cb, const ResidualQuantizeParams& p, const Block<T>& b,
               int n, int64_t* index, double* square) {
  const T* rows = b.residual;
  if (p.metric == Metric::cosine) {
    kernel.normalize(b.residual, sizeof(T) == 8, n, p.D, b.normalized);
    rows = b.normalized;
  }
  kernel.search(cb, rows, b.skip, n, b.search, index, square, {});
  for (int i = 0; i < n; ++i) {
    if (index[i] < 0) {
      b.skip[i] = true;
      continue;
    }
    T* __restrict r = b.residual + i * p.D;
    const T* __restrict c = static_cast<const T*>(cb.codewords) + index[i] * p.D;
    if (p.metric != Metric::l2) {  // for l2 the canonical distance is the squared residual
      double sum = 0;
      for (int64_t d = 0; d < p.D; ++d) {
        const double x = static_cast<double>(r[d]) - static_cast<double>(c[d]);
        sum += x * x;
      }
      square[i] = sum;
    }
    for (int64_t d = 0; d < p.D; ++d) r[d] -= c[d];
  }
}

// quantized and indices of rows [first, first + n) of all H*N; returns how many are valid.
template <class T>
int64_t write_rows(const PackedCodebooks& books, const ResidualQuantizeParams& p, const Block<T>& b, int64_t head,
                   int64_t first, int n) {
  int64_t valid = 0;
  for (int i = 0; i < n; ++i) {
    T* row = b.residual + i * p.D;  // free from here on
    int64_t* indices = p.indices + (first + i) * p.Q;
    b.skip[i] = b.skip[i] || !all_finite(row, p.D);
    if (b.skip[i]) {
      const bool masked = p.mask && !p.mask[first + i];
      std::fill(indices, indices + p.Q, -1);
      std::fill(row, row + p.D, masked ? T(0) : std::numeric_limits<T>::quiet_NaN());
    } else {
      ++valid;
      for (int64_t level = 0; level < p.Q; ++level) {
        indices[level] = b.index[level * n + i];
        const T* __restrict c = static_cast<const T*>(books[level * p.H + head].codewords) + indices[level] * p.D;
        if (level == 0) std::memcpy(row, c, p.D * sizeof(T));
        else for (int64_t d = 0; d < p.D; ++d) row[d] += c[d];
      }
    }
    store_row(row, p.dtype, p.D, static_cast<char*>(p.quantized) + (first + i) * p.D * dtype_size(p.dtype));
  }
  return valid;
}

template <class T>
void run(const ResidualQuantizeParams& p, const Parallel& parallel) {
  const SearchKernel& kernel = search_kernel();
  std::vector<PackedCodebooks::Source> sources;
  for (int64_t level = 0; level < p.Q; ++level)
    for (int64_t h = 0; h < p.H; ++h)
      sources.push_back({static_cast<const char*>(p.codebooks[level]) + h * p.K[level] * p.D * dtype_size(p.dtype),
                         p.K[level]});
  const int64_t rows = rows_per_task(p.H * p.N), blocks = ceil_div(p.N, rows), tasks = p.H * blocks;
  if (tasks == 0) sources.clear();
  const auto packed = packed_codebooks(kernel, sources, p.D, p.dtype, p.metric, true, p.N, parallel);
  const PackedCodebooks& books = *packed;

  ScratchPool pool(Block<T>::bytes(kernel, p, rows));
  std::vector<double> squares(tasks * p.Q, 0.0);  // per task and level, over valid rows
  std::vector<int64_t> valid(tasks, 0);
  parallel_for(parallel, tasks, [&](int64_t task) {
    const int64_t head = task / blocks, start = task % blocks * rows, first = head * p.N + start;
    const int n = static_cast<int>(std::min(rows, p.N - start));
    ScratchPool::Lease memory(pool);
    Block<T> b{};
    b.carve(memory.get(), kernel, p, rows);
    kernel.convert(static_cast<const char*>(p.z) + first * p.D * dtype_size(p.dtype), p.dtype, n * p.D, b.residual);
    for (int i = 0; i < n; ++i) b.skip[i] = p.mask && !p.mask[first + i];
    for (int64_t level = 0; level < p.Q; ++level)
      run_level(kernel, books[level * p.H + head], p, b, n, b.index + level * n, b.square + level * n);
    valid[task] = write_rows(books, p, b, head, first, n);
    for (int64_t level = 0; level < p.Q; ++level) {
      double sum = 0;
      for (int i = 0; i < n; ++i) sum += b.skip[i] ? 0.0 : b.square[level * n + i];
      squares[task * p.Q + level] = sum;
    }
  });

  *p.valid = 0;
  for (int64_t count : valid) *p.valid += count;
  for (int64_t level = 0; level < p.Q; ++level) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += squares[task * p.Q + level];
    static_cast<T*>(p.losses)[level] = static_cast<T>(*p.valid ? sum / (static_cast<double>(*p.valid) * p.D) : 0.0);
  }
}

}  // namespace

void residual_quantize(const ResidualQuantizeParams& p, const Parallel& caller) {
  double work = 0;
  for (int64_t level = 0; level < p.Q; ++level) work += static_cast<double>(p.H) * p.N * p.K[level] * p.D;
  const Parallel parallel = threads_for(work, caller);
  if (p.dtype == DType::f64) run<double>(p, parallel);
  else run<float>(p, parallel);
}

}  // namespace vqk::cpu

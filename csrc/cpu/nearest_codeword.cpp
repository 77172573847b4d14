// nearest_codeword: preparation of codebooks, distribution over tasks, choice of the SIMD level.
#include "nearest_codeword.h"

#include <algorithm>
#include <cstring>

namespace vqk::cpu {
namespace {

constexpr int64_t kChunk = 96;  // codewords per preparation task: whole panels at every level

// Codewords behind one folded lane: few enough that comparing them canonically costs little beside
// the coarse pass, enough that filtering the minima does (docs/numerics.md).
int choose_group(int64_t K, int64_t D) {
  int group = 1;
  while (group < 64 && group * group * D * 4 <= K) group *= 2;
  return group;
}

// As power_of_two_scale of the kernel, for the largest magnitude in a codebook.
double codebook_scale(double largest) {
  if ((largest >= 0x1p-40 && largest <= 0x1p40) || !(largest > 0)) return 1;
  return std::ldexp(1.0, -std::clamp(std::ilogb(largest), -126, 126));
}

template <class T>
void largest_magnitude(const T* rows, int64_t n, int64_t D, double* largest, int64_t* finite) {
  for (int64_t k = 0; k < n; ++k) {
    T row = 0;
    bool usable = true;
    for (int64_t d = 0; d < D; ++d) {
      const T x = std::abs(rows[k * D + d]);
      usable &= x <= std::numeric_limits<T>::max();
      row = row < x ? x : row;
    }
    if (!usable) continue;
    *largest = std::max(*largest, static_cast<double>(row));
    ++*finite;
  }
}

}  // namespace

const SearchKernel& search_kernel() {
#if defined(__x86_64__)
  switch (simd_level()) {
    case Simd::avx512: return avx512_kernel;
    case Simd::avx2: return avx2_kernel;
    default: break;
  }
#endif
  return portable_kernel;
}

PackedCodebooks::PackedCodebooks(const SearchKernel& kernel, const std::vector<Source>& sources, int64_t D,
                                 DType dtype, Metric metric, bool certified, const Parallel& parallel)
    : codebooks_(sources.size()) {
  struct Task {
    size_t codebook;
    int64_t first, last;  // codewords
    double largest = 0;
    int64_t finite = 0;
  };
  std::vector<Task> tasks;
  const size_t size = value_size(dtype);
  const int64_t width = 2 * kernel.lanes;
  const bool converts = dtype == DType::bf16 || dtype == DType::f16, normalizes = metric == Metric::cosine;
  for (size_t i = 0; i < sources.size(); ++i) {
    Codebook& cb = codebooks_[i];
    cb.K = sources[i].K;
    cb.D = D;
    cb.panels_count = ceil_div(cb.K, width);
    cb.group = choose_group(cb.K, D);
    cb.is_double = dtype == DType::f64;
    cb.l2 = metric == Metric::l2;
    cb.certified = certified;
    auto allocate = [&](size_t bytes) { return static_cast<void*>(memory_.emplace_back(bytes).get()); };
    cb.codewords = converts ? allocate(cb.K * D * size) : sources[i].data;
    cb.rows = normalizes ? allocate(cb.K * D * size) : cb.codewords;
    cb.panels = static_cast<float*>(allocate(cb.panels_count * width * D * 4));
    cb.half_norms = static_cast<float*>(allocate(cb.panels_count * width * 4));
    for (int64_t first = 0; first < cb.K; first += kChunk) tasks.push_back({i, first, std::min(first + kChunk, cb.K)});
  }
  parallel_for(parallel, tasks.size(), [&](int64_t t) {
    Task& task = tasks[t];
    const Codebook& cb = codebooks_[task.codebook];
    const int64_t n = task.last - task.first, offset = task.first * D;
    auto at = [&](const void* base) { return const_cast<char*>(static_cast<const char*>(base)) + offset * size; };
    if (converts)
      kernel.convert(static_cast<const char*>(sources[task.codebook].data) + offset * dtype_size(dtype), dtype, n * D,
                     at(cb.codewords));
    if (normalizes) kernel.normalize(at(cb.codewords), cb.is_double, n, D, at(cb.rows));
    if (cb.is_double) largest_magnitude(reinterpret_cast<double*>(at(cb.rows)), n, D, &task.largest, &task.finite);
    else largest_magnitude(reinterpret_cast<float*>(at(cb.rows)), n, D, &task.largest, &task.finite);
  });
  std::vector<double> largest(sources.size(), 0.0);
  for (const Task& task : tasks) {
    largest[task.codebook] = std::max(largest[task.codebook], task.largest);
    codebooks_[task.codebook].finite += task.finite;
  }
  for (size_t i = 0; i < sources.size(); ++i) codebooks_[i].scale = codebook_scale(largest[i]);
  parallel_for(parallel, tasks.size(), [&](int64_t t) {
    Task& task = tasks[t];
    const Codebook& cb = codebooks_[task.codebook];
    task.largest = kernel.pack(cb, task.first / width, ceil_div(task.last, width), const_cast<float*>(cb.panels),
                               const_cast<float*>(cb.half_norms));
  });
  for (const Task& task : tasks)
    codebooks_[task.codebook].norm = std::max(codebooks_[task.codebook].norm, task.largest);
  for (Codebook& cb : codebooks_) cb.norm = std::sqrt(cb.norm);
}

namespace {

// The canonical value as the op returns it: rounded once.
template <class T>
void store_distances(const NearestCodewordParams& p, int64_t first, int n, const double* value, const bool* skip) {
  T* distances = static_cast<T*>(p.distances) + first;
  const double offset = p.metric == Metric::cosine ? 1.0 : 0.0;
  for (int i = 0; i < n; ++i) distances[i] = skip && skip[i] ? T(0) : static_cast<T>(value[i] + offset);
}

}  // namespace

void nearest_codeword(const NearestCodewordParams& p, const Parallel& parallel) {
  if (p.H == 0 || p.N == 0) return;
  const SearchKernel& kernel = search_kernel();
  const size_t size = value_size(p.dtype);
  const bool converts = p.dtype == DType::bf16 || p.dtype == DType::f16, normalizes = p.metric == Metric::cosine;
  std::vector<PackedCodebooks::Source> sources;
  for (int64_t h = 0; h < p.H; ++h)
    sources.push_back({static_cast<const char*>(p.codebook) + h * p.K * p.D * dtype_size(p.dtype), p.K});
  const PackedCodebooks codebooks(kernel, sources, p.D, p.dtype, p.metric, p.certified, parallel);

  const int64_t block = rows_per_task(p.H * p.N), blocks = ceil_div(p.N, block);
  const size_t search_bytes = (kernel.scratch_bytes(block, p.D) + 63) / 64 * 64;
  ScratchPool pool(search_bytes + block * (8 + 1) + (converts || normalizes ? block * p.D * size : 0) + 64);
  parallel_for(parallel, p.H * blocks, [&](int64_t task) {
    const int64_t h = task / blocks, start = task % blocks * block, first = h * p.N + start;
    const int n = static_cast<int>(std::min(block, p.N - start));
    ScratchPool::Lease scratch(pool);
    double* value = reinterpret_cast<double*>(scratch.get() + search_bytes);
    char* converted = reinterpret_cast<char*>(value + block);
    bool* skip = nullptr;
    const void* rows = static_cast<const char*>(p.z) + first * p.D * dtype_size(p.dtype);
    if (converts) {
      kernel.convert(rows, p.dtype, n * p.D, converted);
      rows = converted;
    }
    if (normalizes) {
      kernel.normalize(rows, p.dtype == DType::f64, n, p.D, converted);
      rows = converted;
    }
    if (p.mask) {
      skip = reinterpret_cast<bool*>(converted + (converts || normalizes ? block * p.D * size : 0));
      for (int i = 0; i < n; ++i) skip[i] = !p.mask[first + i];
    }
    kernel.search(codebooks[h], rows, skip, n, scratch.get(), p.indices + first, value);
    if (p.dtype == DType::f64) store_distances<double>(p, first, n, value, skip);
    else store_distances<float>(p, first, n, value, skip);
  });
}

}  // namespace vqk::cpu

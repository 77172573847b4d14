// nearest_codeword: indices[h,n] = argmin_k d(z[h,n], codebook[h,k]), exact ties to the lowest k.
//
// z [H,N,D], codebook [H,K,D] in fp32, fp64, bf16 or fp16 -> indices [H,N] int64, distances [H,N].
//
//   codebook -> values (converted, normalised for cosine) -> panels          once per call, tasks of 96 codewords;
//                                                   behind bytes, wider panels only when rows turn out to need them
//   z block of up to 192 rows -> coarse scores -> candidates -> decision     one task per 1 to 4 blocks, any thread
//
// Work: 2NKD flops in the coarse pass, at most 32 per cycle and core with AVX2, 64 with AVX-512 (Zen 4: 32); in 16-bit
// integers 1.5 and 2 times as many, in bytes 3 and 4 times (VNNI), in AMX's tiles 32 times. z and the codebook are read
// once per block of rows from cache.
// Memory: O(N + K D), never N x K.
// Numerics: docs/numerics.md. The coarse pass is in bytes, 16-bit integers or fp32, with a proved bound; the decision
// is canonical (fp64, feature by feature, unfused), so indices and distances are the same bits at every SIMD level,
// thread count and batch size.
// Limits: rows whose bound is not finite, or with more than 14 candidates (all-equal codebooks), are
// compared with every codeword canonically: the same answer, several times slower. Up to kScanRows rows
// per head are compared that way from the start, because packing a codebook would cost more.
//
#include "nearest_codeword.h"

#include <algorithm>

namespace vqk::cpu {
namespace {

constexpr int64_t kChunk = 96;             // codewords per preparation task: whole panels at every level
constexpr double kValueWork = 8;           // multiply-adds that a codeword's value is worth, about
constexpr int64_t kPanelCodewords = 192;  // the same for bytes
constexpr double kByteLength = 181;        // of a chunk of 64 features, about: as much is left for the row's

// Codewords behind one folded lane: few enough that comparing them canonically costs little beside
// the coarse pass, enough that filtering the minima does (docs/numerics.md).
int choose_group(int64_t K, int64_t D) {
  int group = 1;
  while (group < 64 && group * group * D * 4 <= K) group *= 2;
  return group;
}

// The same for bytes, and words. Measured at every SIMD level.
int choose_byte_group(int64_t K, int64_t D, bool words, bool tiles) {
  if (tiles) return D >= 512 ? 1 : D <= 4 * kTileSteps && K >= 1024 ? 4 : 2;
  int group = words ? 4 : 2;
  while (group < 16 && 16 * group * group * D <= K) group *= 2;
  return group;
}

constexpr int64_t kLeastCodewords = 4;  // behind a lane of words

// Of a row or codeword in bytes or words; of tiles, as many as their instructions take, all the same number.
int64_t byte_steps(const Codebook& cb, const ByteFormat& format) {
  const int64_t steps = ceil_div(cb.D, cb.byte_words ? 2 : format.features);
  if (!cb.byte_tiles) return steps;
  const int64_t instructions = ceil_div(steps, kTileSteps);
  return ceil_div(steps, instructions) * instructions;
}

// Panels of bytes of `width` codewords: whole groups.
int64_t byte_panels(const Codebook& cb, int64_t width) {
  return cb.byte_group == 1 ? ceil_div(cb.K, width) : ceil_div(cb.K, width / 2 * cb.byte_group) * (cb.byte_group / 2);
}

// Whether the integer coarse pass pays: below 16 features the way from integers to scores costs as much as
// they save, and the codebook must be worth a second packing.
bool use_integers(int64_t K, int64_t D, int64_t rows) {
#ifdef VQK_TEST_FLOATS  // floats alone, to measure them
  return false;
#endif
  return D >= 16 && D <= 1 << 14 && K >= 64 && rows >= 64;
}

// The same for bytes, which moreover are for floats: they leave a few codewords a row to be scored one by one, too many
// where features are few and no words take their place. Measured at every SIMD level; format.chunk: beyond, AVX2 adds several sums.
bool use_bytes(const ByteFormat& format, int64_t K, int64_t D, int64_t rows, DType dtype) {
  if (format.width == 0 || dtype == DType::f64 || D > 1024 || K < kLeastCodewords) return false;
#if defined(VQK_TEST_BYTES)  // wherever they can be used
  return true;
#elif defined(VQK_TEST_FLOATS)
  return false;
#endif
  return D >= (format.word_features ? 2 : 6) && K >= (D <= format.chunk ? 128 : 256) && rows >= 1024;
}

// Whether bytes are multiplied by AMX: measured; fewer products take less time than what their sums' way through memory does.
bool use_tiles(const ByteFormat& format, [[maybe_unused]] int64_t K, int64_t D) {
  if (!format.tiles || D <= format.word_features) return false;
#if defined(VQK_TEST_BYTES)
  return true;
#else
  return D >= 20 && K * D >= (D < 32 ? 12288 : 6144);
#endif
}

// As power_of_two_scale of the kernel, for the largest magnitude in a codebook.
double codebook_scale(double largest) {
  if ((largest >= 0x1p-40 && largest <= 0x1p40) || !(largest > 0)) return 1;
  return std::ldexp(1.0, -std::clamp(std::ilogb(largest), -126, 126));
}

}  // namespace

const SearchKernel& search_kernel() {
#if defined(__x86_64__)
  switch (simd_level()) {
#ifndef VQK_NO_AMX
    case Simd::amx: return amx_kernel;
#endif
    case Simd::vnni: return vnni_kernel;
    case Simd::avx512: return avx512_kernel;
#ifndef VQK_NO_AVXVNNI
    case Simd::avxvnni: return avxvnni_kernel;
#endif
    case Simd::avx2: return avx2_kernel;
    default: break;
  }
#endif
  return portable_kernel;
}

PackedCodebooks::PackedCodebooks(const SearchKernel& kernel, const std::vector<Source>& sources, int64_t D,
                                 DType dtype, Metric metric, bool certified, int64_t rows, const Parallel& caller)
    : kernel_(kernel),
      codebooks_(sources.size()),
      fail_(new bool[2 * sources.size()]()) {
  struct Task {
    size_t codebook;
    int64_t first, last;  // codewords
    double largest = 0;
    std::vector<double> sum{};  // of the codewords, where bytes are wanted
    double length = 0;  // |scale * codeword|, then what its integers lack
    int64_t finite = 0;
  };
  int64_t codewords = 0;
  for (const Source& source : sources) codewords += source.K;
  const Parallel parallel = threads_for(kValueWork * codewords * D, caller);
  std::vector<Task> tasks;
  std::vector<char> wanted(sources.size(), 0);
  const size_t size = value_size(dtype);
  const int64_t width = 2 * kernel.lanes;
  const bool converts = dtype == DType::bf16 || dtype == DType::f16, normalizes = metric == Metric::cosine;
  for (size_t i = 0; i < sources.size(); ++i) {
    Codebook& cb = codebooks_[i];
    cb.owner = this;
    cb.K = sources[i].K;
    cb.D = D;
    cb.panels_count = ceil_div(cb.K, width);
    cb.group = choose_group(cb.K, D);
    cb.is_double = dtype == DType::f64;
    cb.l2 = metric == Metric::l2;
    cb.certified = certified;
    cb.codewords = converts ? allocate(cb.K * D * size) : sources[i].data;
    cb.rows = normalizes ? allocate(cb.K * D * size) : cb.codewords;
    cb.half_norms = static_cast<float*>(allocate(cb.panels_count * width * 4));
    if (kernel.integers && use_integers(cb.K, D, rows)) cb.integers_fail = &fail_[2 * i];
    wanted[i] = use_bytes(kernel.bytes, cb.K, D, rows, dtype);
    cb.bytes_fail = &fail_[2 * i + 1];
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
    if (wanted[task.codebook]) task.sum.assign(D, 0.0);
    kernel.survey(at(cb.rows), cb.is_double, n, D, task.sum.empty() ? nullptr : task.sum.data(), &task.largest, &task.finite);
  });
  std::vector<double> means(sources.size() * D, 0.0);
  std::vector<double> largest(sources.size(), 0.0);
  for (const Task& task : tasks) {
    largest[task.codebook] = std::max(largest[task.codebook], task.largest);
    codebooks_[task.codebook].finite += task.finite;
    for (size_t d = 0; d < task.sum.size(); ++d) means[task.codebook * D + d] += task.sum[d];
  }
  for (size_t i = 0; i < sources.size(); ++i) codebooks_[i].scale = codebook_scale(largest[i]);
  auto measure = [&](auto* function, double Codebook::*most) {
    parallel_for(parallel, tasks.size(), [&](int64_t t) {
      const Codebook& cb = codebooks_[tasks[t].codebook];
      tasks[t].length = function(cb, tasks[t].first / width, ceil_div(tasks[t].last, width));
    });
    for (const Task& task : tasks) {
      double& length = codebooks_[task.codebook].*most;
      length = std::max(length, task.length);
    }
  };
  measure(kernel.half_norms, &Codebook::norm);
  make_bytes(wanted, means, parallel);
  std::erase_if(tasks, [&](const Task& task) { return codebooks_[task.codebook].panels8; });
  for (Codebook& cb : codebooks_)
    if (!cb.panels8) allocate_panels(cb);
  measure(kernel.pack, &Codebook::integer_error);
}

void PackedCodebooks::allocate_panels(Codebook& cb) {
  const int64_t codewords = cb.panels_count * 2 * kernel_.lanes;
  if (cb.integers_fail) {
    cb.code_scales = static_cast<float*>(allocate(codewords * 4));
    cb.panels16 = static_cast<int16_t*>(allocate(codewords * (cb.D + 1) / 2 * 4));
  }
  cb.panels = static_cast<float*>(allocate(codewords * cb.D * 4));  // last: says that the others are there
}

void PackedCodebooks::make_panels(Codebook& cb) {
  std::lock_guard lock(mutex_);
  if (cb.panels) return;
  allocate_panels(cb);
  cb.integer_error = kernel_.pack(cb, 0, cb.panels_count);
}

void make_panels(const Codebook& cb) { cb.owner->make_panels(const_cast<Codebook&>(cb)); }

// Centres the wanted codebooks of finite, ordinary floats, chooses their unit and packs them as bytes.
void PackedCodebooks::make_bytes(const std::vector<char>& wanted, const std::vector<double>& means,
                                 const Parallel& parallel) {
  struct Task {
    Codebook* cb;
    int64_t first, last;  // panels
    ByteLengths lengths{};
  };
  std::vector<Task> tasks;
  const SearchKernel& kernel = kernel_;
  const ByteFormat& format = kernel.bytes;
  const int64_t width = format.width;
  for (size_t i = 0; i < codebooks_.size(); ++i) {
    Codebook& cb = codebooks_[i];
    if (!wanted[i] || cb.finite != cb.K || cb.scale != 1) continue;
    float* mean = static_cast<float*>(allocate(cb.D * sizeof(float)));
    for (int64_t d = 0; d < cb.D; ++d) mean[d] = static_cast<float>(means[i * cb.D + d] / static_cast<double>(cb.K));
    cb.mean = mean;
    for (int64_t d = 0; d < cb.D; ++d) cb.mean_norm += static_cast<double>(mean[d]) * mean[d];
    cb.mean_norm = std::sqrt(cb.mean_norm);
    cb.byte_words = cb.D <= format.word_features;
    cb.byte_tiles = use_tiles(format, cb.K, cb.D);
    cb.byte_steps = byte_steps(cb, format);
    cb.byte_group = choose_byte_group(cb.K, cb.D, cb.byte_words, cb.byte_tiles);
    const int64_t panels = byte_panels(cb, width), step = kPanelCodewords / width;
    for (int64_t first = 0; first < panels; first += step)
      tasks.push_back({&cb, first, std::min(first + step, panels)});
  }
  auto largest = [](ByteLengths a, const ByteLengths& b) {
    return ByteLengths{std::max(a.row, b.row), std::max(a.chunk, b.chunk), std::max(a.peak, b.peak)};
  };
  parallel_for(parallel, tasks.size(), [&](int64_t t) {
    Task& task = tasks[t];
    task.lengths = kernel.byte_lengths(*task.cb, task.first * width, std::min(task.last * width, task.cb->K));
  });
  for (size_t t = 0; t < tasks.size();) {
    Codebook& cb = *tasks[t].cb;
    ByteLengths most{};
    for (; t < tasks.size() && tasks[t].cb == &cb; ++t) most = largest(most, tasks[t].lengths);
    cb.byte_row = most.row * (1 + 0x1p-20);
    // sums in 16 bits leave a chunk's length to be shared between row and codeword
    const double length = format.features == 2 ? most.chunk / kByteLength : 0.0;
    const double unit = cb.byte_words ? most.row / format.word_length : std::max(most.peak / format.largest, length);
    cb.byte_unit = static_cast<float>(unit * (1 + 0x1p-20));
    if (!(cb.byte_unit > 0x1p-50 && cb.byte_unit < 0x1p50)) continue;  // all equal, or far out
    cb.half_norm_unit = cb.l2 ? 0.5 * cb.byte_row * cb.byte_row / format.half_norm : 0.0;
    const int64_t panels = byte_panels(cb, width), chunks = ceil_div(cb.D, format.chunk);
    cb.starts8 = allocate(panels * width * chunks * format.features);  // as many bytes as features of a step
    cb.half_norms8 = allocate(panels * width * format.features);
    cb.panels8 = static_cast<int8_t*>(allocate(panels * width * cb.byte_steps * format.features));
  }
  parallel_for(parallel, tasks.size(), [&](int64_t t) {
    Task& task = tasks[t];
    if (task.cb->panels8) task.lengths = kernel.pack_bytes(*task.cb, task.first, task.last);
  });
  for (Codebook& cb : codebooks_) {
    ByteLengths most{};
    for (const Task& task : tasks)
      if (task.cb == &cb) most = largest(most, task.lengths);
    if (!cb.panels8) continue;
    cb.byte_error = most.row * (1 + 0x1p-20);
    cb.byte_length = std::max(most.chunk, 1.0);
    // sums of a chunk are shifted by a bit for each doubling of chunks
    const double sums = static_cast<double>(ceil_div(cb.D, format.chunk));
    while (std::ldexp(1.0, cb.byte_shift) < sums) ++cb.byte_shift;
  }
}

namespace {

constexpr int64_t kScanRows = 3;
constexpr int64_t kMostBlocks = 4;  // of rows in a task: while one is searched, the next comes into the cache

// The values that are compared, of n rows of a tensor: in place where they are that already.
const void* compared_values(const SearchKernel& kernel, const void* rows, DType dtype, Metric metric, int64_t n,
                            int64_t D, void* scratch) {
  if (dtype == DType::bf16 || dtype == DType::f16) {
    kernel.convert(rows, dtype, n * D, scratch);
    rows = scratch;
  }
  if (metric == Metric::cosine) {
    kernel.normalize(rows, dtype == DType::f64, n, D, scratch);
    rows = scratch;
  }
  return rows;
}

bool is_compared_in_place(DType dtype, Metric metric) {
  return (dtype == DType::f32 || dtype == DType::f64) && metric != Metric::cosine;
}

// The canonical value as the op returns it: rounded once.
void store_distances(const NearestCodewordParams& p, int64_t first, int64_t n, const double* value, const bool* skip) {
  const double offset = p.metric == Metric::cosine ? 1.0 : 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double distance = skip && skip[i] ? 0.0 : value[i] + offset;
    if (p.dtype == DType::f64) static_cast<double*>(p.distances)[first + i] = distance;
    else static_cast<float*>(p.distances)[first + i] = static_cast<float>(distance);
  }
}

template <class T>
bool all_finite(const void* row, int64_t D) {
  for (int64_t d = 0; d < D; ++d)
    if (!std::isfinite(static_cast<const T*>(row)[d])) return false;
  return true;
}

// A few rows: every codeword canonically, in tasks of about 32768 values of the codebook.
void scan_few_rows(const NearestCodewordParams& p, const Parallel& parallel) {
  const SearchKernel& kernel = search_kernel();
  const bool is_double = p.dtype == DType::f64, in_place = is_compared_in_place(p.dtype, p.metric);
  const int64_t chunk = std::max<int64_t>(8, (32768 + p.D - 1) / p.D / 8 * 8), chunks = ceil_div(p.K, chunk);
  const size_t size = value_size(p.dtype), row_bytes = p.D * size;
  Memory z_memory(in_place ? 0 : p.H * p.N * row_bytes);
  const char* z = static_cast<const char*>(
      compared_values(kernel, p.z, p.dtype, p.metric, p.H * p.N, p.D, z_memory.get()));
  std::vector<int64_t> index(p.H * chunks * p.N);
  std::vector<double> value(p.H * chunks * p.N);
  ScratchPool pool(in_place ? 64 : chunk * row_bytes);
  parallel_for(parallel, p.H * chunks, [&](int64_t task) {
    const int64_t h = task / chunks, first = task % chunks * chunk, count = std::min(chunk, p.K - first);
    ScratchPool::Lease scratch(pool);
    const void* codewords = compared_values(
        kernel, static_cast<const char*>(p.codebook) + (h * p.K + first) * p.D * dtype_size(p.dtype), p.dtype, p.metric,
        count, p.D, scratch.get());
    kernel.scan(z + h * p.N * row_bytes, static_cast<int>(p.N), codewords, count, p.D, is_double,
                p.metric == Metric::l2, &index[task * p.N], &value[task * p.N]);
  });
  for (int64_t row = 0; row < p.H * p.N; ++row) {
    const bool skip = p.mask && !p.mask[row];
    const bool usable = !skip && (is_double ? all_finite<double> : all_finite<float>)(z + row * row_bytes, p.D);
    int64_t best = -1;
    double lowest = std::numeric_limits<double>::quiet_NaN();
    for (int64_t c = 0; usable && c < chunks; ++c) {
      const int64_t at = (row / p.N * chunks + c) * p.N + row % p.N;
      if (index[at] < 0 && std::isinf(value[at])) {  // undecided, see nearest_codeword_canonical.h
        best = -1, lowest = std::numeric_limits<double>::quiet_NaN();
        break;
      }
      if (index[at] >= 0 && (best < 0 || value[at] < lowest)) best = c * chunk + index[at], lowest = value[at];
    }
    p.indices[row] = best;
    store_distances(p, row, 1, &lowest, &skip);
  }
}

}  // namespace

void nearest_codeword(const NearestCodewordParams& p, const Parallel& caller) {
  if (p.H == 0 || p.N == 0) return;
  const Parallel parallel = threads_for(static_cast<double>(p.H) * p.N * p.K * p.D, caller);
  if (p.N <= kScanRows) {
    StandardArithmetic arithmetic;
    return scan_few_rows(p, parallel);
  }
  const SearchKernel& kernel = search_kernel();
  std::vector<PackedCodebooks::Source> sources;
  for (int64_t h = 0; h < p.H; ++h)
    sources.push_back({static_cast<const char*>(p.codebook) + h * p.K * p.D * dtype_size(p.dtype), p.K});
  const auto packed = packed_codebooks(kernel, sources, p.D, p.dtype, p.metric, p.certified, p.N, parallel);
  const PackedCodebooks& codebooks = *packed;

  const int64_t block = rows_per_task(p.H * p.N), blocks = ceil_div(p.N, block);
  const int64_t run = std::clamp<int64_t>(p.H * blocks / (32 * parallel.threads), 1, kMostBlocks);
  const int64_t runs = ceil_div(blocks, run);
  const size_t search_bytes = (kernel.scratch_bytes(static_cast<int>(block), p.D) + 63) / 64 * 64;
  const size_t converted_bytes = is_compared_in_place(p.dtype, p.metric) ? 0 : block * p.D * value_size(p.dtype);
  const int64_t row_bytes = p.D * dtype_size(p.dtype);
  ScratchPool pool(search_bytes + block * sizeof(double) + converted_bytes + block);
  parallel_for(parallel, p.H * runs, [&](int64_t task) {
    const int64_t h = task / runs, begin = task % runs * run * block, end = std::min(begin + run * block, p.N);
    ScratchPool::Lease scratch(pool);
    double* value = reinterpret_cast<double*>(scratch.get() + search_bytes);
    char* converted = reinterpret_cast<char*>(value + block);
    for (int64_t start = begin; start < end; start += block) {
      const int64_t first = h * p.N + start, after = start + block;
      const int n = static_cast<int>(std::min(block, end - start));
      const char* z = static_cast<const char*>(p.z) + first * row_bytes;
      const void* rows = compared_values(kernel, z, p.dtype, p.metric, n, p.D, converted);
      bool* skip = nullptr;
      if (p.mask) {
        skip = reinterpret_cast<bool*>(converted + converted_bytes);
        for (int i = 0; i < n; ++i) skip[i] = !p.mask[first + i];
      }
      const SearchHints hints = {.rounded = p.metric == Metric::l2 && p.dtype != DType::f64,
                                 .next = z + n * row_bytes,
                                 .next_bytes = std::clamp<int64_t>(end - after, 0, block) * row_bytes};
      kernel.search(codebooks[h], rows, skip, n, scratch.get(), p.indices + first, value, hints);
      store_distances(p, first, n, value, skip);
    }
  });
}

}  // namespace vqk::cpu

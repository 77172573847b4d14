// What nearest_codeword and residual_quantize share: a codebook made ready for searching, and the
// search of a block of rows in it. Internal to csrc/cpu.
#pragma once
#include <cmath>
#include <limits>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "vqk/launch.h"
#include "vqk/simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#ifdef VQK_COUNT  // the driver of tests/cpp counts
extern "C" long long vqk_compared, vqk_scored;
#define VQK_COUNTED(counter, n) __atomic_fetch_add(&counter, n, __ATOMIC_RELAXED)
#else
#define VQK_COUNTED(counter, n) static_cast<void>(0)
#endif

namespace vqk::cpu {

class PackedCodebooks;

// One codebook as the kernels see it. "Value" is the type that decides: double for f64, else float.
struct Codebook {
  PackedCodebooks* owner;
  const void* codewords;    // [K,D] values as given (bf16 and f16 converted)
  const void* rows;         // [K,D] values that are compared: codewords, l2-normalised for cosine
  const float* half_norms;  // [panels][width]: |scale * row|^2 / 2 (l2) or 0; +inf keeps a codeword out
  // Where there are bytes, these three and integer_error are to be had after make_panels(cb) only.
  const float* panels;      // [panels][D][width]: -scale * rows, a panel holding `width` codewords side by side
  const int16_t* panels16;  // [panels][ceil(D/2)][width][2]: rows as integers, or null
  const float* code_scales; // [panels][width]: row = code_scale * integers, nearly
  const int8_t* panels8;    // rows - mean in bytes, or null: nearest_codeword_bytes.h has the layout of these four
  const void* starts8;
  const void* half_norms8;
  const float* mean;           // [D]
  bool *integers_fail, *bytes_fail;  // set when they leave too many candidates
  int64_t K, D, panels_count;
  int64_t finite;           // codewords that can win
  double scale, norm;       // a power of two; the largest |scale * row|
  double integer_error;     // the largest |scale * row - code_scale * integers|
  double byte_unit, half_norm_unit;
  double mean_norm;
  double byte_row, byte_error;  // the largest |row - mean|, and |row - mean - byte_unit * bytes|
  double byte_length;           // the largest length of a chunk's bytes
  int byte_shift;               // bits that sums of products are shifted by
  int byte_group;               // vectors of scores of bytes folded into one
  int64_t byte_steps;           // of a row of bytes
  bool byte_words;              // 16-bit numbers, two to a step, in place of bytes
  bool byte_tiles;              // the products by AMX
  int group;                // vectors of scores folded into one before they are looked at
  bool is_double, l2, certified;
};

struct ByteLengths {
  double row, chunk, peak;  // the longest row; the longest chunk of one; the largest magnitude
};

// How a level holds codewords in bytes: panels of `width` of them, `features` of each side by side, from -largest to
// largest; sums of products over `chunk` features; half norms up to `half_norm`. Of up to `word_features` features as
// 16-bit numbers of length `word_length`, two in place of four bytes. tiles: products by AMX where that pays.
struct ByteFormat {
  int width, features, largest;
  int64_t chunk;
  double half_norm;
  int word_features;
  double word_length;
  bool tiles;
};

constexpr int64_t kTileSteps = 16;  // of an instruction of AMX, at most

// What a search may make use of.
struct SearchHints {
  bool rounded = false;      // values will be rounded to float: any that round to the same will do
  const char* next = nullptr;  // memory that will be read afterwards, to be brought into the cache
  int64_t next_bytes = 0;
};

// One SIMD level's functions; see nearest_codeword_kernel.h.
struct SearchKernel {
  int lanes, tile_rows;  // floats in a vector; rows of z in a register tile
  bool integers;         // has the coarse pass in 16-bit integers
  ByteFormat bytes;      // width 0: no coarse pass in bytes
  // Values [n,D] from a tensor's data of any dtype; normalize: by the cosine rule, in place allowed.
  void (*convert)(const void* from, DType dtype, int64_t count, void* to);
  void (*normalize)(const void* from, bool is_double, int64_t n, int64_t D, void* to);
  // Of values [n,D]: their sum, added to sum[D] (null: not wanted); the largest magnitude in, and the number of, finite rows.
  void (*survey)(const void* rows, bool is_double, int64_t n, int64_t D, double* sum, double* largest, int64_t* finite);
  // Fills half_norms of panels [first, last) of cb; the largest |scale * row|.
  double (*half_norms)(const Codebook& cb, int64_t first, int64_t last);
  // Fills panels, panels16 and code_scales; the largest |scale * row - code_scale * integers|.
  double (*pack)(const Codebook& cb, int64_t first, int64_t last);
  // For rows[0..n): index[i] = the nearest codeword, or -1 where the row is not finite or skip[i]
  // (skip may be null); value[i] = its canonical cost: the squared distance, or minus the dot product.
  void (*search)(const Codebook& cb, const void* rows, const bool* skip, int n, char* scratch, int64_t* index,
                 double* value, const SearchHints& hints);
  // The same for finite rows by comparing all `count` codewords canonically, without a packed codebook.
  void (*scan)(const void* rows, int n, const void* codewords, int64_t count, int64_t D, bool is_double, bool l2,
               int64_t* index, double* value);
  size_t (*scratch_bytes)(int n, int64_t D);
  // Codewords [first, last) of cb after centring, and its panels [first, last) of bytes filled; see
  // nearest_codeword_bytes.h.
  ByteLengths (*byte_lengths)(const Codebook& cb, int64_t first, int64_t last);
  ByteLengths (*pack_bytes)(const Codebook& cb, int64_t first, int64_t last);
};

extern const SearchKernel portable_kernel;
#if defined(__x86_64__)
extern const SearchKernel avx2_kernel, avxvnni_kernel, avx512_kernel, vnni_kernel, amx_kernel;
#endif
const SearchKernel& search_kernel();  // of simd_level()

constexpr int kMaxRows = 192;  // rows of one task, at most: a multiple of every tile_rows

// Rows per task: enough tasks for many cores, enough rows to pay for streaming the codebook. A
// function of the sizes alone, so that sums over blocks do not depend on the number of threads.
inline int64_t rows_per_task(int64_t rows) {
  const int64_t even = (rows + 63) / 64;
  return even >= kMaxRows ? kMaxRows : even <= 48 ? 48 : (even + 11) / 12 * 12;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline size_t value_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }
inline size_t dtype_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

class Memory {  // 64-byte aligned
 public:
  explicit Memory(size_t bytes = 0)
      : data_(bytes ? static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) : nullptr) {
    if (bytes && !data_) throw std::bad_alloc();
  }
  char* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
};

// Scratch blocks handed to tasks: as many as ever run at once, made when first needed.
class ScratchPool {
 public:
  explicit ScratchPool(size_t bytes) : bytes_(bytes) {}
  class Lease {
   public:
    explicit Lease(ScratchPool& pool) : pool_(pool), memory_(pool.take()) {}
    ~Lease() { pool_.give(std::move(memory_)); }
    Lease(const Lease&) = delete;
    char* get() const { return memory_.get(); }

   private:
    ScratchPool& pool_;
    Memory memory_;
  };

 private:
  Memory take() {
    std::lock_guard lock(mutex_);
    if (free_.empty()) return Memory(bytes_);
    Memory memory = std::move(free_.back());
    free_.pop_back();
    return memory;
  }
  void give(Memory memory) {
    std::lock_guard lock(mutex_);
    free_.push_back(std::move(memory));
  }
  size_t bytes_;
  std::mutex mutex_;
  std::vector<Memory> free_;
};

// Rounding to nearest and no flushing of subnormals while a task runs, whatever the caller has set
// (torch.set_flush_denormal): part of "the same result everywhere".
class StandardArithmetic {
#if defined(__SSE2__)
 public:
  StandardArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~StandardArithmetic() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

template <class Body>
void parallel_for(const Parallel& parallel, int64_t tasks, const Body& body) {
  if (tasks <= 0) return;
  parallel.run(
      tasks,
      [](void* context, int64_t task) {
        StandardArithmetic arithmetic;
        (*static_cast<const Body*>(context))(task);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Codebooks made ready, with the memory they stand on: about K * D bytes each; where that is not enough or does not
// pay, as many floats and half as much again for integers; and K * D floats for cosine, bf16 and f16.
class PackedCodebooks {
 public:
  struct Source {
    const void* data;  // [K,D] dtype
    int64_t K;
  };
  // `rows`: about how many will be searched for.
  PackedCodebooks(const SearchKernel&, const std::vector<Source>&, int64_t D, DType, Metric, bool certified,
                  int64_t rows, const Parallel&);
  const Codebook& operator[](size_t i) const { return codebooks_[i]; }
  void make_panels(Codebook& cb);

 private:
  const SearchKernel& kernel_;
  std::vector<Codebook> codebooks_;
  mutable std::mutex mutex_;  // of what make_panels changes
  mutable std::vector<Memory> memory_;
  std::unique_ptr<bool[]> fail_;

  void* allocate(size_t bytes) { return memory_.emplace_back(bytes).get(); }
  void allocate_panels(Codebook& cb);
  void make_bytes(const std::vector<char>& wanted, const std::vector<double>& means, const Parallel&);
};

// The same, from a cache where a small codebook comes again and again: see nearest_codeword_cache.cpp.
std::shared_ptr<const PackedCodebooks> packed_codebooks(const SearchKernel&,
                                                        const std::vector<PackedCodebooks::Source>&, int64_t D, DType,
                                                        Metric, bool certified, int64_t rows, const Parallel&);

// What the passes after bytes need, made by the first thread to ask: ordinary data never does.
void make_panels(const Codebook& cb);

}  // namespace vqk::cpu

// residual_quantize: r_0 = z; k_l = nearest(r_{l-1}); r_l = r_{l-1} - c_l; quantized = (c_1 + c_2) + ...
//
//   in   z [H,N,D], codebooks Q x [H,K_l,D], mask [H,N] or null; float, double, bf16 or f16
//   out  indices int64 [H,N,Q], quantized [H,N,D], losses [Q] float (double for double), valid int64
//
//   copy      every codebook, scaled and rounded to fp16 (of levels that share one, once)
//   levels    block = 128 rows of one head, all levels:
//
//       z --> residual --+--> scaled, rounded to fp16 --> coarse pass over the level's codebook (coarse.cuh)
//             ^          |                                     |  best, index, second of each row's 8 threads
//             |          +--> canonical comparison <-----------+  where the bound does not decide: of those 8,
//             |                          |                        or, if one hides another, of all, scored again
//             +---- residual - c <-- index
//       after the last level: quantized from the indices; valid rows and squared residuals of the block
//   losses    (level)  adds the blocks' sums
//   scan      instead of copy and levels, where there is little work or no bound: one warp a row, every codeword
//             canonically
//
// The fp16 copy stays in shared memory while a codebook streams by (to D = 128 or 192, tiles.cuh; longer rows are fetched
// with each tile).
// The residual itself, float (double for double), lies in memory that no other block touches (float, double: in the
// place of quantized): a block writes and reads it once a level, so it stays in the caches.
//
// Work: Q x 2NKD flops on tensor cores, 6 instructions a score beside them as in nearest_codeword, which also says
// where which is the roof. Bytes: z once, quantized once, 8 Q a row of indices, 8 Q of squares; codebooks once a block
// from the second-level cache, 128 flops a byte.
// Numerics: every level's index is the certified nearest codeword of its residual, bit equal to the reference
// (docs/numerics.md). fp16 for every dtype: scaled to its own exponent a residual keeps 11 bits at any level.
// Subtractions and additions are one IEEE operation an element. Losses add squares in double.
// Determinism: no atomics but of bits; sums in a fixed order: the same on every run.
// Shared memory and registers planned: 3 to 6 chunks of 16 KB and 6 KB; 255 registers at most, no spills: two blocks a
// multiprocessor, one where it has 100 KB (sm_86, 89, 120).
// Limits: as nearest_codeword's; rows alone make blocks, so fewer than 128 x 2 x multiprocessors rows leave some idle.
// Run on emulators only: timings and tuning are open.
#include "coarse.cuh"
#include "vqk/launch.h"

namespace vqk::cuda {
namespace {

constexpr int kScanThreads = 128;
constexpr int kLossThreads = 256;
constexpr int kLanes = 8;  // threads that share the scores of one row

// One level, where kernels find it: in device memory, because Q has no limit.
struct Level {
  const void* codebook;  // [H,K,D] dtype
  const void* unit;      // cosine: normalised, float (double for f64)
  CoarseCodebook coarse;
  int64_t K;
};

constexpr int kLevelsAtOnce = 8;
struct Levels {
  Level level[kLevelsAtOnce];
};

__global__ void __launch_bounds__(32) set_levels_kernel(Level* to, Levels levels, int count) {
#pragma unroll
  for (int i = 0; i < kLevelsAtOnce; ++i)
    if (i < count && threadIdx.x == 0) to[i] = levels.level[i];
}

// One warp takes one row through all levels. residual [rows,D]; sums [Q,rows]; counts [rows].
template <class T>
__global__ void __launch_bounds__(kScanThreads, 4)
    scan_kernel(const T* z, const Level* __restrict__ levels, const bool* __restrict__ mask, wide_t<T>* residual,
                wide_t<T>* unit, int64_t* indices, T* quantized, double* __restrict__ sums,
                int64_t* __restrict__ counts, int64_t rows, int64_t N, int64_t Q, int64_t D, Metric metric) {
  using A = wide_t<T>;
  const int lane = threadIdx.x % 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kScanThreads / 32);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kScanThreads / 32) + threadIdx.x / 32; row < rows;
       row += step) {
    const bool masked = mask && !mask[row];
    bool alive = !masked;
    A* r = residual + row * D;
    for (int64_t d = lane; d < D; d += 32) r[d] = static_cast<A>(to_double(z[row * D + d]));
    for (int64_t l = 0; l < Q && alive; ++l) {
      __syncwarp();
      const int64_t K = levels[l].K;
      const T* codebook = static_cast<const T*>(levels[l].codebook) + row / N * K * D;
      int64_t index;
      if (metric == Metric::cosine) {
        normalize_rows(residual, unit, row, row + 1, D);
        __syncwarp();
        index = scan_row(unit + row * D, static_cast<const A*>(levels[l].unit) + row / N * K * D, K, D, false).index;
      } else {
        index = scan_row(r, codebook, K, D, metric == Metric::l2).index;
      }
      alive = index >= 0;
      if (!alive) break;
      __syncwarp();
      double square = 0;
      for (int64_t d = lane; d < D; d += 32) {
        const A x = r[d] - static_cast<A>(to_double(codebook[index * D + d]));
        r[d] = x;
        square += static_cast<double>(x) * x;
      }
      square = warp_sum(square);
      if (lane == 0) indices[row * Q + l] = index, sums[l * rows + row] = square;
    }
    bool finite = true;
    for (int64_t d = lane; d < D; d += 32) finite = finite && fabs(static_cast<double>(r[d])) < HUGE_VAL;
    alive = __all_sync(kFullWarp, finite) && alive;
    if (!alive)
      for (int64_t l = lane; l < Q; l += 32) indices[row * Q + l] = -1, sums[l * rows + row] = 0;
    __syncwarp();
    if (lane == 0) counts[row] = alive;
    for (int64_t d = lane; d < D; d += 32) {
      A total = masked ? 0 : NAN;
      for (int64_t l = 0; l < Q && alive; ++l) {
        const int64_t at = (row / N * levels[l].K + indices[row * Q + l]) * D + d;
        const A c = static_cast<A>(to_double(static_cast<const T*>(levels[l].codebook)[at]));
        total = l == 0 ? c : total + c;
      }
      round_to(total, quantized + row * D + d);
    }
  }
}

// Block: 128 rows of one head through all levels. residual, unit [H,N,D]; copies: of the rows, where they do not stay
// in shared memory; squares [Q,H,N]; sums [Q,blocks]; counts [blocks].
template <class T>
__global__ void __launch_bounds__(kTileThreads, 2)
    levels_kernel(const Tiles pass, const T* z, const Level* __restrict__ levels, const bool* __restrict__ mask, wide_t<T>* residual,
                  wide_t<T>* unit, char* copies, int64_t* indices, T* quantized, double* squares, double* sums,
                  int64_t* counts, int64_t H, int64_t N, int64_t Q, int64_t D, Metric metric) {
  using A = wide_t<T>;
  VQK_DYNAMIC_SHARED(char, shared);
  VQK_SHARED(Survivors, survivors, );
  VQK_SHARED(Margin, margins, [kTile]);
  VQK_SHARED(float, limits, [kTile]);
  VQK_SHARED(int64_t, chosen, [kTile]);  // index of the level, -1: the row is out
  VQK_SHARED(double, values, [kTile]);   // the rest of a row's Choice
  VQK_SHARED(bool, hopeless, [kTile]);
  const Place place;
  const unsigned blocks = static_cast<unsigned>((N + kTile - 1) / kTile);
  const int64_t h = blockIdx.x / blocks, first = static_cast<int64_t>(blockIdx.x % blocks) * kTile;
  const int64_t bytes = copy_bytes<Fp16>(D), base = h * N + first, left = N - first;
  const int here = static_cast<int>(left < kTile ? left : kTile);  // rows
  const bool l2 = metric == Metric::l2, cosine = metric == Metric::cosine, resident = chunks_of(bytes) <= pass.resident;
  const int group = threadIdx.x / 8, in_group = threadIdx.x % 8;  // eight lanes a row, wherever features are walked
  const A* const x = cosine ? unit : residual;
  char* const copy = copies + static_cast<int64_t>(blockIdx.x) * kTile * bytes;
  Lowest* const lanes = reinterpret_cast<Lowest*>(shared + (pass.chunks(chunks_of(bytes)) - pass.stages) * kChunkBytes);
  for (int w = 0; w < kTile / 32; ++w) survivors[threadIdx.x][w] = 0;

  for (int i = group; i < kTile; i += kTileThreads / 8) {
    const bool wanted = i < here && !(mask && !mask[base + i]);
    if (in_group == 0) chosen[i] = wanted ? 0 : -1;
    for (int64_t d = in_group; d < D && wanted; d += 8)
      residual[(base + i) * D + d] = static_cast<A>(to_double(z[(base + i) * D + d]));
  }
  __syncthreads();

  for (int64_t l = 0; l < Q; ++l) {
    const CoarseCodebook coarse = levels[l].coarse;
    const float* half_norms = coarse.half_norms + h * coarse.padded_K;
    const char* codes = coarse.copy + h * coarse.padded_K * bytes;
    const int tiles = static_cast<int>(coarse.padded_K / kTile);
    if (cosine) {
      normalize_rows(residual, unit, base + threadIdx.x / 32 * 32, base + here, D);
      __syncthreads();
    }
    for (int i = group; i < kTile; i += kTileThreads / 8) {
      const double magnitude = largest_magnitude(x + (base + i) * D, D, chosen[i] >= 0);
      const Lengths lengths = copy_row<Fp16>(
          x + (base + i) * D, D, magnitude >= 0, exponent(magnitude), [&](int word, uint32_t value) {
            char* to = resident ? shared + word / 32 * kChunkBytes + shared_place(i, word / 4 % 8) + word % 4 * 4
                                : copy + i * bytes + word * 4;
            *reinterpret_cast<uint32_t*>(to) = value;
          });
      if (in_group == 0) margins[i] = row_margin<Fp16, A>(bytes / 2, magnitude, lengths, coarse.largest[h], l2);
    }
    __syncthreads();

    Lowest lowest[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) lowest[r] = kNothing;
    auto ratio_of = [&](int r) { return margins[place.first_row + 8 * r].ratio; };
    auto at = [](int i) { return static_cast<int64_t>(i); };
    const char* const rows = resident ? nullptr : copy;
    // compare(choice so far of row threadIdx.x, the row, the codewords, whether by l2). The choice lies in shared memory:
    // beside the products there are no registers for it.
    const int row = threadIdx.x;
    auto with_choice = [&](const auto& compare) {
      Choice choice{values[row], chosen[row], hopeless[row]};
      const A* mine = x + (base + row) * D;
      const int64_t from = h * levels[l].K * D;
      if (cosine) compare(choice, mine, static_cast<const A*>(levels[l].unit) + from, false);
      else compare(choice, mine, static_cast<const T*>(levels[l].codebook) + from, l2);
      values[row] = choice.value, hopeless[row] = choice.hopeless;
      chosen[row] = choice.hopeless ? -1 : choice.index;
    };
#pragma unroll 1  // the products' code is long: once is enough
    for (bool again = false;; again = true) {
      coarse_pass<Fp16>(pass, shared, rows, codes, bytes, 0, tiles, at, [&](int tile, const Accumulators& acc) {
        if (!again) return keep_lowest(acc, half_norms, tile, ratio_of, lowest);
        mark_survivors(acc, half_norms, tile, ratio_of, limits, survivors);
        __syncthreads();
        with_choice([&](Choice& choice, const A* mine, const auto* codewords, bool by_l2) {
          compare_survivors(survivors, tile, mine, codewords, D, by_l2, choice);
        });  // marked again after coarse_pass's next barrier
      });
      if (again) break;
#pragma unroll
      for (int r = 0; r < 8; ++r)
        lanes[(place.first_row + 8 * r) * kLanes + threadIdx.x / 64 * 4 + threadIdx.x % 4] = lowest[r];
      __syncthreads();

      // Row threadIdx.x: decided, or its lanes' best compared, or scored again because a lane hides another.
      const float margin = margins[row].margin;
      float best = HUGE_VALF, second = HUGE_VALF;
      for (int i = 0; i < kLanes; ++i) {
        best = fminf(best, lanes[row * kLanes + i].best);
        second = fminf(second, lanes[row * kLanes + i].second);
      }
      const bool alive = margin >= 0 && best < HUGE_VALF;
      const bool hidden = alive && second < HUGE_VALF && second - best <= margin;
      int near = 0;
      int64_t last = -1;
      for (int i = 0; i < kLanes && alive; ++i) {
        const Lowest& lane = lanes[row * kLanes + i];
        if (lane.best < HUGE_VALF && lane.best - best <= margin) ++near, last = lane.index;
      }
      values[row] = HUGE_VAL, chosen[row] = near == 1 && !hidden ? last : -1, hopeless[row] = false;
      if (near > 1 && !hidden)
        with_choice([&](Choice& choice, const A* mine, const auto* codewords, bool by_l2) {
#pragma unroll 1  // rare, and long enough once
          for (int i = 0; i < kLanes; ++i) {
            const Lowest& lane = lanes[row * kLanes + i];
            if (lane.best < HUGE_VALF && lane.best - best <= margin)
              choice.compare(mine, codewords, lane.index, D, by_l2);
          }
        });
      limits[row] = hidden ? best + margin : -HUGE_VALF;
      if (!__syncthreads_or(hidden)) break;
    }
    // a barrier lies between the last change of a row's choice and here, whichever way the loop ended
    if (row < here) indices[(base + row) * Q + l] = chosen[row];

    const T* codewords = static_cast<const T*>(levels[l].codebook) + h * levels[l].K * D;
    for (int i = group; i < kTile; i += kTileThreads / 8) {
      double square = 0;
      const int64_t k = chosen[i];
      for (int64_t d = in_group; d < D && k >= 0; d += 8) {
        A& r = residual[(base + i) * D + d];
        r -= static_cast<A>(to_double(codewords[k * D + d]));
        square += static_cast<double>(r) * r;
      }
      square = group_sum(square);
      if (in_group == 0 && i < here) squares[l * H * N + base + i] = square;
    }
    __syncthreads();
  }

  for (int i = group; i < kTile; i += kTileThreads / 8) {
    const bool alive = largest_magnitude(residual + (base + i) * D, D, chosen[i] >= 0) >= 0;
    __syncwarp();  // all lanes have read it
    if (in_group == 0) chosen[i] = alive ? 0 : -1;
    if (i >= here) continue;
    const bool masked = mask && !mask[base + i];
    for (int64_t d = in_group; d < D; d += 8) {
      A total = masked ? 0 : NAN;
      for (int64_t l = 0; l < Q && alive; ++l) {
        const int64_t k = indices[(base + i) * Q + l];
        const T* codebook = static_cast<const T*>(levels[l].codebook);
        const A c = static_cast<A>(to_double(codebook[(h * levels[l].K + k) * D + d]));
        total = l == 0 ? c : total + c;
      }
      round_to(total, quantized + (base + i) * D + d);
    }
    for (int64_t l = in_group; l < Q && !alive; l += 8) indices[(base + i) * Q + l] = -1;
  }
  __syncthreads();  // the argument of the next one is read before it
  const int valid = __syncthreads_count(chosen[threadIdx.x] >= 0);
  if (threadIdx.x == 0) counts[blockIdx.x] = valid;
  for (int64_t l = threadIdx.x / 32; l < Q; l += kTileThreads / 32) {
    double sum = 0;
    for (int i = threadIdx.x % 32; i < here; i += 32) sum += chosen[i] >= 0 ? squares[l * H * N + base + i] : 0;
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[l * gridDim.x + blockIdx.x] = sum;
  }
}

// Block l: losses[l] = sum of sums[l,:] / (valid rows x D); valid = sum of counts. In one fixed order.
template <class A>
__global__ void __launch_bounds__(kLossThreads)
    losses_kernel(const double* __restrict__ sums, const int64_t* __restrict__ counts, A* losses, int64_t* valid,
                  int64_t parts, int64_t D) {
  VQK_SHARED(double, total, [kLossThreads]);
  VQK_SHARED(int64_t, count, [kLossThreads]);
  double t = 0;
  int64_t c = 0;
  for (int64_t i = threadIdx.x; i < parts; i += kLossThreads) {
    t += sums[blockIdx.x * parts + i];
    c += counts[i];
  }
  total[threadIdx.x] = t;
  count[threadIdx.x] = c;
  for (int half = kLossThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      total[threadIdx.x] += total[threadIdx.x + half];
      count[threadIdx.x] += count[threadIdx.x + half];
    }
  }
  if (threadIdx.x) return;
  const int64_t rows = count[0];
  losses[blockIdx.x] = static_cast<A>(total[0] / (static_cast<double>(rows > 1 ? rows : 1) * D));
  if (blockIdx.x == 0) *valid = rows;
}

// A scan where there is little work or no bound, else the coarse pass.
bool scans(const ResidualQuantizeParams& p) {
  int64_t codes = 0;
  for (int64_t l = 0; l < p.Q; ++l) codes += p.K[l];
  return p.N * codes * p.D <= kScanWork || p.D > kMaxFeatures;
}

struct Workspace {
  bool scan;
  Tiles tiles;
  int64_t parts;  // of the rows: those of a block, or each
  Level* levels;
  void* residual;  // [H,N,D] float (double for f64), as is
  void* unit;      // [H,N,D] for cosine
  char* copies;
  double *squares, *sums;  // [Q,H,N], [Q,parts]
  int64_t* counts;         // [parts]
  Scratch scratch;

  Workspace(const ResidualQuantizeParams& p, void* base) : scan(scans(p)), tiles(device_tiles()), scratch(base) {
    const int64_t rows = p.H * p.N, blocks = p.H * ((p.N + kTile - 1) / kTile), bytes = copy_bytes<Fp16>(p.D);
    parts = scan ? rows : blocks;
    levels = scratch.take<Level>(p.Q);
    residual = dtype_size(p.dtype) > 2 ? p.quantized : scratch.take<float>(rows * p.D);
    unit = scratch.take<char>(unit_size(p) * rows * p.D);
    copies = scratch.take<char>(scan || chunks_of(bytes) <= tiles.resident ? 0 : blocks * kTile * bytes);
    squares = scratch.take<double>(scan ? 0 : p.Q * rows);
    sums = scratch.take<double>(p.Q * parts);
    counts = scratch.take<int64_t>(parts);
  }

  static int64_t unit_size(const ResidualQuantizeParams& p) {
    return p.metric != Metric::cosine ? 0 : p.dtype == DType::f64 ? 8 : 4;
  }

  // Its arrays; those of the level before where it has the same codebook.
  Level take_level(const ResidualQuantizeParams& p, int64_t l, const Level& before) {
    if (l > 0 && p.codebooks[l] == p.codebooks[l - 1] && p.K[l] == p.K[l - 1]) return before;
    Level level = {p.codebooks[l], scratch.take<char>(unit_size(p) * p.H * p.K[l] * p.D), {}, p.K[l]};
    if (!scan) level.coarse = take_codebook<Fp16>(scratch, p.H, p.K[l], p.D);
    return level;
  }
};

template <class T>
void prepare(const ResidualQuantizeParams& p, const Level& level, bool scan, cudaStream_t stream) {
  if (p.metric == Metric::cosine) {
    void* unit = const_cast<void*>(level.unit);
    normalize<T>(level.codebook, unit, p.H * level.K, p.D, stream);
    if (!scan) copy_codebook<Fp16, wide_t<T>>(unit, level.coarse, p.H, level.K, p.D, false, stream);
  } else if (!scan) {
    copy_codebook<Fp16, T>(level.codebook, level.coarse, p.H, level.K, p.D, p.metric == Metric::l2, stream);
  }
}

template <class T>
void run(const ResidualQuantizeParams& p, void* workspace, cudaStream_t stream) {
  using A = wide_t<T>;
  Workspace w(p, workspace);
  const int64_t rows = p.H * p.N;
  Levels levels = {};
  for (int64_t l = 0; l < p.Q && rows > 0; ++l) {
    const Level before = levels.level[l ? (l - 1) % kLevelsAtOnce : 0];
    Level& level = levels.level[l % kLevelsAtOnce];
    level = w.take_level(p, l, before);
    if (l == 0 || p.codebooks[l] != p.codebooks[l - 1] || p.K[l] != p.K[l - 1]) prepare<T>(p, level, w.scan, stream);
    const int count = static_cast<int>(l % kLevelsAtOnce) + 1;
    if (count == kLevelsAtOnce || l == p.Q - 1)
      VQK_LAUNCH(set_levels_kernel, 1, 32, 0, stream, w.levels + l - count + 1, levels, count);
  }
  const T* z = static_cast<const T*>(p.z);
  A *residual = static_cast<A*>(w.residual), *unit = static_cast<A*>(w.unit);
  T* quantized = static_cast<T*>(p.quantized);
  if (rows > 0 && w.scan) {
    VQK_LAUNCH_TASKS(scan_kernel<T>, (rows + 3) / 4, kScanThreads, 0, stream, z, w.levels, p.mask, residual, unit,
                     p.indices, quantized, w.sums, w.counts, rows, p.N, p.Q, p.D, p.metric);
  } else if (rows > 0) {
    const int shared = w.tiles.chunks(chunks_of(copy_bytes<Fp16>(p.D))) * kChunkBytes;
    allow_shared(levels_kernel<T>, shared);
    VQK_LAUNCH(levels_kernel<T>, static_cast<unsigned>(w.parts), kTileThreads, shared, stream, w.tiles, z, w.levels,
               p.mask, residual, unit, w.copies, p.indices, quantized, w.squares, w.sums, w.counts, p.H, p.N, p.Q, p.D,
               p.metric);
  }
  VQK_LAUNCH(losses_kernel<A>, static_cast<unsigned>(p.Q), kLossThreads, 0, stream, w.sums, w.counts,
             static_cast<A*>(p.losses), p.valid, w.parts, p.D);
}

}  // namespace

int64_t residual_quantize_workspace(const ResidualQuantizeParams& p) {
  Workspace w(p, nullptr);
  Level level = {};
  for (int64_t l = 0; l < p.Q; ++l) level = w.take_level(p, l, level);
  return w.scratch.bytes();
}

const char* residual_quantize(const ResidualQuantizeParams& p, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  for_dtype(p.dtype, [&](auto type) { run<decltype(type)>(p, workspace, stream); });
  return launch_error();
}

}  // namespace vqk::cuda

// trie_topk: one step of constrained beam search: log-softmax over V tokens, mask to the children of each beam's trie
// node, the k best of all beams of a user. logp = (x - max) - log(sum exp(x - max)), total = score + logp.
//
//   in   logits [B,W,V] float, double, bf16 or f16; scores [B,W]; states [B,W]; the trie as CSR arrays
//   out  scores descending, beams, tokens, states [B,k]; -inf and -1 where fewer than k children are left
//
//   1. warp = one beam:   logits --16 bytes a lane: max, sum of exp--> max, log of the sum; first child, children
//   2. block = one user:  candidate (w, slot) = child `slot` of beam w
//        8 bits a pass, from the top: histogram of the keys that share the bits so far --> next bits of the k-th key
//        candidates from the k-th key on --> a list, in any order --> their ranks among each other --> out
//
//   key of a candidate:  | total's bits in ascending order, NaN highest | ~(w V + slot) |
//                          32 bits (64 for double)                         32 bits
//
// All keys differ, so "the k largest" has one answer: ties go to the lowest beam, then the lowest token, and the order
// in which threads append to the list does not matter. Passes end as soon as a bucket is taken whole: after 2 or 3 for
// ordinary scores, before any where there are no more than k candidates.
// Work and bytes: logits read once, 4 flops a logit, memory bound; then passes + 1 looks at the children (8 bytes of
// token and one logit each, from the caches), and k^2 comparisons.
// Numerics: exp within 2 units in the last place, sums in float (double for double). NaN logits make their beam NaN, and
// NaN totals come first, as in torch.sort.
// Determinism: fixed order of sums; atomics only count and append.
// Shared memory: 1 KB of bins. Registers: 64 at most: 2 blocks of 512 threads a multiprocessor.
// Limits: W V below 2^32. Memory: trie_topk_workspace, 32 bytes a beam and 12 a result.
// Run on emulators only: timings and tuning are open.
#include "pieces.cuh"
#include "vqk/launch.h"

namespace vqk::cuda {
namespace {

constexpr int kBeamThreads = 128, kBeamWarps = kBeamThreads / 32;
constexpr int kThreads = 512, kBits = 8, kBins = 1 << kBits;

template <class R>
struct Beam {
  int64_t first;      // edge of the first child
  uint32_t children;  // 0: a dead beam
  R score, highest, log_sum;
};

// The total's part of a key and its way from and to the total.
template <class R>
struct Key;
template <>
struct Key<float> {
  using Bits = uint32_t;
  static __device__ Bits bits(float x) { return __float_as_uint(x); }
  static __device__ float value(Bits b) { return __uint_as_float(b); }
};
template <>
struct Key<double> {
  using Bits = unsigned long long;
  static __device__ Bits bits(double x) { return static_cast<Bits>(__double_as_longlong(x)); }
  static __device__ double value(Bits b) { return __longlong_as_double(static_cast<long long>(b)); }
};
template <class R>
using bits_t = typename Key<R>::Bits;

// Larger for larger totals and largest for NaN; never 0, which stands for -inf.
template <class R>
__device__ inline bits_t<R> ascending(R total) {
  constexpr bits_t<R> kSign = bits_t<R>{1} << (8 * sizeof(R) - 1);
  if (total != total) return ~bits_t<R>{0};
  const bits_t<R> bits = Key<R>::bits(total + R(0));  // no -0
  return bits & kSign ? ~bits : bits | kSign;
}
template <class R>
__device__ inline R total_of(bits_t<R> key) {
  constexpr bits_t<R> kSign = bits_t<R>{1} << (8 * sizeof(R) - 1);
  return Key<R>::value(key & kSign ? key & ~kSign : ~key);
}

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline double logarithm(double x) { return log(x); }

template <class T>
__global__ void __launch_bounds__(kBeamThreads)
    beam_kernel(const T* __restrict__ logits, const wide_t<T>* __restrict__ scores, const int64_t* __restrict__ states,
                const int64_t* __restrict__ row_offsets, Beam<wide_t<T>>* __restrict__ beams, int64_t rows, int64_t V,
                int64_t S, bool aligned) {
  using R = wide_t<T>;
  constexpr int kWidth = Piece<T>::kWidth;
  constexpr R kLowest = -static_cast<R>(INFINITY);
  const int lane = threadIdx.x % 32;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kBeamWarps + threadIdx.x / 32; row < rows;
       row += static_cast<int64_t>(gridDim.x) * kBeamWarps) {
    const int64_t state = states[row];
    const bool live = state >= 0 && state < S;
    const int64_t first = live ? row_offsets[state] : 0, children = live ? row_offsets[state + 1] - first : 0;
    R top = kLowest, sum = 0;
    if (children > 0) {
      for (int64_t at = lane * kWidth; at < V; at += 32 * kWidth) {
        const Piece<T> x = load_piece(logits + row * V, at, V, aligned);
        R value[kWidth], higher = top;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          value[i] = at + i < V ? static_cast<R>(to_double(x.x[i])) : kLowest;
          higher = value[i] > higher ? value[i] : higher;
        }
        const R origin = higher == kLowest ? 0 : higher;  // -inf - -inf would be NaN
        sum *= exponential(top - origin);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum += exponential(value[i] - origin);
        top = higher;
      }
    }
    R highest = top;
    for (int offset = 16; offset > 0; offset /= 2) {
      const R other = __shfl_xor_sync(kFullWarp, highest, offset);
      highest = other > highest ? other : highest;
    }
    // a lane without logits has the sum 0, and keeps it
    const double total = warp_sum(top == highest ? sum : sum * exponential(top - highest));
    if (lane == 0) {
      const uint32_t count = static_cast<uint32_t>(children < V ? children : V);  // tokens ascend: later ones are >= V
      beams[row] = {first, children > 0 ? count : 0, scores[row], highest, static_cast<R>(logarithm(total))};
    }
  }
}

// What both loops over a user's candidates need.
template <class T>
struct Candidates {
  using R = wide_t<T>;
  const T* logits;  // of the user
  const Beam<R>* beams;
  const int64_t* edge_tokens;
  int64_t W, V;
  uint32_t width;  // most children of a beam

  // Calls visit(total's part of the key, w V + slot) for each candidate above -inf that is this thread's.
  template <class Visit>
  __device__ void each(const Visit& visit) const {
    const int64_t places = W * width;
    for (int64_t i = threadIdx.x; i < places; i += kThreads) {
      const uint32_t w = static_cast<uint32_t>(i) / width, slot = static_cast<uint32_t>(i) % width;
      const Beam<R> beam = beams[w];
      if (slot >= beam.children) continue;
      const int64_t token = edge_tokens[beam.first + slot];
      if (token < 0 || token >= V) continue;
      const R x = static_cast<R>(to_double(logits[w * V + token]));
      const R total = beam.score + ((x - beam.highest) - beam.log_sum);
      if (total == -static_cast<R>(INFINITY)) continue;
      visit(ascending(total), static_cast<uint32_t>(w * V + slot));
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    user_kernel(const T* __restrict__ logits, const Beam<wide_t<T>>* __restrict__ beams,
                const int64_t* __restrict__ edge_tokens, const int64_t* __restrict__ edge_children,
                bits_t<wide_t<T>>* totals, uint32_t* places,
                wide_t<T>* __restrict__ out_scores, int64_t* __restrict__ out_beams, int64_t* __restrict__ out_tokens,
                int64_t* __restrict__ out_states, int64_t B, int64_t W, int64_t V, int64_t k) {
  using R = wide_t<T>;
  using Bits = bits_t<R>;
  constexpr int kTotalPasses = sizeof(R), kPasses = kTotalPasses + 4;
  VQK_SHARED(unsigned, bins, [kBins]);
  VQK_SHARED(unsigned, width, [1]);
  VQK_SHARED(unsigned, length, [1]);  // of the list
  VQK_SHARED(unsigned, found, [3]);   // digit, how many keys have it, how many have a higher one
  for (int64_t user = blockIdx.x; user < B; user += gridDim.x) {
    if (threadIdx.x == 0) width[0] = length[0] = 0;
    __syncthreads();
    for (int64_t w = threadIdx.x; w < W; w += kThreads) atomicMax(&width[0], beams[user * W + w].children);
    __syncthreads();
    const Candidates<T> candidates{logits + user * W * V, beams + user * W, edge_tokens, W, V, width[0]};
    // the k-th key and which of its bits are known; `need` of the keys that share them count
    Bits total = 0, total_known = 0;
    uint32_t place = ~0u, place_known = 0;  // the key has the complement of place
    int64_t need = k;
    for (int pass = 0; pass < kPasses; ++pass) {
      const bool upper = pass < kTotalPasses;
      const int shift = kBits * ((upper ? kTotalPasses : kPasses) - 1 - pass);
      for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
      __syncthreads();
      candidates.each([&](Bits t, uint32_t at) {
        if (((t ^ total) & total_known) != 0 || ((at ^ place) & place_known) != 0) return;
        atomicAdd(&bins[upper ? static_cast<unsigned>(t >> shift & (kBins - 1)) : ~at >> shift & (kBins - 1)], 1u);
      });
      __syncthreads();
      if (threadIdx.x < 32) {  // lane: 8 bins, the highest ones first
        unsigned own = 0;
        for (int i = 0; i < kBins / 32; ++i) own += bins[kBins - 1 - (threadIdx.x * (kBins / 32) + i)];
        unsigned above = own;
        for (int offset = 1; offset < 32; offset *= 2) {
          const unsigned other = __shfl_up_sync(kFullWarp, above, offset);
          if (static_cast<int>(threadIdx.x) >= offset) above += other;
        }
        const unsigned all = __shfl_sync(kFullWarp, above, 31);
        above -= own;
        if (all <= need) {  // only in the first pass
          if (threadIdx.x == 0) found[0] = 0, found[1] = found[2] = 0;
        } else if (above < need && above + own >= need) {
          int bin = kBins - 1 - threadIdx.x * (kBins / 32);
          while (above + bins[bin] < need) above += bins[bin--];
          found[0] = bin, found[1] = bins[bin], found[2] = above;
        }
      }
      __syncthreads();
      const unsigned digit = found[0], same = found[1];
      need -= found[2];
      if (upper) total |= static_cast<Bits>(digit) << shift, total_known |= static_cast<Bits>(kBins - 1) << shift;
      else place &= ~(digit << shift), place_known |= (kBins - 1u) << shift;
      if (same <= need) break;  // all of them count: lower bits do not matter
    }
    Bits* const total_list = totals + user * k;
    uint32_t* const place_list = places + user * k;
    candidates.each([&](Bits t, uint32_t at) {
      if (t > total || (t == total && at <= place)) {
        const unsigned i = atomicAdd(&length[0], 1u);
        total_list[i] = t, place_list[i] = at;
      }
    });
    __syncthreads();
    const int64_t kept = length[0];
    for (int64_t i = threadIdx.x; i < k; i += kThreads) {
      int64_t rank = i, beam = -1, token = -1, state = -1;
      R score = -static_cast<R>(INFINITY);
      if (i < kept) {
        const Bits t = total_list[i];
        const uint32_t at = place_list[i];
        rank = 0;
        for (int64_t j = 0; j < kept; ++j)
          rank += total_list[j] > t || (total_list[j] == t && place_list[j] < at);
        beam = at / V;
        const int64_t edge = candidates.beams[beam].first + at % V;
        token = edge_tokens[edge], state = edge_children[edge], score = total_of<R>(t);
      }
      const int64_t at = user * k + rank;
      out_scores[at] = score, out_beams[at] = beam, out_tokens[at] = token, out_states[at] = state;
    }
    __syncthreads();
  }
}

// Where the parts of the workspace lie, in bytes.
struct Plan {
  int64_t beams, totals, places, bytes;
};

Plan make_plan(const TrieTopkParams& p) {
  const bool f64 = p.dtype == DType::f64;
  auto rounded = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  Plan plan{};
  plan.totals = rounded(p.B * p.W * static_cast<int64_t>(f64 ? sizeof(Beam<double>) : sizeof(Beam<float>)));
  plan.places = plan.totals + rounded(p.B * p.k * (f64 ? 8 : 4));
  plan.bytes = plan.places + rounded(p.B * p.k * 4);
  return plan;
}

template <class T>
void launch(const TrieTopkParams& p, void* workspace, cudaStream_t stream) {
  using R = wide_t<T>;
  const Plan plan = make_plan(p);
  char* const begin = static_cast<char*>(workspace);
  auto* beams = reinterpret_cast<Beam<R>*>(begin + plan.beams);
  auto* totals = reinterpret_cast<bits_t<R>*>(begin + plan.totals);
  auto* places = reinterpret_cast<uint32_t*>(begin + plan.places);
  const T* logits = static_cast<const T*>(p.logits);
  const R* scores = static_cast<const R*>(p.scores);
  const int64_t rows = p.B * p.W;
  VQK_LAUNCH_TASKS(beam_kernel<T>, (rows + kBeamWarps - 1) / kBeamWarps, kBeamThreads, 0, stream, logits,
             scores, p.states, p.row_offsets, beams, rows, p.V, p.S, rows_aligned(p.V, logits));
  VQK_LAUNCH_TASKS(user_kernel<T>, p.B, kThreads, 0, stream, logits, beams, p.edge_tokens, p.edge_children,
             totals, places, static_cast<R*>(p.out_scores), p.out_beams, p.out_tokens, p.out_states, p.B, p.W, p.V,
             p.k);
}

}  // namespace

int64_t trie_topk_workspace(const TrieTopkParams& p) { return make_plan(p).bytes; }

const char* trie_topk(const TrieTopkParams& p, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (p.W * p.V >= int64_t{1} << 32) return "W V must be below 2^32 on CUDA; keep fewer beams, or use_backend(\"triton\")";
  if (p.B == 0 || p.k == 0) return nullptr;
  for_dtype(p.dtype, [&](auto type) { launch<decltype(type)>(p, workspace, stream); });
  return launch_error();
}

}  // namespace vqk::cuda

// trie_topk: one step of constrained beam search: log-softmax over V tokens, mask to the children of each beam's trie
// node, the k best of all beams of a user. logp = (x - max) - log(sum exp(x - max)), total = score + logp.
//
//   in   logits [B,W,V] float, double, bf16 or f16; scores [B,W]; states [B,W]; the trie as CSR arrays
//   out  scores descending, beams, tokens, states [B,k]; -inf and -1 where fewer than k children are left
//
//   a user's beams, one after another:  logits --8 lanes--> max --> sum of exp --> children of the node, in order:
//       total above the k-th best so far? --> list of 2k --full: the k best stay, the k-th is the new bar--> sorted
//
// A child must beat the bar, so most are dropped by one comparison; those of later beams lose ties, as they should. No
// logarithm of a probability is above 0: a beam whose own score does not beat the bar has its maximum taken (it may hold
// a NaN, which counts as highest) and nothing else; one whose likeliest token would not, no look at its children.
//
// Work and bytes: about 20 operations a logit and 4 a child against one read of the logits and 8 bytes a child. At
// B=256, W=50, V=256 that is 13 MB, 1 ms at 13 GB/s, and 8 million operations of 8 lanes, 1.5 ms of one core at two a
// cycle; up to 3.3 million children, 26 MB, where every node has all V.
// Measured (`vqkernels bench --op trie_topk --threads 1`, AMD EPYC, other programs at work; bench/README.md has all): a
// step of 256 x 50 beams takes 9.7 ms with 10^4 items and 14.2 ms with 10^7, one of 1 x 20 beams 13 to 16 us, call and all.
// Numerics: exp within 2 units in the last place, sums of 512 in float, of those in double (double for double).
// Determinism: 8 lanes at every SIMD level, one thread a user.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "half.h"
#include "trie_topk.h"
#include "vqk/launch.h"
#include "vqk/simd.h"

namespace vqk::cpu {
namespace {
#include "trie_topk_kernel.h"
}  // namespace

double row_highest_portable(const TrieTopkParams& p, int64_t row) { return row_highest_here(p, row); }
double row_sum_portable(const TrieTopkParams& p, int64_t row, double highest) { return row_sum_here(p, row, highest); }

namespace {

template <class R>
struct Candidate {
  R total;
  int64_t beam, edge;
};

// NaN first, then by total, then by beam and edge.
template <class R>
bool better(const Candidate<R>& a, const Candidate<R>& b) {
  const bool a_nan = a.total != a.total, b_nan = b.total != b.total;
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.total != b.total) return a.total > b.total;
  return a.beam != b.beam ? a.beam < b.beam : a.edge < b.edge;
}

// The k best of those added, which come in the order of beam and edge.
template <class R>
class Best {
 public:
  // What a total has to beat; -inf is no candidate.
  R bar = -std::numeric_limits<R>::infinity();

  Best(int64_t k, int64_t candidates) : k_(std::min(k, candidates)) { list_.reserve(std::min(2 * k_, candidates)); }

  void add(R total, int64_t beam, int64_t edge) {
    if (static_cast<int64_t>(list_.size()) == 2 * k_) {
      std::nth_element(list_.begin(), list_.begin() + (k_ - 1), list_.end(), better<R>);
      list_.resize(k_);
      bar = list_[k_ - 1].total;
    }
    list_.push_back({total, beam, edge});
  }

  const std::vector<Candidate<R>>& sorted() {
    std::sort(list_.begin(), list_.end(), better<R>);
    if (static_cast<int64_t>(list_.size()) > k_) list_.resize(k_);
    return list_;
  }

 private:
  int64_t k_;
  std::vector<Candidate<R>> list_;
};

struct Job {
  const TrieTopkParams& p;
  decltype(&row_highest_portable) highest;
  decltype(&row_sum_portable) sum;
};

template <class T>
void user(const Job& job, int64_t b) {
  using R = decltype(to_float(T{}));
  const TrieTopkParams& p = job.p;
  const int64_t W = p.W, V = p.V, k = p.k;
  auto edges = [&](int64_t w) {
    const int64_t state = p.states[b * W + w];
    if (state < 0 || state >= p.S) return std::pair<int64_t, int64_t>{0, 0};
    const int64_t first = p.row_offsets[state];
    return std::pair{first, std::min(p.row_offsets[state + 1], first + V)};  // tokens ascend: later ones are >= V
  };
  int64_t candidates = 0;
  for (int64_t w = 0; w < W; ++w) candidates += edges(w).second - edges(w).first;
  Best<R> best(k, candidates);
  for (int64_t w = 0; w < W; ++w) {
    const auto [first, last] = edges(w);
    if (first == last) continue;
    const int64_t row = b * W + w;
    const T* logits = static_cast<const T*>(p.logits) + row * V;
    const R score = static_cast<const R*>(p.scores)[row], highest = static_cast<R>(job.highest(p, row));
    const bool finite = std::isfinite(highest);
    if (finite && score <= best.bar) continue;
    // NaN, an infinity, or no logit above -inf: no log-probability is a number
    const R log_sum = finite ? static_cast<R>(std::log(job.sum(p, row, highest))) : std::numeric_limits<R>::quiet_NaN();
    if (finite && score - log_sum <= best.bar) continue;  // the total of the best token there is
    for (int64_t edge = first; edge < last; ++edge) {
      const int64_t token = p.edge_tokens[edge];
      if (static_cast<uint64_t>(token) >= static_cast<uint64_t>(V)) continue;
      const R total = score + ((static_cast<R>(to_float(logits[token])) - highest) - log_sum);
      if (!(total <= best.bar)) best.add(total, w, edge);
    }
  }
  const std::vector<Candidate<R>>& list = best.sorted();
  R* const scores = static_cast<R*>(p.out_scores);
  for (int64_t i = 0; i < k; ++i) {
    const bool any = i < static_cast<int64_t>(list.size());
    scores[b * k + i] = any ? list[i].total : -std::numeric_limits<R>::infinity();
    p.out_beams[b * k + i] = any ? list[i].beam : -1;
    p.out_tokens[b * k + i] = any ? p.edge_tokens[list[i].edge] : -1;
    p.out_states[b * k + i] = any ? p.edge_children[list[i].edge] : -1;
  }
}

void task(void* context, int64_t b) {
  const Job& job = *static_cast<const Job*>(context);
  switch (job.p.dtype) {
    case DType::f64: return user<double>(job, b);
    case DType::bf16: return user<bf16>(job, b);
    case DType::f16: return user<f16>(job, b);
    default: return user<float>(job, b);
  }
}

}  // namespace

void trie_topk(const TrieTopkParams& p, const Parallel& caller) {
  Job job{p, row_highest_portable, row_sum_portable};
#if defined(__x86_64__)
  if (simd_level() >= Simd::avx2) job.highest = row_highest_avx2, job.sum = row_sum_avx2;
#endif
  threads_for(static_cast<double>(p.B) * p.W * p.V * 2, caller).run(p.B, task, &job);
}

}  // namespace vqk::cpu

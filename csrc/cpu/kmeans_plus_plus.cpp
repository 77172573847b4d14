// kmeans_plus_plus: rows to start k-means from (Arthur and Vassilvitskii 2007), greedy: each next centre is the best
// of L rows drawn with probability proportional to their squared distance to the nearest centre so far.
//
//   in x [N,D], draws [K,L] uniform in [0,1) -> rows [K]
//
//   draw L candidates --> per block of 1024 rows: distances to them, potentials --> best --> nearest, its block sums
//       (from the sums)          (most rows are skipped, see below)             (lowest sum)
//
// Work: at most K L 3ND operations, far fewer as clusters emerge: a row keeps its centre without looking when every
// candidate is at least twice as far from that centre as the row is (triangle inequality, with a margin of 2^-8 for
// rounding). Memory: O(N L), never N x K.
// Numerics: distances in the input's precision (float or double), 8 lanes, lane = d mod 8; sums in double, row by row
// within a block, block by block. Determinism: the same rows for any number of threads and at any SIMD level. Inputs
// are expected finite and scaled so that squared distances do not overflow.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kmeans_plus_plus.h"
#include "vqk/launch.h"
#include "vqk/simd.h"

namespace vqk::cpu {
namespace {
#include "kmeans_plus_plus_kernel.h"
}  // namespace

template <>
void seed_block_portable<float>(const SeedBlock& b) {
  seed_block_here<float>(b);
}
template <>
void seed_block_portable<double>(const SeedBlock& b) {
  seed_block_here<double>(b);
}

namespace {

constexpr double kMargin = 1 - 0x1p-8;

template <class T>
class Seeding {
 public:
  Seeding(const KMeansPlusPlusParams& p, const Parallel& parallel)
      : p_(p), x_(static_cast<const T*>(p.x)), parallel_(parallel), blocks_((p.N + kSeedRows - 1) / kSeedRows),
        nearest_(p.N, std::numeric_limits<T>::infinity()), centre_(p.N, 0), sum_(blocks_), count_(blocks_),
        potential_(blocks_ * p.L), active_(p.N), distances_(p.N * p.L) {}

  void run() {
    choose(0, {static_cast<int64_t>(p_.draws[0] * static_cast<double>(p_.N))});
    std::vector<int64_t> candidates(p_.L);
    for (int64_t k = 1; k < p_.K; ++k) {
      double total = 0;
      for (double s : sum_) total += s;
      for (int64_t l = 0; l < p_.L; ++l) candidates[l] = draw(p_.draws[k * p_.L + l], total);
      choose(k, candidates);
    }
  }

 private:
  // The row at which the running sum of `nearest` passes u * total; any row once all of them are centres.
  int64_t draw(double u, double total) const {
    if (!(total > 0)) return static_cast<int64_t>(u * static_cast<double>(p_.N));
    double target = u * total;
    int64_t b = 0;
    while (b + 1 < blocks_ && target >= sum_[b]) target -= sum_[b++];
    int64_t last = b * kSeedRows;  // rounding may leave a little of the target over: the block's last row that counts
    for (int64_t n = b * kSeedRows; n < std::min(p_.N, (b + 1) * kSeedRows); ++n) {
      const double have = static_cast<double>(nearest_[n]);
      if (have > 0) last = n;
      if (target < have) return n;
      target -= have;
    }
    return last;
  }

  // Centre k: the candidate with the lowest potential, the first of equals.
  void choose(int64_t k, const std::vector<int64_t>& rows) {
    const int64_t D = p_.D, L = static_cast<int64_t>(rows.size());
    std::vector<T> candidates(L * D);
    for (int64_t l = 0; l < L; ++l) std::copy_n(x_ + rows[l] * D, D, &candidates[l * D]);
    std::vector<double> clearance(k);
    for (int64_t i = 0; i < k; ++i) {
      double least = std::numeric_limits<double>::infinity();
      for (int64_t l = 0; l < L; ++l) {
        T distance;
        squared_distances<T, 1>(&centres_[i * D], &candidates[l * D], D, &distance);
        least = std::min(least, static_cast<double>(distance));
      }
      clearance[i] = least * kMargin;
    }
    auto block = [&](int64_t b) {
      const int64_t begin = b * kSeedRows;
      return SeedBlock{x_, candidates.data(), clearance.data(), nearest_.data(), k ? centre_.data() : nullptr, D, begin,
                       std::min(p_.N, begin + kSeedRows), static_cast<int>(L), &active_[begin], &count_[b],
                       &distances_[begin * p_.L], &potential_[b * p_.L]};
    };
    auto* measure = &seed_block_portable<T>;
#if defined(__x86_64__)
    if (simd_level() >= Simd::avx2) measure = &seed_block_avx2<T>;
#endif
    for_blocks([&](int64_t b) { measure(block(b)); });
    int64_t best = 0;
    double lowest = std::numeric_limits<double>::infinity();
    for (int64_t l = 0; l < L; ++l) {
      double potential = 0;
      for (int64_t b = 0; b < blocks_; ++b) potential += potential_[b * p_.L + l];
      if (potential < lowest) lowest = potential, best = l;
    }
    p_.rows[k] = rows[best];
    centres_.insert(centres_.end(), &candidates[best * D], &candidates[best * D] + D);
    for_blocks([&](int64_t b) {
      const int64_t begin = b * kSeedRows;
      for (int64_t i = 0; i < count_[b]; ++i) {
        const T distance = distances_[begin * p_.L + i * L + best];
        const int64_t n = begin + active_[begin + i];
        if (distance < nearest_[n]) nearest_[n] = distance, centre_[n] = static_cast<int32_t>(k);
      }
      if (count_[b] == 0 && k) return;  // nothing changed
      double sum = 0;
      for (int64_t n = begin; n < std::min(p_.N, begin + kSeedRows); ++n) sum += static_cast<double>(nearest_[n]);
      sum_[b] = sum;
    });
  }

  template <class Body>
  void for_blocks(const Body& body) {
    parallel_.run(
        blocks_, [](void* context, int64_t b) { (*static_cast<const Body*>(context))(b); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

  const KMeansPlusPlusParams& p_;
  const T* x_;
  const Parallel parallel_;
  const int64_t blocks_;
  std::vector<T> nearest_;
  std::vector<int32_t> centre_;
  std::vector<double> sum_;
  std::vector<int64_t> count_;
  std::vector<double> potential_;
  std::vector<int32_t> active_;
  std::vector<T> distances_, centres_;
};

}  // namespace

void kmeans_plus_plus(const KMeansPlusPlusParams& p, const Parallel& caller) {
  if (p.K == 0) return;
  const Parallel parallel = threads_for(static_cast<double>(p.N) * p.D * p.L, caller);
  if (p.dtype == DType::f64) Seeding<double>(p, parallel).run();
  else Seeding<float>(p, parallel).run();
}

}  // namespace vqk::cpu

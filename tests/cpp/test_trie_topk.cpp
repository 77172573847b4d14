// trie_topk on the CPU against a naive oracle, at every SIMD level and with threads. No torch.
//
//   tests/cpp/run                 builds this with g++ and runs it;   tests/cpp/run sanitize, threads: under sanitizers
//
// The oracle takes every child of every beam, with the logarithm of the sum in long double. A result must be right in its
// child, near in its total and in order; whatever was left out must be worse, or equal and later; and all bits must be the
// same at every SIMD level and number of threads.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <tuple>
#include <vector>

#include "vqk/launch.h"
#include "vqk/simd.h"

namespace vqk {
static Simd level = Simd::portable;
Simd simd_level() { return level; }  // instead of simd.cpp: the test picks freely
}  // namespace vqk

using namespace vqk;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();
int threads = 1;

void run_tasks(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  std::atomic<int64_t> next = 0;
  auto work = [&] {
    for (int64_t i; (i = next++) < tasks;) body(context, i);
  };
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(work);
  work();
  for (auto& t : pool) t.join();
}

struct Case {
  int64_t B, W, V, k;
  std::vector<float> logits, scores;
  std::vector<int64_t> states, offsets{0}, tokens, children;
};

struct Answer {
  std::vector<double> scores;
  std::vector<int64_t> beams, tokens, states;
  bool operator==(const Answer& o) const {
    return !std::memcmp(scores.data(), o.scores.data(), scores.size() * 8) && beams == o.beams && tokens == o.tokens &&
           states == o.states;
  }
};

template <class R>
Answer compute(const Case& c, DType dtype) {
  const std::vector<R> logits(c.logits.begin(), c.logits.end()), scores(c.scores.begin(), c.scores.end());
  std::vector<R> out(c.B * c.k);
  Answer a;
  a.beams.resize(c.B * c.k), a.tokens.resize(c.B * c.k), a.states.resize(c.B * c.k);
  cpu::trie_topk({logits.data(), scores.data(), c.states.data(), c.offsets.data(), c.tokens.data(), c.children.data(), out.data(),
                  a.beams.data(), a.tokens.data(), a.states.data(), c.B, c.W, c.V,
                  static_cast<int64_t>(c.offsets.size()) - 1, c.k, dtype},
                 {run_tasks, threads});
  a.scores.assign(out.begin(), out.end());
  return a;
}

struct Child {
  double total;
  int64_t beam, edge;
};

std::vector<Child> children_of(const Case& c, int64_t b) {
  std::vector<Child> all;
  for (int64_t w = 0; w < c.W; ++w) {
    const int64_t state = c.states[b * c.W + w];
    if (state < 0 || state + 1 >= static_cast<int64_t>(c.offsets.size())) continue;
    const float* x = &c.logits[(b * c.W + w) * c.V];
    long double highest = -std::numeric_limits<long double>::infinity(), sum = 0;
    for (int64_t v = 0; v < c.V; ++v) highest = x[v] > highest ? x[v] : highest;
    for (int64_t v = 0; v < c.V; ++v) sum += std::exp(x[v] - highest);
    for (int64_t e = c.offsets[state]; e < c.offsets[state + 1]; ++e) {
      if (c.tokens[e] < 0 || c.tokens[e] >= c.V) continue;
      const double total = c.scores[b * c.W + w] + static_cast<double>(x[c.tokens[e]] - highest - std::log(sum));
      if (total != -kInf) all.push_back({total, w, e});
    }
  }
  return all;
}

bool same(double a, double b, double slack) { return a == b || (a != a && b != b) || std::abs(a - b) <= slack; }

int wrong_results(const Case& c, const Answer& a) {
  int wrong = 0;
  for (int64_t b = 0; b < c.B; ++b) {
    std::vector<Child> all = children_of(c, b);
    const int64_t found = std::min<int64_t>(c.k, all.size());
    double largest = 1;
    for (const Child& child : all)
      if (std::isfinite(child.total)) largest = std::max(largest, std::abs(child.total));
    const double slack = 8 * largest * 0x1p-23;
    double last = kNaN;
    std::tuple<int64_t, int64_t> last_place{-1, -1};
    for (int64_t i = b * c.k; i < (b + 1) * c.k; ++i) {
      if (i - b * c.k >= found) {
        wrong += a.scores[i] != -kInf || a.beams[i] != -1 || a.tokens[i] != -1 || a.states[i] != -1;
        continue;
      }
      auto child = std::find_if(all.begin(), all.end(), [&](const Child& x) {
        return x.beam == a.beams[i] && c.tokens[x.edge] == a.tokens[i] && c.children[x.edge] == a.states[i];
      });
      if (child == all.end() || !same(child->total, a.scores[i], slack)) {
        ++wrong;
        continue;
      }
      const std::tuple place{child->beam, child->edge};
      const bool tie = same(last, a.scores[i], 0);
      wrong += tie ? i > b * c.k && place <= last_place : last == last && !(a.scores[i] < last);
      last = a.scores[i], last_place = place;
      all.erase(child);
    }
    for (const Child& left : all) {  // totals of one beam whose logits are equal are equal to the bit
      if (left.total != left.total) wrong += last == last;
      else if (last == last) wrong += left.total > last + slack;
      const int64_t w = std::get<0>(last_place);
      if (left.beam == w && left.edge < std::get<1>(last_place)) {
        const float* x = &c.logits[(b * c.W + w) * c.V];
        wrong += x[c.tokens[left.edge]] == x[c.tokens[std::get<1>(last_place)]];
      }
    }
  }
  return wrong;
}

Case make(std::mt19937& random) {
  auto draw = [&](int64_t high) { return static_cast<int64_t>(random() % high); };
  const int64_t sizes[] = {1, 3, 8, 17, 64, 300, 511, 513, 1700};
  Case c{1 + draw(5), 1 + draw(9), sizes[draw(9)], 1 + draw(draw(2) ? 12 : 700), {}, {}, {}, {0}, {}, {}};
  const int64_t S = 1 + draw(12);
  for (int64_t s = 0; s < S; ++s) {
    const int64_t one_in = std::min<int64_t>(c.V, draw(3) ? 1 + draw(6) : 1);  // 1: all V tokens are children
    for (int64_t t = draw(one_in); t < c.V + draw(2); t += 1 + draw(one_in)) c.tokens.push_back(draw(9) ? t : -1);
    c.offsets.push_back(static_cast<int64_t>(c.tokens.size()));
  }
  for (size_t e = 0; e < c.tokens.size(); ++e) c.children.push_back(draw(S));
  std::normal_distribution<float> normal(0, static_cast<float>(1 << draw(6)));
  const bool coarse = draw(3) == 0, hostile = draw(3) == 0;
  for (int64_t i = 0; i < c.B * c.W * c.V; ++i) c.logits.push_back(coarse ? static_cast<float>(draw(3)) : normal(random));
  for (int64_t i = 0; i < c.B * c.W; ++i) {
    c.states.push_back(draw(S + 2) - 1), c.scores.push_back(coarse ? 0 : normal(random));
    if (draw(12) == 0) c.scores[i] = -kInf;
    if (hostile && draw(3) == 0) c.logits[i * c.V + draw(c.V)] = std::array{kNaN, kInf, -kInf}[draw(3)];
    if (hostile && draw(6) == 0) std::fill_n(&c.logits[i * c.V], c.V, -kInf);
    if (draw(4) == 0) std::fill_n(&c.logits[i * c.V], draw(c.V), -kInf);
  }
  return c;
}

}  // namespace

int main() {
  std::vector<Simd> levels{Simd::portable};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) levels.push_back(Simd::avx2);
#endif
  std::mt19937 random(1);
  long users = 0;
  int failures = 0;
  for (int round = 0; round < 1500; ++round) {
    const Case c = make(random);
    Answer first;
    for (Simd simd : levels)
      for (int t : {1, 3}) {
        level = simd, threads = t;
        const Answer a = compute<float>(c, DType::f32);
        if (simd == levels[0] && t == 1) first = a;
        failures += !(a == first);
      }
    const int wrong = wrong_results(c, first) + wrong_results(c, compute<double>(c, DType::f64));
    if (wrong) std::printf("round %d: %d wrong results\n", round, wrong);
    failures += wrong, users += c.B;
  }
  std::printf("%ld users compared, %d failures\n", users, failures);
  return failures != 0;
}

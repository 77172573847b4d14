// What the lanes of a warp do together: shuffles, votes, reductions, ldmatrix and products on tensor cores. Compiled
// without sanitizers, like emulator.cpp.
#include <algorithm>

#include "emulator.h"

namespace vqk::emulator {

void shuffle(int count, void* const* brought) {
  uint64_t values[32];
  for (int i = 0; i < count; ++i)
    values[i] = brought[i] ? static_cast<Shuffle*>(brought[i])->value : 0xdeadbeefdeadbeefull;  // of nobody: undefined
  for (int i = 0; i < count; ++i)
    if (Shuffle* mine = static_cast<Shuffle*>(brought[i])) mine->value = values[mine->source];
}

void vote(int count, void* const* brought) {
  unsigned all = 0;
  for (int i = 0; i < count; ++i)
    if (brought[i] && static_cast<Vote*>(brought[i])->value) all |= 1u << i;
  for (int i = 0; i < count; ++i)
    if (brought[i]) static_cast<Vote*>(brought[i])->lanes = all;
}

void match(int count, void* const* brought) {
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < count; ++j)
      if (brought[i] && brought[j] && static_cast<Vote*>(brought[i])->value == static_cast<Vote*>(brought[j])->value)
        static_cast<Vote*>(brought[i])->lanes |= 1u << j;
}

namespace {
template <class F>
void reduce(int count, void* const* brought, F combine) {
  const int64_t* first = nullptr;
  int64_t all = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t* value = static_cast<const int64_t*>(brought[i]);
    if (value) all = first ? combine(all, *value) : *(first = value);
  }
  for (int i = 0; i < count; ++i)
    if (brought[i]) *static_cast<int64_t*>(brought[i]) = all;
}
}  // namespace
void reduce_add(int n, void* const* b) { reduce(n, b, [](int64_t x, int64_t y) { return x + y; }); }
void reduce_min(int n, void* const* b) { reduce(n, b, [](int64_t x, int64_t y) { return std::min(x, y); }); }
void reduce_max(int n, void* const* b) { reduce(n, b, [](int64_t x, int64_t y) { return std::max(x, y); }); }
void reduce_or(int n, void* const* b) { reduce(n, b, [](int64_t x, int64_t y) { return x | y; }); }

}  // namespace vqk::emulator

namespace vqk::cuda {

void ldmatrix_rows(int, void* const* brought) {
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m)
      static_cast<Rows*>(brought[lane])->rows[m] =
          static_cast<const uint32_t*>(static_cast<Rows*>(brought[8 * m + lane / 4])->mine);
}

namespace {

constexpr int kExtraBits = 1;  // kept below float32's last one while products are added

// start + sum of a[i] b[i] as the worst that a kernel's error bound must stand (docs/numerics.md): eight products at a
// time are aligned to the largest and cut, and their sum is cut to float32.
float rough_sum(const float* a, const float* b, int depth, float start) {
  for (int k = 0; k < depth; k += 8) {
    double terms[9], largest = 0, total = 0;
    for (int i = 0; i < 8; ++i) terms[i] = static_cast<double>(a[k + i]) * b[k + i];
    terms[8] = start;
    bool finite = true;
    for (double t : terms) largest = std::fmax(largest, std::fabs(t)), finite &= std::isfinite(t);
    if (largest == 0) continue;
    int exponent = 0;
    std::frexp(largest, &exponent);
    const double unit = finite ? std::ldexp(1.0, exponent - 24 - kExtraBits) : 1;
    for (double t : terms) total += finite ? std::trunc(t / unit) * unit : t;
    const float near = static_cast<float>(total);
    start = std::fabs(near) > std::fabs(total) ? std::nextafterf(near, 0.0f) : near;
  }
  return start;
}

float element(const uint32_t* registers, int at, bool half) {
  const uint16_t bits = static_cast<uint16_t>(registers[at / 2] >> (at % 2 * 16));
  if (!half) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  const uint32_t shifted = static_cast<uint32_t>(fraction) << 13;
  const float size = exponent == 31  ? std::bit_cast<float>(0x7f800000u | shifted)
                     : exponent == 0 ? static_cast<float>(fraction) * 0x1p-24f
                                     : std::bit_cast<float>((exponent + 112u) << 23 | shifted);
  return bits & 0x8000 ? -size : size;
}

// read(registers, i): the i-th element that a lane holds. width: elements a register.
template <int kDepth, class Read>
void multiply(void* const* brought, Read read) {
  constexpr int kWidth = kDepth / 8;
  float a[16][kDepth], b[8][kDepth], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& f = *static_cast<Fragments*>(brought[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4 * kWidth; ++i) {
      const int part = i / kWidth;
      a[g + 8 * (part % 2)][t * kWidth + i % kWidth + 4 * kWidth * (part / 2)] = read(f.a, i);
    }
    for (int i = 0; i < 2 * kWidth; ++i) b[g][t * kWidth + i % kWidth + 4 * kWidth * (i / kWidth)] = read(f.b, i);
    for (int i = 0; i < 4; ++i) c[g + 8 * (i / 2)][2 * t + i % 2] = f.c[i];
  }
  if (emulator::settings.rough) {
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) c[row][column] = rough_sum(a[row], b[column], kDepth, c[row][column]);
  } else {
    float columns[kDepth][8];
    for (int k = 0; k < kDepth; ++k)
      for (int column = 0; column < 8; ++column) columns[k][column] = b[column][k];
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < kDepth; ++k)
        for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * columns[k][column];
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<Fragments*>(brought[lane])->c[i] = c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
}

}  // namespace

void mma_bf16(int, void* const* brought) {
  multiply<16>(brought, [](const uint32_t* r, int i) { return element(r, i, false); });
}
void mma_f16(int, void* const* brought) {
  multiply<16>(brought, [](const uint32_t* r, int i) { return element(r, i, true); });
}
void mma_tf32(int, void* const* brought) {
  multiply<8>(brought, [](const uint32_t* r, int i) { return std::bit_cast<float>(r[i] & 0xffffe000u); });
}

}  // namespace vqk::cuda

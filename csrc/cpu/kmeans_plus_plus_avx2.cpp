// kmeans_plus_plus_kernel.h for AVX2.
#if defined(__x86_64__)
#include "kmeans_plus_plus.h"

#pragma GCC target("avx2,fma")

namespace vqk::cpu {
namespace {
#include "kmeans_plus_plus_kernel.h"
}  // namespace

template <>
void seed_block_avx2<float>(const SeedBlock& b) {
  seed_block_here<float>(b);
}
template <>
void seed_block_avx2<double>(const SeedBlock& b) {
  seed_block_here<double>(b);
}

}  // namespace vqk::cpu
#endif

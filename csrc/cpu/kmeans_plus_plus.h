// The SIMD levels of kmeans_plus_plus. Internal to csrc/cpu.
#pragma once
#include "vqk/params.h"

namespace vqk::cpu {

constexpr int64_t kSeedRows = 1024;  // of a block: sums are taken block by block, whatever the threads

// What one step asks of the rows [begin, end) of a block.
struct SeedBlock {
  const void* x;           // [N,D] float or double
  const void* candidates;  // [L,D]
  const double* clearance; // [centres] how near a centre has a candidate: its smallest squared distance, less rounding
  const void* nearest;     // [N] squared distance to the nearest centre
  const int32_t* centre;   // [N] which one that is
  int64_t D, begin, end;
  int L;
  int32_t* active;         // out: rows that a candidate might come nearer to, relative to begin
  int64_t* count;          // out: how many
  void* distances;         // out: [active][L]
  double* potential;       // out: [L] sum over the rows of what `nearest` would be
};

template <class T>
void seed_block_portable(const SeedBlock&);
template <class T>
void seed_block_avx2(const SeedBlock&);

}  // namespace vqk::cpu

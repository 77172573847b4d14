// The SIMD levels of fsq and fsq_backward, and the table both use. Internal to csrc/cpu.
#pragma once
#include <type_traits>
#include <vector>

#include "vqk/params.h"

namespace vqk::cpu {

constexpr int kFsqLanes = 8;
constexpr int64_t kFsqRows = 64;        // rows whose digits wait in L1 for their index: a multiple of kFsqLanes
constexpr int kFsqLinear = 16;          // levels up to which every threshold is compared
constexpr int64_t kFsqLargest = 1024;   // levels up to which there are thresholds

// Constants per feature, laid out as the flattened rows are read: eight values of phase p belong to features
// (8 p + lane) mod d, and phase p + phases has the same features again.
struct FsqTable {
  int64_t d, phases, steps;         // steps: thresholds per value of the linear search, or 0
  std::vector<float> threshold;     // [phases][steps][8], +inf where a feature has fewer
  std::vector<float> width, shift;  // [phases][8]
  std::vector<float> slope;         // [phases][8]: half / width
  std::vector<int32_t> basis;       // [d]
  std::vector<std::vector<double>> exact;  // [d] ascending thresholds, empty beyond kFsqLargest
  std::vector<double> half, offset, shift64;  // [d]
};

void fsq_rows_portable(const FsqParams&, const FsqTable&, int64_t begin, int64_t end);
void fsq_rows_avx2(const FsqParams&, const FsqTable&, int64_t begin, int64_t end);
void fsq_backward_rows_portable(const FsqBackwardParams&, const FsqTable&, int64_t begin, int64_t end);
void fsq_backward_rows_avx2(const FsqBackwardParams&, const FsqTable&, int64_t begin, int64_t end);

}  // namespace vqk::cpu

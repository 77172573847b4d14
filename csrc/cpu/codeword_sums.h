// The SIMD levels of codeword_sums.
#pragma once
#include "vqk/params.h"

namespace vqk::cpu {

struct SumPiece {  // codewords [first, last) and columns [begin, end) of head h
  int64_t h, first, last, begin, end;
  const int64_t* offsets;  // [K+1]: the rows of codeword k are rows[offsets[k]:offsets[k+1]]
  const int64_t* rows;
};

// `sum` holds end - begin doubles.
void add_piece_portable(const CodewordSumsParams&, const SumPiece&, double* sum);
void add_piece_avx2(const CodewordSumsParams&, const SumPiece&, double* sum);

struct SumSlice {  // rows [first, last) and columns [begin, end) of head h, as they lie in memory
  int64_t h, first, last, begin, end;
  double* sums;     // [K, end - begin]; cleared first
  int64_t* counts;  // [K] of the rows, added to; null: another slice counts them
  int64_t* bad;     // the first index >= K, if counted
};

void add_slice_portable(const CodewordSumsParams&, const SumSlice&);
void add_slice_avx2(const CodewordSumsParams&, const SumSlice&);

}  // namespace vqk::cpu

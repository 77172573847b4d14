// One plain struct per op: raw pointers, sizes, strides. No torch, no CUDA types.
//
// Dimensions, always in this order: H heads, N vectors, K codewords, D features, Q levels.
// Tensors are row-major and contiguous; sizes and strides count elements, never bytes.
// Every pointer may be misaligned relative to the vector width.
#pragma once
#include <cstdint>

namespace vqk {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// The integers are part of the op schemas (vqkernels/registry.py): do not renumber.
enum class Metric : int { l2 = 0, cosine = 1, dot = 2 };
enum class Estimator : int { ste = 0, rotation = 1, reflection = 2 };

// indices[h,n] = argmin_k d(z[h,n], codebook[h,k]); exact ties go to the lowest k.
// Rows with a non-finite value, and rows whose mask is 0, get index -1; their distance is NaN
// (non-finite) or 0 (masked). Codewords with a non-finite value never win.
struct NearestCodewordParams {
  const void* z;         // [H,N,D] dtype
  const void* codebook;  // [H,K,D] dtype
  const bool* mask;      // [H,N] true = take part, or null
  int64_t* indices;      // [H,N]
  void* distances;       // [H,N] float, or double where dtype is f64: the canonical value, rounded
                         // once. l2: squared distance; cosine: 1 - similarity; dot: -dot product
  int64_t H, N, K, D;
  DType dtype;
  Metric metric;
  bool certified;  // false: precision="fast", the bound is taken as zero
};

// r_0 = z; k_l = nearest(r_{l-1}); r_l = r_{l-1} - c_l; quantized = ((c_1 + c_2) + ...) in float
// (double for f64), rounded once to dtype. A row has either all Q indices or, when masked or
// non-finite (a residual that overflows counts), Q times -1; then quantized is 0 (masked) or NaN.
struct ResidualQuantizeParams {
  const void* z;                 // [H,N,D] dtype
  const void* const* codebooks;  // Q pointers to [H,K_l,D] dtype
  const int64_t* K;              // [Q]
  const bool* mask;              // [H,N] or null
  int64_t* indices;              // [H,N,Q]
  void* quantized;               // [H,N,D] dtype
  void* losses;                  // [Q] float (double for f64): mean over valid rows and D of (r_{l-1} - c_l)^2;
                                 // 0 when no row is valid. Independent of the number of threads
  int64_t* valid;                // [1] number of valid rows over all heads
  int64_t H, N, Q, D;
  DType dtype;
  Metric metric;
};

// dz = J^T grad + sum_l commitment_scale[l] * (r_{l-1} - c_l); 0 for rows with index -1.
// J belongs to the estimator from z to sum_l c_l, or, with per_level, J = sum_l J_l with J_l the
// estimator from r_{l-1} to c_l.
struct ResidualQuantizeBackwardParams {
  const void* z;                  // [H,N,D] dtype
  const void* const* codebooks;   // Q pointers to [H,K_l,D] dtype
  const int64_t* K;               // [Q]
  const int64_t* indices;         // [H,N,Q]
  const void* grad;               // [H,N,D] dtype
  const void* commitment_scale;   // [Q] float (double for f64)
  void* dz;                       // [H,N,D] dtype
  int64_t H, N, Q, D;
  DType dtype;
  Estimator estimator;
  bool per_level;
};

// dz = gamma (g - 2 r (r.g) + 2 zhat (qhat.g)) and its relatives; see docs/numerics.md.
struct RotationTrickBackwardParams {
  const void* z;     // [N,D] dtype
  const void* q;     // [N,D] dtype
  const void* grad;  // [N,D] dtype
  void* dz;          // [N,D] dtype
  int64_t N, D;
  DType dtype;
  Estimator estimator;
};

// counts[s,k] = number of n with indices[s,n] == k; negative indices are skipped.
// Returns through `bad` the first index >= K, or -1.
struct CodebookUsageParams {
  const int64_t* indices;  // [S,N]
  int64_t* counts;         // [S,K]
  int64_t* bad;            // [1]
  int64_t S, N, K;
};

// sums[h,k] = sum of z[h,n] over indices[h,n] == k, added in row order in double and rounded once:
// independent of threads and SIMD level. Negative indices are skipped; `bad` as above.
struct CodewordSumsParams {
  const void* z;           // [H,N,D] dtype
  const int64_t* indices;  // [H,N]
  void* sums;              // [H,K,D] float (double for f64)
  int64_t* counts;         // [H,K]
  int64_t* bad;            // [1]
  int64_t H, N, K, D;
  DType dtype;
};

// Greedy k-means++: rows[0] at random, each next one the best of L drawn by their squared distance to the nearest so
// far. x must be finite, and so small that squared distances do not overflow.
constexpr int64_t kSeedCandidates = 32;
struct KMeansPlusPlusParams {
  const void* x;        // [N,D] float or double
  const double* draws;  // [K,L] uniform in [0,1)
  int64_t* rows;        // [K]
  int64_t N, D, K, L;   // 1 <= L <= kSeedCandidates
  DType dtype;
};

// quantized[n,j] = (level - levels[j] / 2) / (levels[j] / 2), level = the number of thresholds z[n,j] has passed;
// indices[n] = sum_j level_j * prod_{i<j} levels[i], or -1 when a value of the row is NaN (then that value stays NaN).
constexpr int64_t kFsqMaxFeatures = 30;  // of at least 2 levels each, with a product below 2^31
struct FsqParams {
  const void* z;          // [N,d] dtype
  const int64_t* levels;  // [d], each >= 2, product < 2^31
  void* quantized;        // [N,d] dtype
  int32_t* indices;       // [N]
  int64_t N, d;
  DType dtype;
};

// dz = grad * half / cosh^2(z + shift) / (levels / 2): straight through the rounding.
struct FsqBackwardParams {
  const void* z;          // [N,d] dtype
  const void* grad;       // [N,d] dtype
  const int64_t* levels;  // [d]
  void* dz;               // [N,d] dtype
  int64_t N, d;
  DType dtype;
};

// One step of beam search over a trie: of all children of the W beams' nodes of a user, the k with the highest
// scores[b,w] + log_softmax(logits[b,w])[token]; NaN counts as highest, of equals the lowest (beam, edge) comes first.
// A state outside 0 .. S - 1 is a dead beam, a token outside 0 .. V - 1 no child; where fewer than k are left: score
// -inf, -1 elsewhere. B users, W beams, V tokens, S nodes.
struct TrieTopkParams {
  const void* logits;            // [B,W,V] dtype
  const void* scores;            // [B,W] float (double for f64)
  const int64_t* states;         // [B,W]
  const int64_t* row_offsets;    // [S+1]: node s has the edges row_offsets[s] .. row_offsets[s+1]
  const int64_t* edge_tokens;    // [E]
  const int64_t* edge_children;  // [E]
  void* out_scores;              // [B,k] float (double for f64), descending
  int64_t* out_beams;            // [B,k]
  int64_t* out_tokens;           // [B,k]
  int64_t* out_states;           // [B,k]
  int64_t B, W, V, S, k;
  DType dtype;
};

}  // namespace vqk

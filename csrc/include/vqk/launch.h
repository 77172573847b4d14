// What a binding calls: one launcher per op and device, nothing else.
#pragma once
#include <atomic>
#include <memory>

#include "vqk/params.h"

namespace vqk {

// How CPU kernels use threads: the caller brings its own pool (torch's, or std::thread for the
// NumPy module). `run` calls body(ctx, task) once for each task in [0, tasks), in any order and on
// any thread, and returns when all are done. Results never depend on which thread ran what.
struct Parallel {
  void (*run)(int64_t tasks, void (*body)(void* ctx, int64_t task), void* ctx);
  int threads;  // upper bound on concurrently running bodies; used only to size scratch
};

// Hands out tasks: to each worker a run of neighbours, and then what others have left of theirs. Neighbours write
// neighbouring memory, and where that is a huge page not touched before, one worker would wait for the other's page fault.
class TaskRuns {
 public:
  TaskRuns(int64_t tasks, int64_t workers) : workers_(workers), runs_(new Run[workers]) {
    for (int64_t w = 0; w < workers; ++w) runs_[w].next = tasks * w / workers, runs_[w].end = tasks * (w + 1) / workers;
  }

  template <class Body>
  void work(int64_t worker, const Body& body) {
    for (int64_t i = 0; i < workers_; ++i) {
      Run& run = runs_[(worker + i) % workers_];
      for (int64_t task; (task = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end;) body(task);
    }
  }

  void stop() {  // no further tasks
    for (int64_t w = 0; w < workers_; ++w) runs_[w].next = runs_[w].end;
  }

 private:
  struct alignas(64) Run {
    std::atomic<int64_t> next;
    int64_t end;
  };
  int64_t workers_;
  std::unique_ptr<Run[]> runs_;
};

// The caller's threads for a job of that many multiply-adds (or as slow things), the calling thread alone for a small
// one: waking the others takes some 5 microseconds, and as long as a time slice where other processes keep them busy.
inline Parallel threads_for(double operations, const Parallel& parallel) {
  if (operations >= 0x1p19) return parallel;
  auto here = [](int64_t tasks, void (*body)(void*, int64_t), void* ctx) {
    for (int64_t task = 0; task < tasks; ++task) body(ctx, task);
  };
  return {here, 1};
}

namespace cpu {
void nearest_codeword(const NearestCodewordParams&, const Parallel&);
void residual_quantize(const ResidualQuantizeParams&, const Parallel&);
void residual_quantize_backward(const ResidualQuantizeBackwardParams&, const Parallel&);
void rotation_trick_backward(const RotationTrickBackwardParams&, const Parallel&);
void codebook_usage(const CodebookUsageParams&, const Parallel&);
void codeword_sums(const CodewordSumsParams&, const Parallel&);
void kmeans_plus_plus(const KMeansPlusPlusParams&, const Parallel&);
void fsq(const FsqParams&, const Parallel&);
void fsq_backward(const FsqBackwardParams&, const Parallel&);
void trie_topk(const TrieTopkParams&, const Parallel&);

// Measures the fp32 multiply-add peak of parallel.threads cores at the SIMD level in use, in GFLOP/s.
double fma_peak_gflops(const Parallel&);
}  // namespace cpu

namespace cuda {
// `stream` is a cudaStream_t. Each returns null, or a message that says what the CUDA runtime refused.
// `workspace`: scratch memory of the device, as many bytes as <op>_workspace says, at a multiple of 16.
const char* codebook_usage(const CodebookUsageParams&, void* stream);
const char* codeword_sums(const CodewordSumsParams&, void* workspace, void* stream);
int64_t codeword_sums_workspace(const CodewordSumsParams&);
const char* fsq(const FsqParams&, void* stream);
const char* fsq_backward(const FsqBackwardParams&, void* stream);
const char* residual_quantize_backward(const ResidualQuantizeBackwardParams&, void* stream);
const char* rotation_trick_backward(const RotationTrickBackwardParams&, void* stream);
const char* trie_topk(const TrieTopkParams&, void* workspace, void* stream);
int64_t trie_topk_workspace(const TrieTopkParams&);

// These need `workspace`: so many bytes of device memory, aligned to 256, free again when the stream has come past.
int64_t nearest_codeword_workspace(const NearestCodewordParams&);
const char* nearest_codeword(const NearestCodewordParams&, void* workspace, void* stream);
int64_t residual_quantize_workspace(const ResidualQuantizeParams&);
const char* residual_quantize(const ResidualQuantizeParams&, void* workspace, void* stream);
}  // namespace cuda

}  // namespace vqk

// Packed codebooks kept from call to call. A call of a few rows takes less time than packing its codebook, and such calls
// come in thousands with the same one (serving, encoding row by row).
//
// What decides is the codebook's bytes: a cached codebook has a private copy, and a call compares all of it. Pointers and
// version counters would miss what NumPy or .data write in place. A codebook is packed for keeping when a sample of it comes
// the second time among the latest few, so codebooks that change from call to call (training) are never kept; calls of many
// rows, for which packing is little, are not looked up at all. Where the sample is wrong, a codebook is packed in vain; a
// checksum of all bytes made calls with changing codebooks slower.
//
// Memory: kEntries codebooks of at most kMostBytes each, for which there are the copy, as many floats and half as much
// again for integers; twice that for cosine, bf16 and f16: at most 16 MiB. Threads: who finds the lock taken packs.
#include <algorithm>
#include <cstring>

#include "nearest_codeword.h"

namespace vqk::cpu {
namespace {

constexpr size_t kEntries = 4, kSums = 16;
constexpr int64_t kMostBytes = 1 << 20, kMostRows = 1024;
constexpr int64_t kIntegerRows = 64;  // as many rows as make 16-bit integers worth packing; kept, they always are

using Sources = std::vector<PackedCodebooks::Source>;

struct Entry {
  Memory copy;
  Sources sources;  // in the copy
  const SearchKernel* kernel;
  int64_t D;
  DType dtype;
  Metric metric;
  bool certified;
  std::unique_ptr<PackedCodebooks> packed;

  bool has(const SearchKernel& k, const Sources& wanted, int64_t d, DType type, Metric m, bool exact) const {
    if (kernel != &k || sources.size() != wanted.size() || D != d || dtype != type || metric != m || certified != exact)
      return false;
    for (size_t i = 0; i < wanted.size(); ++i)
      if (sources[i].K != wanted[i].K ||
          std::memcmp(sources[i].data, wanted[i].data, wanted[i].K * D * dtype_size(dtype)) != 0)
        return false;
    return true;
  }
};

std::mutex mutex;                                // of the next three
std::shared_ptr<const Entry> entries[kEntries];  // the last one used first
uint64_t sums[kSums];                            // samples of the latest codebooks that were not there
size_t next_sum;

// Of 64 words spread over each codebook: it only has to tell which codebooks to keep, and training changes all of them.
uint64_t sample(const Sources& sources, int64_t D, DType dtype) {
  constexpr size_t kWords = 64;
  uint64_t sum = 0;
  for (const auto& source : sources) {
    const char* p = static_cast<const char*>(source.data);
    const size_t size = source.K * D * dtype_size(dtype), width = std::min(size, sizeof sum);
    for (size_t i = 0; i < kWords; ++i) {
      uint64_t word = 0;
      std::memcpy(&word, p + (size - width) * i / (kWords - 1), width);
      sum = ((sum ^ word) * 0x9e3779b97f4a7c15) ^ (sum >> 29);
    }
  }
  return sum;
}

}  // namespace

std::shared_ptr<const PackedCodebooks> packed_codebooks(const SearchKernel& kernel, const Sources& sources, int64_t D,
                                                        DType dtype, Metric metric, bool certified, int64_t rows,
                                                        const Parallel& parallel) {
  int64_t bytes = 0;
  for (const auto& source : sources) bytes += source.K * D * dtype_size(dtype);
  auto pack = [&] {
    return std::make_shared<const PackedCodebooks>(kernel, sources, D, dtype, metric, certified, rows, parallel);
  };
  if (rows >= kMostRows || bytes > kMostBytes || bytes == 0) return pack();

  std::shared_ptr<const Entry> kept[kEntries];
  {
    std::unique_lock lock(mutex, std::try_to_lock);
    if (!lock) return pack();
    std::copy(entries, entries + kEntries, kept);
  }
  auto to_front = [](const std::shared_ptr<const Entry>& entry) {  // before what is there; the last one goes
    std::unique_lock lock(mutex, std::try_to_lock);
    if (!lock) return;
    const auto end = entries + kEntries, at = std::find(entries, end, entry);
    std::move_backward(entries, at == end ? end - 1 : at, at == end ? end : at + 1);
    entries[0] = entry;
  };
  for (size_t i = 0; i < kEntries; ++i)
    if (kept[i] && kept[i]->has(kernel, sources, D, dtype, metric, certified)) {
      if (i) to_front(kept[i]);
      return {kept[i], kept[i]->packed.get()};
    }
  const uint64_t sum = sample(sources, D, dtype);
  {
    std::unique_lock lock(mutex, std::try_to_lock);
    if (!lock) return pack();
    if (std::find(sums, sums + kSums, sum) == sums + kSums) {
      sums[next_sum++ % kSums] = sum;
      lock.unlock();
      return pack();
    }
  }
  auto entry = std::make_shared<Entry>(Entry{Memory(bytes), {}, &kernel, D, dtype, metric, certified, nullptr});
  char* to = entry->copy.get();
  for (const auto& source : sources) {
    const size_t size = source.K * D * dtype_size(dtype);
    std::memcpy(to, source.data, size);
    entry->sources.push_back({to, source.K});
    to += size;
  }
  entry->packed = std::make_unique<PackedCodebooks>(kernel, entry->sources, D, dtype, metric, certified,
                                                    std::max(rows, kIntegerRows), parallel);
  to_front(entry);
  return {entry, entry->packed.get()};
}

}  // namespace vqk::cpu

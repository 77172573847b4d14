// The coarse pass in bytes: scores of all rows and codewords, block by block. Part of nearest_codeword_bytes.h.

// The lowest scores of the tile of rows from `start` over each group of panels [first, last). Not to be inlined: by itself
// the compiler finds registers for all of it.
template <bool OneChunk, bool OnePanel>
static __attribute__((noinline)) void lowest_of_panels(const Codebook& cb, const ByteScratch& s, int start, int64_t first,
                                                       int64_t last, Tick* out) {
  const int64_t steps = cb.byte_steps, panel_bytes = steps * sizeof(CodeBytes) * kByteWidth;
  const int64_t start_width = (cb.D + kChunkFeatures - 1) / kChunkFeatures * kByteWidth;
  const int panels_per_group = OnePanel ? 1 : cb.byte_group / 2, tag_bits = s.rows->tag_bits;
  const uint8_t* z = s.tiles + start * 4 * steps;
  const int8_t* panel = cb.panels8 + first * panel_bytes;
  const Tick* from = static_cast<const Tick*>(cb.starts8) + first * start_width;
  const HalfNorm* half_norms = static_cast<const HalfNorm*>(cb.half_norms8) + first * kByteWidth;
  Ticks tag = {};
  for (int64_t count = last - first; count > 0; count -= panels_per_group, tag += 1, out += kTileRows * kTickLanes) {
    for (int i = 0; i < panels_per_group; ++i, panel += panel_bytes, from += start_width, half_norms += kByteWidth) {
      Ticks lo[kTileRows], hi[kTileRows];
#ifdef VQK_QUADS
      score_panel_bytes(z, steps, s.rows->tile_ticks[start / kTileRows], panel, from, half_norms, lo, hi);
#else
      score_panel_bytes<OneChunk>(z, steps, s.factors + 2 * start, panel, from, cb.byte_shift, half_norms, lo, hi);
#endif
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        Ticks x = VQK_MIN_TICKS(lo[r], hi[r]);
        if (i) x = VQK_MIN_TICKS(x, load_ticks(out + r * kTickLanes));
        *reinterpret_cast<TicksAtAny*>(out + r * kTickLanes) = OnePanel ? with_tag(x, tag_bits, tag) : x;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows && !OnePanel; ++r) {
      TicksAtAny& x = *reinterpret_cast<TicksAtAny*>(out + r * kTickLanes);
      x = with_tag(x, tag_bits, tag);
    }
  }
}

// Memory that will be read next.
struct Ahead {
  const char *next, *end;
  void bring(int64_t lines) {
    for (; lines > 0 && next < end; --lines, next += 64) __builtin_prefetch(next);
  }
};

#ifdef VQK_TILES
#include "nearest_codeword_tiles.h"
#endif

// Scores of all rows against all codewords; what they leave.
template <bool OneChunk>
static Candidates coarse_pass_bytes(const Codebook& cb, const float* z, const ByteScratch& s,
                                    const SearchHints& hints) {
  const ByteRows& b = *s.rows;
  Candidates found;
  const int64_t steps = cb.byte_steps;
  const int64_t group_width = cb.byte_group * kTickLanes;
  // a panel holds two groups, one, or a part of one
  const int64_t panels_per_group = cb.byte_group > 2 ? cb.byte_group / 2 : 1, groups_per_panel = cb.byte_group == 1 ? 2 : 1;
  const int64_t panels = (cb.K + group_width * groups_per_panel - 1) / (group_width * groups_per_panel) * panels_per_group;
  const int64_t panel_bytes = steps * sizeof(CodeBytes) * kByteWidth;
  const int tile_rows = tile_rows_of(cb), at_once = rows_at_once(cb);
  int64_t block = (in_tiles(cb) ? kTileBlockBytes : kBlockBytes) / panel_bytes;
  const int64_t most = kBlockVectors * panels_per_group / groups_per_panel;
  if (block > most) block = most;
  block = block / panels_per_group * panels_per_group;
  if (block < panels_per_group) block = panels_per_group;
  // what comes next into the cache, a share with every tile: it waits for memory otherwise
  Ahead ahead = {hints.next, hints.next + hints.next_bytes};
  const int64_t per_tile = hints.next_bytes / 64 / (b.count / at_once + 1) + 1;
#ifdef VQK_TILES
  const int64_t instructions = (steps + kTileSteps - 1) / kTileSteps;
  if (in_tiles(cb)) tiles_begin(static_cast<int>(steps / instructions));
  // nothing of what L2 does not hold beside the codewords: it would be gone again when it is wanted
  const int lines = hints.next_bytes > kBlockBytes ? 0 : static_cast<int>(per_tile / panels + 1);
#endif
  for (int64_t first = 0; first < panels; first += block) {
    const int64_t last = first + block < panels ? first + block : panels;
    const int64_t groups = (last - first + panels_per_group - 1) / panels_per_group * groups_per_panel;
    const int64_t vectors = in_tiles(cb) ? 2 * ((groups + kCellGroups - 1) / kCellGroups) : groups;  // of a row's minima
    const int64_t batches = kBatchVectors * tile_rows / at_once / vectors;
    const int batch = at_once * static_cast<int>(batches > 1 ? batches : 1);
    const uint32_t lane = static_cast<uint32_t>(first / panels_per_group * groups_per_panel * kTickLanes);
    for (int begin = 0; begin < b.count; begin += batch) {
      const int end = begin + batch < b.count ? begin + batch : b.count;
      Tick* out = s.minima;
      for (int start = begin; start < end; start += at_once, out += vectors * at_once * kTickLanes) {
#ifdef VQK_TILES
        if (in_tiles(cb)) {
          (steps > kTileSteps ? (cb.byte_group == 1 ? lowest_of_tiles<true> : lowest_of_tiles<false>)
                              : (cb.byte_group == 2 ? lowest_of_short_tiles<2> : lowest_of_short_tiles<4>))(
              cb, s, start, first, last, out, ahead, lines);
          continue;
        }
#endif
        ahead.bring(per_tile);
#ifdef VQK_QUADS
        if (panels_per_group > 1 && steps <= 4) {
          auto* lowest = cb.byte_words ? (steps == 1   ? lowest_in_group_bytes<1, true>
                                          : steps == 2 ? lowest_in_group_bytes<2, true>
                                                       : lowest_in_group_bytes<3, true>)
                                       : (steps == 2   ? lowest_in_group_bytes<2, false>
                                          : steps == 3 ? lowest_in_group_bytes<3, false>
                                                       : lowest_in_group_bytes<4, false>);
          const Tick* starts = static_cast<const Tick*>(cb.starts8);
          const HalfNorm* half_norms = static_cast<const HalfNorm*>(cb.half_norms8);
          for (int64_t p = first; p < last; p += panels_per_group) {
            const Tick group = static_cast<Tick>((p - first) / panels_per_group);
            lowest(s.tiles + start * 4 * steps, b.tile_ticks[start / kTileRows], cb.panels8 + p * panel_bytes,
                   starts + p * kByteWidth, half_norms + p * kByteWidth, cb.byte_group, b.tag_bits, Ticks{} + group,
                   out + group * kTileRows * kTickLanes);
          }
          continue;
        }
#endif
        (panels_per_group == 1 ? lowest_of_panels<OneChunk, true> : lowest_of_panels<OneChunk, false>)(cb, s, start, first, last,
                                                                                                       out);
      }
      (in_tiles(cb) ? (first == 0 ? filter_rows<false, true> : filter_rows<true, true>)
                    : (first == 0 ? filter_rows<false, false> : filter_rows<true, false>))(cb, z, s, groups, lane, begin, end,
                                                                                           found);
    }
  }
#ifdef VQK_TILES
  if (in_tiles(cb)) tiles_end();
#endif
  return found;
}

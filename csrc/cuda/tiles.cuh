// What the coarse pass (coarse.cuh) is given on each architecture, and that it fits there. To try other tiles on a card,
// change a row.
#pragma once

namespace vqk::cuda {

constexpr int kTile = 128;  // rows, codewords, threads and bytes of a chunk
constexpr int kTileThreads = 128;
constexpr int kChunkBytes = kTile * kTile;

struct Tiles {
  int from;       // compute capability, 80 for 8.0; up to the next row
  int shared_kb;  // of a multiprocessor; a block may have all but one of them, and takes one more than it asks for
  int stages;     // chunks of codewords in shared memory: one is multiplied while the others arrive
  int resident;   // rows of up to so many chunks stay there; of longer ones as many chunks as of codewords are there

  constexpr int chunks(int of_row) const { return (of_row <= resident ? of_row : stages) + stages; }
};

// Two blocks a multiprocessor, whatever D: one multiplies while the other compares scores. With 100 KB that is so for
// rows of one chunk (64 features in 16 bits); longer ones stay in shared memory as far as one block allows.
constexpr Tiles kTiles[] = {
    {80, 164, 2, 2},
    {86, 100, 2, 3},
    {90, 228, 3, 3},
    {100, 228, 3, 3},
    {120, 100, 2, 3},
};

constexpr Tiles tiles_of(int capability) {
  Tiles best = kTiles[0];
  for (const Tiles& row : kTiles)
    if (row.from <= capability) best = row;
  return best;
}

// Whether so many blocks that each also have own_kb fit on a multiprocessor, whose rows have any number of chunks.
constexpr bool fit(const Tiles& tiles, int blocks, int own_kb, int most_chunks) {
  for (int of_row = 1; of_row <= most_chunks; ++of_row)
    if (blocks * (tiles.chunks(of_row) * kChunkBytes / 1024 + own_kb + 1) > tiles.shared_kb) return false;
  return true;
}
constexpr int kOwnKb = 7;   // beside the chunks, at most: residual_quantize.cu
constexpr int kLonger = 9;  // chunks: more make no difference
static_assert(fit(tiles_of(80), 2, kOwnKb, kLonger) && fit(tiles_of(90), 2, kOwnKb, kLonger) &&
              fit(tiles_of(100), 2, kOwnKb, kLonger));
static_assert(fit(tiles_of(86), 1, kOwnKb, kLonger) && fit(tiles_of(120), 1, kOwnKb, kLonger));
static_assert(fit(tiles_of(89), 2, 0, 1) && fit(tiles_of(120), 2, 0, 1));

}  // namespace vqk::cuda

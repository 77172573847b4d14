// The coarse pass in bytes with AMX: products of 16 rows and 16 codewords at a time. Part of
// nearest_codeword_byte_coarse.h at levels that define VQK_TILES; words and few features stay with VNNI.
//
//                          panel of codewords [D/4][32][4], as for VNNI: an instruction takes 16 of its steps
//                            | tile 6: 16 codewords | tile 7       |
//        rows 0-15   tile 4  |  tile 0: 16x16 sums  |  tile 1      |    4 loads, 4 products of 16x16x64 per 16 steps
//        rows 16-31  tile 5  |  tile 2              |  tile 3      |
//
//   per 16 steps and 32 x 32 scores   4 tdpbusd, 16 cycles each, of 64 x 16 x 16 products: 8 times VNNI's
//                                     4 x 16 loads of 64 bytes, 2 a cycle                     32 cycles
//   per 32 x 32 scores                4 x 16 stores of sums, 1 a cycle                        64 cycles
//                                     32 x (2 loads, 8 additions, minima and shifts of 2 a cycle, 2 stores)     128 cycles
//
// Sums leave tiles through memory only. What one panel left there is folded while the next one's products run. Folded means: of
// each lane the lowest score and the second over a cell of kCellGroups groups, which stay in L1, where minima of every group would
// not. Where a second can win, too, all of its cell's groups become candidates.
//
// Steps are divided evenly among instructions, so that rows are filled up by less than one step for each; codewords have zeros
// there. Rows lie in memory as they do in tiles.
//
// Where features and codewords are few, sums' way through memory takes longer than VNNI's products: use_tiles.

#ifdef VQK_EMULATE_AMX
struct EmulatedTile {
  int32_t lanes[16][16];
};
static thread_local EmulatedTile emulated[8];
static thread_local int emulated_steps;  // of the operands
static void tiles_begin(int steps) { emulated_steps = steps; }
static void tiles_end() {}
template <int T>
static void tile_zero() {
  emulated[T] = {};
}
template <int T>
static void tile_load(const void* from, int64_t stride) {
  const int rows = T < 6 ? 16 : emulated_steps, bytes = T < 6 ? 4 * emulated_steps : 64;
  emulated[T] = {};
  for (int r = 0; r < rows; ++r) __builtin_memcpy(emulated[T].lanes[r], static_cast<const char*>(from) + r * stride, bytes);
}
template <int T>
static void tile_load_once(const void* from, int64_t stride) {
  tile_load<T>(from, stride);
}
template <int T>
static void tile_store(int32_t* to) {
  __builtin_memcpy(to, &emulated[T], sizeof emulated[T]);
}
template <int Sum, int Rows, int Codewords>
static void tile_multiply() {
  for (int r = 0; r < 16; ++r)
    for (int d = 0; d < emulated_steps; ++d)
      for (int k = 0; k < 16; ++k)
        for (int f = 0; f < 4; ++f)
          emulated[Sum].lanes[r][k] += static_cast<uint8_t>(emulated[Rows].lanes[r][d] >> 8 * f) *
                                       static_cast<int8_t>(emulated[Codewords].lanes[d][k] >> 8 * f);
}
#else
// In assembly, so that any compiler has them.
struct TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static void tiles_begin(int steps) {
  TileConfig config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? 4 * steps : 64);
    config.rows[t] = static_cast<uint8_t>(t < 6 ? 16 : steps);
  }
  asm volatile("ldtilecfg %0" : : "m"(config));
}
static void tiles_end() { asm volatile("tilerelease"); }
template <int T>
VQK_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
VQK_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(from), "r"(stride) : "memory");
}
// What is not wanted again soon: past L1, where rows stay.
template <int T>
VQK_INLINE void tile_load_once(const void* from, int64_t stride) {
  asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T>
VQK_INLINE void tile_store(int32_t* to) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(T), "r"(to), "r"(int64_t{64}) : "memory");
}
template <int Sum, int Rows, int Codewords>
VQK_INLINE void tile_multiply() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(Rows), "i"(Codewords));
}
#endif

// Groups of vectors of sums that have left the tiles, and where their minima go.
template <int Vectors>
struct GroupSums {
  int32_t of[2][Vectors][kTileOfRows * kLanes];  // tile of rows, vector
  IntVec starts[2][Vectors];                     // the same: what sums begin with
  Tick* cell;                                    // of the first tile of rows
  Ticks tag;
  bool begins;                                   // its cell
};

// What the sums of vector `i` of a group begin with, as in score_panel_bytes.
template <int Vectors>
VQK_INLINE void set_starts(GroupSums<Vectors>& g, int i, const Tick* starts, const HalfNorm* half_norms, const float* ticks) {
  for (int tile = 0; tile < 2; ++tile)
    g.starts[tile][i] = (IntVec)load_ticks(starts) +
                        (IntVec)VQK_FMA(load(half_norms), VQK_SPLAT(ticks[tile]), VQK_SPLAT(0x1.8p23f));
}

// The two lowest scores of each lane over the groups of a cell, [kTileOfRows][2][kTickLanes]: from rows [row, row + count) of a
// tile's sums and what the cell has of the groups before. Apart: both vectors are a group each, else all are one.
template <bool Apart, bool Begins, int Vectors>
VQK_INLINE void fold_into(const GroupSums<Vectors>& g, int tile, int row, int count, Tick* cell, int tag_bits) {
  IntVec start[Vectors];
#pragma GCC unroll 4
  for (int i = 0; i < Vectors; ++i) start[i] = g.starts[tile][i];
  const Ticks tag = g.tag, next_tag = tag + 1;
  const int32_t* sums = g.of[tile][0] + row * kLanes;
  Tick* to = cell + row * 2 * kTickLanes;
  for (int r = 0; r < count; ++r, sums += kLanes, to += 2 * kTickLanes) {
    Ticks x[Vectors];
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i)
      x[i] = (Ticks)(*reinterpret_cast<const IntVecAtAny*>(sums + i * kTileOfRows * kLanes) + start[i]);
    Ticks low, high = Ticks{} + kMostTicks;
    if (Apart) {
      const Ticks a = with_tag(x[0], tag_bits, tag), b = with_tag(x[1], tag_bits, next_tag);
      low = VQK_MIN_TICKS(a, b), high = VQK_MAX_TICKS(a, b);
    } else {
      low = VQK_MIN_TICKS(x[0], x[1]);
      if (Vectors == 4) low = VQK_MIN_TICKS(low, VQK_MIN_TICKS(x[Vectors - 2], x[Vectors - 1]));
      low = with_tag(low, tag_bits, tag);
    }
    if (!Begins) {
      const Ticks lowest = load_ticks(to), second = load_ticks(to + kTickLanes);
      high = Apart ? VQK_MIN_TICKS(second, high) : second;
      high = VQK_MIN_TICKS(high, VQK_MAX_TICKS(lowest, low));
      low = VQK_MIN_TICKS(lowest, low);
    }
    *reinterpret_cast<TicksAtAny*>(to) = low;
    *reinterpret_cast<TicksAtAny*>(to + kTickLanes) = high;
  }
}
// Rows [row, row + count) of both tiles, within one of them; next_tile: from the cells of one to those of the other.
template <bool Apart, int Vectors>
VQK_INLINE void fold(const GroupSums<Vectors>& g, int row, int count, int64_t next_tile, int tag_bits) {
  const int tile = row / kTileOfRows;
  Tick* const cell = g.cell + tile * next_tile;
  if (g.begins) fold_into<Apart, true>(g, tile, row % kTileOfRows, count, cell, tag_bits);
  else fold_into<Apart, false>(g, tile, row % kTileOfRows, count, cell, tag_bits);
}

// The two lowest scores of each lane and cell of panels [first, last), for the tiles of rows from `start` and start +
// kTileOfRows, one after the other: [cells][kTileOfRows][2][kTickLanes] each. Brings `lines` of what comes next into the cache with
// every panel. Apart: a panel is two groups, else one.
template <bool Apart>
static __attribute__((noinline)) void lowest_of_tiles(const Codebook& cb, const ByteScratch& s, int start, int64_t first,
                                                      int64_t last, Tick* out, Ahead& ahead, int lines) {
  constexpr int64_t kCell = kTileOfRows * 2 * kTickLanes;
  constexpr int kGroups = Apart ? 2 : 1, kCellPanels = kCellGroups / kGroups;
  const int64_t steps = cb.byte_steps, panel_bytes = 4 * steps * kByteWidth;
  const int instructions = static_cast<int>((steps + kTileSteps - 1) / kTileSteps), count = static_cast<int>(last - first);
  const int64_t part = 4 * steps / instructions, tile_part = part * kTileOfRows, panel_part = part * kByteWidth;
  const int64_t next_tile = (count + kCellPanels - 1) / kCellPanels * kCell;
  const int tag_bits = s.rows->tag_bits;
  const float* const ticks = s.rows->tile_ticks + start / kTileOfRows;
  const uint8_t *const z0 = s.tiles + start * 4 * steps, *const z1 = z0 + kTileOfRows * 4 * steps;
  const Tick* starts = static_cast<const Tick*>(cb.starts8) + first * kByteWidth;
  const HalfNorm* half_norms = static_cast<const HalfNorm*>(cb.half_norms8) + first * kByteWidth;
  const int8_t* panel = cb.panels8 + first * panel_bytes;
  GroupSums<2> sums[2];
  for (int p = 0; p < count; ++p, panel += panel_bytes, starts += kByteWidth, half_norms += kByteWidth) {
    GroupSums<2>&now = sums[p & 1], &before = sums[~p & 1];
    ahead.bring(lines);
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    int folded = p == 0 ? kMostTileRows : 0;  // of the panel before
    for (int i = 0; i < instructions; ++i) {
      tile_load<4>(z0 + i * tile_part, part);
      tile_load_once<6>(panel + i * panel_part, 4 * kByteWidth);
      tile_multiply<0, 4, 6>();
      tile_load_once<7>(panel + i * panel_part + 4 * kLanes, 4 * kByteWidth);
      tile_multiply<1, 4, 7>();
      tile_load<5>(z1 + i * tile_part, part);
      tile_multiply<2, 5, 6>();
      tile_multiply<3, 5, 7>();
      for (; folded < kMostTileRows * (i + 1) / instructions; folded += 2) fold<Apart>(before, folded, 2, next_tile, tag_bits);
    }
    tile_store<0>(now.of[0][0]), tile_store<1>(now.of[0][1]), tile_store<2>(now.of[1][0]), tile_store<3>(now.of[1][1]);
    now.begins = p % kCellPanels == 0;
    now.cell = out + p / kCellPanels * kCell;
    now.tag = Ticks{} + static_cast<Tick>(p * kGroups);
    for (int i = 0; i < 2; ++i) set_starts(now, i, starts + i * kLanes, half_norms + i * kLanes, ticks);
  }
  const GroupSums<2>& end = sums[(count - 1) & 1];
  fold<Apart>(end, 0, kTileOfRows, next_tile, tag_bits), fold<Apart>(end, kTileOfRows, kTileOfRows, next_tile, tag_bits);
}

// The same where rows fit one instruction, in groups of `Vectors`: rows stay in their tiles, one vector's sums are stored while the next
// one's products run, and a group is folded while those of the next are stored.
template <int Vectors>
static __attribute__((noinline)) void lowest_of_short_tiles(const Codebook& cb, const ByteScratch& s, int start, int64_t first,
                                                            int64_t last, Tick* out, Ahead& ahead, int lines) {
  constexpr int64_t kCell = kTileOfRows * 2 * kTickLanes;
  constexpr int kRows = kMostTileRows / Vectors;  // folded with every vector
  const int64_t part = 4 * cb.byte_steps, panel_bytes = part * kByteWidth;
  const int groups = static_cast<int>(2 * (last - first) / Vectors);
  const int64_t next_tile = (groups + kCellGroups - 1) / kCellGroups * kCell;
  const int tag_bits = s.rows->tag_bits;
  const float* const ticks = s.rows->tile_ticks + start / kTileOfRows;
  const Tick* starts = static_cast<const Tick*>(cb.starts8) + first * kByteWidth;
  const HalfNorm* half_norms = static_cast<const HalfNorm*>(cb.half_norms8) + first * kByteWidth;
  const int8_t* codewords = cb.panels8 + first * panel_bytes;
  GroupSums<Vectors> sums[2];
  tile_load<4>(s.tiles + start * part, part), tile_load<5>(s.tiles + (start + kTileOfRows) * part, part);
  for (int g = 0; g < groups; ++g) {
    GroupSums<Vectors>&now = sums[g & 1], &before = sums[~g & 1];
    ahead.bring(lines * Vectors / 2);
#pragma GCC unroll 2
    for (int i = 0; i < Vectors; i += 2, codewords += panel_bytes) {
      tile_load<6>(codewords, 4 * kByteWidth);
      tile_zero<0>(), tile_multiply<0, 4, 6>(), tile_zero<2>(), tile_multiply<2, 5, 6>();
      if (i > 0) tile_store<1>(now.of[0][i - 1]), tile_store<3>(now.of[1][i - 1]);
      else if (g > 0) tile_store<1>(before.of[0][Vectors - 1]), tile_store<3>(before.of[1][Vectors - 1]);
      if (i > 0 && g > 0) fold<false>(before, (i - 1) * kRows, kRows, next_tile, tag_bits);
      else if (g > 1) fold<false>(now, (Vectors - 1) * kRows, kRows, next_tile, tag_bits);  // still the group before the last
      tile_load<7>(codewords + 4 * kLanes, 4 * kByteWidth);
      tile_zero<1>(), tile_multiply<1, 4, 7>(), tile_zero<3>(), tile_multiply<3, 5, 7>();
      tile_store<0>(now.of[0][i]), tile_store<2>(now.of[1][i]);
      if (g > 0) fold<false>(before, i * kRows, kRows, next_tile, tag_bits);
    }
    now.begins = g % kCellGroups == 0;
    now.cell = out + g / kCellGroups * kCell;
    now.tag = Ticks{} + static_cast<Tick>(g);
    for (int i = 0; i < Vectors; ++i, starts += kLanes, half_norms += kLanes) set_starts(now, i, starts, half_norms, ticks);
  }
  GroupSums<Vectors>& end = sums[(groups - 1) & 1];
  tile_store<1>(end.of[0][Vectors - 1]), tile_store<3>(end.of[1][Vectors - 1]);
  if (groups > 1) fold<false>(sums[groups & 1], (Vectors - 1) * kRows, kRows, next_tile, tag_bits);
  for (int row = 0; row < kMostTileRows; row += kRows) fold<false>(end, row, kRows, next_tile, tag_bits);
}

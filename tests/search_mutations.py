"""Mutations of the search by bytes on the CPU and of codebooks kept between calls; tests/mutations.py makes them."""

BYTE_ROWS, BYTES = "csrc/cpu/nearest_codeword_byte_rows.h", "csrc/cpu/nearest_codeword_byte_search.h"
PRODUCTS = "csrc/cpu/nearest_codeword_bytes.h"
CANDIDATES, CACHE = "csrc/cpu/nearest_codeword_byte_candidates.h", "csrc/cpu/nearest_codeword_cache.cpp"
AVX2, TILE = "csrc/cpu/nearest_codeword_avx2.cpp", "csrc/cpu/nearest_codeword_kernel.h"
COARSE, AMX = "csrc/cpu/nearest_codeword_byte_coarse.h", "csrc/cpu/nearest_codeword_tiles.h"
DRIVER, KERNEL = "tests/test_cpp.py", "tests/test_nearest_codeword.py"

MUTATIONS = {
    "kernel: bytes lose their error bound": (
        "csrc/include/vqk/error_bound.h", r"const double lost = z_error \* c_row \+", "const double lost = 0 * z_error + 0 *", DRIVER),
    "kernel: bytes trust a float32 score too far": (
        CANDIDATES, r"\* b\.ticks\[j\] \+ b\.eps\[j\], known", "* b.ticks[j], known", DRIVER),
    "kernel: the offset of bytes is not taken back": (
        BYTE_ROWS, r"0 : 128 \* static", "0 : 127 * static", DRIVER),
    "kernel: words begin with the offset of bytes": (
        BYTE_ROWS, r"offset = cb\.byte_words \? 0 :", "offset =", DRIVER),
    "kernel: words of any length": (
        BYTE_ROWS, r"cb\.byte_words \? 1 / kWordLength", "cb.byte_words ? 0.0", DRIVER),
    "kernel: words are too long for their sums": (
        PRODUCTS, r"kWordLength = 2900", "kWordLength = 29000", DRIVER),
    "kernel: words of one step forget the others": (
        COARSE, r"steps == 1   \? lowest_in_group_bytes<1, true>", "steps <= 2 ? lowest_in_group_bytes<1, true>", DRIVER),
    "kernel: a group keeps the scores of its last panel": (
        COARSE, r"if \(i\) x = VQK_MIN_TICKS", "if (false) x = VQK_MIN_TICKS", DRIVER),
    "kernel: a tile leaves rows out": (
        TILE, r"z \+ 3 \* i \* stride", "z + 2 * i * stride", DRIVER),
    "kernel: half norms of bytes are too large": (
        BYTE_ROWS, r"cb\.l2 \? 0\.5 \* squares", "cb.l2 ? 0.6 * squares", DRIVER),
    "kernel: a tile of bytes has the unit of its first row": (
        BYTE_ROWS, r"p < place \+ tile_rows && p < count", "p < place + 1 && p < count", DRIVER),
    "kernel: bytes forget the last codeword": (
        CANDIDATES, r"last = static_cast<uint32_t>\(cb\.K - Width\)", "last = static_cast<uint32_t>(cb.K - Width - 1)", DRIVER),
    "kernel: bytes score one codeword of a lane": (
        CANDIDATES, r"for \(int v = 1; v < Width; \+\+v\)", "for (int v = 1; v < 1; ++v)", DRIVER),
    "kernel: two lanes of four exchange codewords": (
        CANDIDATES, r"e, e, 0, 4, 1, 5, 2, 6, 3, 7", "e, e, 0, 1, 2, 3, 4, 5, 6, 7", DRIVER),
    "kernel: four lanes of two exchange codewords": (
        CANDIDATES, r"e, e, 0, 2, 4, 6, 1, 3, 5, 7", "e, e, 0, 1, 2, 3, 4, 5, 6, 7", DRIVER),
    "kernel: AVX-VNNI takes the lowest of half of the lanes": (
        AVX2, r"half = _mm_min_epi32\(half, _mm_shuffle_epi32\(half, 0x4e\)\);", "", DRIVER),
    "kernel: AVX-VNNI adds one product of two": (
        AVX2, r"vpdpwssd %2, %1, %0", "vpdpbusd %2, %1, %0", DRIVER),
    "kernel: few features take half of a group": (
        PRODUCTS, r"v < vectors; v \+= kHeld", "v < vectors - kHeld; v += kHeld", DRIVER),
    "kernel: tiles multiply two vectors of four by the same codewords": (
        AMX, r"tile_multiply<3, 5, 7>\(\);\n      for", "tile_multiply<3, 5, 6>();\n      for", DRIVER),
    "kernel: tiles of short rows multiply two vectors of four by the same codewords": (
        AMX, r"tile_multiply<3, 5, 7>\(\);\n      tile_store", "tile_multiply<3, 5, 6>();\n      tile_store", DRIVER),
    "kernel: tiles repeat the first part of a row": (
        BYTE_ROWS, r"bytes \+ i \* part, part\)", "bytes, part)", DRIVER),
    "kernel: the second tile has the first one's unit": (
        AMX, r"VQK_SPLAT\(ticks\[tile\]\)", "VQK_SPLAT(ticks[0])", DRIVER),
    "kernel: a cell's second score is that of its first group": (
        AMX, r"high = VQK_MIN_TICKS\(high, VQK_MAX_TICKS\(lowest, low\)\);", "", DRIVER),
    "kernel: the higher of two groups is forgotten": (
        AMX, r", high = VQK_MAX_TICKS\(a, b\);", ";", DRIVER),
    "kernel: two groups of a panel have one number": (
        AMX, r"next_tag = tag \+ 1", "next_tag = tag", DRIVER),
    "kernel: cells begin again with every panel": (
        AMX, r"p % kCellPanels == 0", "true", DRIVER),
    "kernel: the last rows of a group of short rows are not folded": (
        AMX, r"if \(groups > 1\) fold", "if (false) fold", DRIVER),
    "kernel: a vector of short rows is stored one place off": (
        AMX, r"now\.of\[0\]\[i - 1\]", "now.of[0][i]", DRIVER),
    "kernel: other groups of a cell are forgotten": (
        CANDIDATES, r"if \(other != nearest\) add", "if (false) add", DRIVER),
    "kernel: seconds of other cells are forgotten": (
        CANDIDATES, r"if \(Cells\) c = VQK_MIN_TICKS", "if (false) c = VQK_MIN_TICKS", DRIVER),
    "kernel: the lowest lane is one group off": (
        CANDIDATES, r"\(lowest & tags\) \* kTickLanes", "((lowest & tags) ^ 1) * kTickLanes", DRIVER),
    "kernel: other lanes of the lowest's vector are forgotten": (
        CANDIDATES, r"others = VQK_WITHIN\(low\[j - start\], limit\) & ~one", "others = 0 * one", DRIVER),
    "kernel: other groups of a lane are forgotten": (
        CANDIDATES, r"twice = VQK_WITHIN\(second\[j - start\], limit\)", "twice = 0", DRIVER),
    "kernel: bytes take one other lane": (
        CANDIDATES, r"while \(bits\);", "while (false);", DRIVER),
    "kernel: a lane that did not fall counts as scored": (
        CANDIDATES, r"skip\[i\] = static_cast<int>\(at \| ~mask\)", "skip[i] = at", DRIVER),
    "kernel: what was lowest is forgotten": (
        CANDIDATES, r"found\.lanes \+= falls & \(known != b\.settled\[j\]\)", "found.lanes += falls & (known == b.settled[j])", DRIVER),
    "kernel: later blocks keep the lowest lane alone": (
        CANDIDATES, r"b\.best\[j\] \+ 2 \* b\.eps\[j\]", "b.best[j]", DRIVER),
    "kernel: the lowest lane of later blocks is not scored": (
        CANDIDATES, r"count \+= \(b\.best\[j\] != b\.settled\[j\]\)", "count += 0 * (b.best[j] != b.settled[j])", DRIVER),
    "kernel: limits are in whole ticks": (
        BYTES, r"fine = kStepFeatures == 4 \? tags : 1", "fine = 1", DRIVER),
    "kernel: two codewords to a vector are taken in order": (
        CANDIDATES, r"2 \* \(v & 7\) \+ \(v >> 3\)", "v", DRIVER),
    "kernel: eight codewords of a lane of sixteen": (
        CANDIDATES, r"width == 16 \? score_neighbours\(cb, x, first \+ 8\) : ", "", DRIVER),
    "kernel: wide lanes forget the last codeword": (
        CANDIDATES, r"last = static_cast<uint32_t>\(cb\.K - width\)", "last = static_cast<uint32_t>(cb.K - width - 1)", DRIVER),
    "kernel: sums of eight vectors are of half of them": (
        BYTE_ROWS, r"half_of\(sums, false\) \+ half_of\(sums, true\)", "half_of(sums, false) + half_of(sums, false)", DRIVER),
    "kernel: nearly equal codewords are not compared": (
        BYTES, r", decision\.add\(b\.order\[place\], s\.tie_code\[j\]\);", ";", DRIVER),
    "kernel: nearly equal codewords of a lane are not compared": (
        CANDIDATES, r"VQK_NONZERO\(tie\) != 0", "false", DRIVER),
    "kernel: nearly equal codewords of a wide lane are not compared": (
        CANDIDATES, r"\(near &= near - 1\) != 0", "false", DRIVER),
    "kernel: rows with many ties lose some": (
        CANDIDATES, r"give_up\(\*s\.rows, s\.tie_place\[j\]\)", "s.rows->nearest[s.tie_place[j]] = -__builtin_inff()", DRIVER),
    "kernel: rows with many lanes lose some": (
        CANDIDATES, r"give_up\(\*s\.rows, s\.candidate_place\[j\]\)", "s.rows->limit[s.candidate_place[j]] = kNoTicks + 1", DRIVER),
    "kernel: a float32 distance is not certain": (
        BYTES, r"if \(doubtful\)", "if (false)", KERNEL),
    "kernel: losses are rounded to float32": (
        BYTES, r"L2 && hints\.rounded", "L2", KERNEL),
    "kernel: a worker's last task is lost": (
        "csrc/include/vqk/launch.h", r"tasks \* \(w \+ 1\) / workers;", "tasks * (w + 1) / workers - (w > 0);", KERNEL),
    "kernel: a kept codebook is compared in part": (
        CACHE, r"wanted\[i\]\.K \* D \* dtype_size\(dtype\)\) != 0", "4 * D) != 0", KERNEL),
    "kernel: a kept codebook serves every metric": (
        CACHE, r"metric != m \|\|", "", KERNEL),
    "kernel: a kept codebook is the caller's": (
        CACHE, r"sources\.push_back\(\{to, source\.K\}\)", "sources.push_back({source.data, source.K})", KERNEL),
}  # fmt: skip

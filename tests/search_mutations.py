"""Mutations of the search by bytes on the CPU and of codebooks kept between calls; tests/mutations.py makes them."""

BYTE_ROWS, BYTES = "csrc/cpu/nearest_codeword_byte_rows.h", "csrc/cpu/nearest_codeword_byte_search.h"
PRODUCTS = "csrc/cpu/nearest_codeword_bytes.h"
CANDIDATES, CACHE = "csrc/cpu/nearest_codeword_byte_candidates.h", "csrc/cpu/nearest_codeword_cache.cpp"
DRIVER, KERNEL = "tests/test_cpp.py", "tests/test_nearest_codeword.py"

MUTATIONS = {
    "kernel: bytes lose their error bound": (
        "csrc/include/vqk/error_bound.h", r"const double lost = z_error \* c_row \+", "const double lost = 0 * z_error + 0 *", DRIVER),
    "kernel: bytes trust a float32 score too far": (
        CANDIDATES, r"\* b\.ticks\[j\] \+ b\.eps\[j\], known", "* b.ticks[j], known", DRIVER),
    "kernel: the offset of bytes is not taken back": (
        BYTE_ROWS, r"offset = 128 \* static", "offset = 127 * static", DRIVER),
    "kernel: half norms of bytes are too large": (
        BYTE_ROWS, r"cb\.l2 \? 0\.5 \* squares", "cb.l2 ? 0.6 * squares", DRIVER),
    "kernel: a tile of bytes has the unit of its first row": (
        BYTE_ROWS, r"p < j \+ kTileRows && p < count", "p < j + 1 && p < count", DRIVER),
    "kernel: bytes forget the last codeword": (
        CANDIDATES, r"last_code = static_cast<uint32_t>\(cb\.K - 1\)", "last_code = static_cast<uint32_t>(cb.K - 2)", DRIVER),
    "kernel: bytes score one codeword of a lane": (
        CANDIDATES, r"const int width = cb\.byte_group, stride", "const int width = 1, stride", DRIVER),
    "kernel: few features take half of a group": (
        PRODUCTS, r"half < 2; \+\+half, start", "half < 1; ++half, start", DRIVER),
    "kernel: the lowest lane is one group off": (
        CANDIDATES, r"\(lowest & b\.tags\) \* kTickLanes", "((lowest & b.tags) ^ 1) * kTickLanes", DRIVER),
    "kernel: other lanes of the lowest's vector are forgotten": (
        CANDIDATES, r"lanes\[count\] = others \| twice << 16", "lanes[count] = twice << 16", DRIVER),
    "kernel: other groups of a lane are forgotten": (
        CANDIDATES, r"lanes\[count\] = others \| twice << 16", "lanes[count] = others", DRIVER),
    "kernel: bytes take one other lane": (
        CANDIDATES, r"while \(bits\);", "while (false);", DRIVER),
    "kernel: a lane that did not fall counts as scored": (
        CANDIDATES, r"scored\[i\] = falls \? at : -1", "scored[i] = at", DRIVER),
    "kernel: nearly equal codewords are not compared": (
        BYTES, r", decision\.add\(b\.order\[place\], s\.tie_code\[j\]\);", ";", DRIVER),
    "kernel: nearly equal codewords of a lane are not compared": (
        CANDIDATES, r"VQK_NONZERO\(tie\) != 0", "false", DRIVER),
    "kernel: rows with many ties lose some": (
        CANDIDATES, r"give_up\(\*s\.rows, s\.tie_place\[j\]\)", "s.rows->nearest[s.tie_place[j]] = -__builtin_inff()", DRIVER),
    "kernel: rows with many lanes lose some": (
        CANDIDATES, r"give_up\(\*s\.rows, s\.candidate_place\[j\]\)", "s.rows->limit[s.candidate_place[j]] = kNoTicks + 1", DRIVER),
    "kernel: a float32 distance is not certain": (
        BYTES, r"if \(doubtful\)", "if (false)", KERNEL),
    "kernel: losses are rounded to float32": (
        BYTES, r"L2 && hints\.rounded", "L2", KERNEL),
    "kernel: a kept codebook is compared in part": (
        CACHE, r"wanted\[i\]\.K \* D \* dtype_size\(dtype\)\) != 0", "4 * D) != 0", KERNEL),
    "kernel: a kept codebook serves every metric": (
        CACHE, r"metric != m \|\|", "", KERNEL),
    "kernel: a kept codebook is the caller's": (
        CACHE, r"sources\.push_back\(\{to, source\.K\}\)", "sources.push_back({source.data, source.K})", KERNEL),
}  # fmt: skip

"""Breaks csrc/cuda on purpose, one mutation at a time in a copy, and reports which emulated build notices.

    python tests/cuda_mutations.py [WORD ...]     all mutations, or those whose name contains a word

Of order: one barrier less, one wait for copies that allows a group more, one addition without an atomic. Of values: a
formula, a limit or a case of each operator is wrong (VALUES). One that nothing notices is either a hole in the cases or
not needed; exit code 1. By hand: it compiles once or twice for each.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cuda_harness
import torch
from test_cuda import short

# what is taken away: what stands there, what replaces it, the builds that should notice, the likelier one first
ORDER = {
    "barrier": (r"^( *)__sync(threads|warp)\(\);", r"\1;", ("thread", "plain")),
    "wait": (r"cp_async_wait<(.*?)>\(\)", r"cp_async_wait<(\1) + 1>()", ("plain", "thread")),
    "atomic": (r"atomic(?:Add|Or)\(([^;]*?), ([^,;]*)\);", r"(*(\1) += \2) - (\2);", ("thread", "plain")),
}

# file: {what is wrong: (what stands there, once, what replaces it)}
VALUES = {
    "codebook_usage.cu": {
        "codes of K and more are counted": ("k < 0 || k >= K", "k < 0"),
        "the last column is left out": ("n < N; n += step", "n < N - 1; n += step"),
        "one histogram counts": ("sum += bins[c * K + k]", "sum = bins[c * K + k]"),
        "one histogram is cleared": ("i < copies * K", "i < K"),
        "rows are alike": ("indices[s * N + n]", "indices[n]"),
        "without shared memory twice": ("counts + s * K + k, 1ull", "counts + s * K + k, 2ull"),
    },
    "codeword_sums.cu": {
        "codes of K and more are added": ("k < 0 || k >= K ?", "k < 0 ?"),
        "heads are alike": ("i / N * K +", "0 * K +"),
        "digits begin a warp late": ("if (w == warp) before += total;", ""),
        "the sort is not stable": ("seen[warp][digit] + below", "seen[warp][digit] + __popc(peers) - 1 - below"),
        "tiles of a digit overlap": ("row[tile] = before + sum - own", "row[tile] = sum - own"),
        "every pass sorts the lowest digit": ("shift = kBits * pass", "shift = 0 * pass"),
        "one pass too few": ("plan.codes > int64_t{1} << kBits * plan.passes", "plan.codes > int64_t{1} << 2 * kBits * plan.passes"),
        "a codeword begins at its second row": ("keys[middle] < k)", "keys[middle] <= k)"),
        "a piece begins too early": ("place - offsets[k] + kPiece - 1", "place - offsets[k]"),
        "a piece ends too early": ("begin + kPiece < last ? begin + kPiece : last", "begin + kPiece < last ? begin + kPiece - 1 : last"),
        "256 rows are two pieces": ("last - first <= kPiece", "last - first < kPiece"),
        "a lane is lost": (">= used) continue", "+ 1 >= used) continue"),
        "a count is off by one": ("counts[k] = last - first", "counts[k] = last - first + (last > first)"),
        "the second piece is the first": ("kPiece) + (piece > 0)) * D + d];", "kPiece) + (piece > 1)) * D + d];"),
    },
    "fsq.cu": {
        "a threshold is passed from above": ("if (value >= thresholds", "if (value > thresholds"),
        "a threshold is rounded to nearest": ("f < x ? std", "false ? std"),
        "NaN has an index": ("nan ? -1 : low * f.basis", "low * f.basis"),
        "a row with a NaN has an index": ("bad < 0 ? -1 : index", "index"),
        "digits without their basis": ("low * f.basis;", "low;"),
        "no shift": ("std::atanh(offset / half)}", "0.0}"),
        "many levels are rounded down": ("rint(", "floor("),
        "many levels have no end": ("level < f.levels ? static_cast<int>(level) : f.levels - 1", "static_cast<int>(level)"),
        "slope of tanh": ("* slopes[j] * sech * sech", "* slopes[j] * sech"),
        "slope overflows": ("exponential(u < 0 ? u : -u)", "exponential(u)"),
        "slope is not shifted": ("to_double(x.x[i])) + shifts[j]", "to_double(x.x[i]))"),
    },
    "estimator.cuh": {
        "reflection for rotation": ("estimator == Estimator::rotation ? 1 : -1", "-1"),
        "R for its transpose": ("? 2 * qgn - along", "? 2 * zgn - along"),
        "the part along q": ("-sign * gamma * along / nq", "gamma * along / nq"),
        "no plane of rotation": ("if (!(length2 >= 1e-6)) return straight;", ""),
        "lengths too far apart": ("gamma >= 1e-6 && gamma <= 1e6", "gamma > 0"),
    },
    "rotation_trick.cu": {
        "33 pieces in one a lane": ("pieces <= 32", "pieces <= 33"),
        "65 pieces in two a lane": ("pieces <= 64", "pieces <= 65"),
        "the last piece is not in the dots": ("if (lane + 32 * i < pieces) add", "if (lane + 32 * i < pieces - 1) add"),
        "straight-through is a copy of z": ("cudaMemcpyAsync(p.dz, p.grad", "cudaMemcpyAsync(p.dz, p.z"),
    },
    "residual_quantize_backward.cu": {
        "only the last level skips a row": ("skipped |= index[l] < 0", "skipped = index[l] < 0"),
        "an index of K is known": ("index[l] >= books.K[l]", "index[l] > books.K[l]"),
        "a skipped row is NaN": ("skipped ? 0.0 : nan", "false ? 0.0 : nan"),
        "heads are alike": ("(h * books.K[l] + index[l])", "index[l]"),
        "the last warp is not in the dots": ("w < kRowWarps; ++w) sum", "w < kRowWarps - 1; ++w) sum"),
        "one scale for all levels": ("const R s = scale[l];", "const R s = scale[0];"),
        "no commitment, level by level": ("+ s * q[p][i]);", ");"),
        "residual for its codeword": ("acc[p][i] += s * r[i];", "acc[p][i] += s * value;"),
        "level by level from the wrong side": ("w.apply(before, value", "w.apply(q[p][i], value"),
    },
    "trie_topk.cu": {
        "a sum is not scaled": ("sum *= exponential(top - origin);", ""),
        "-inf - -inf in a lane": ("higher == kLowest ? 0 : higher", "higher"),
        "-inf is a candidate": ("if (total == -static_cast<R>(INFINITY)) continue;", ""),
        "NaN by its bits": ("if (total != total) return ~bits_t<R>{0};", ""),
        "keys of negative totals": ("bits & kSign ? ~bits : bits | kSign", "bits | kSign"),
        "ties go to the highest token": ("place_list[j] < at", "place_list[j] > at"),
        "the k-th key is left out": ("at <= place)", "at < place)"),
        "keys above are not counted": ("need -= found[2];", ""),
        "one key too many": ("if (same <= need) break;", "if (same <= need + 1) break;"),
        "a beam's score is forgotten": ("beam.score + ((x", "0 * beam.score + ((x"),
        "token for state": ("state = edge_children[edge]", "state = edge_tokens[edge]"),
        "one beam's edges for all": ("candidates.beams[beam].first", "candidates.beams[0].first"),
    },
    "search.cuh": {
        "distances are fused": ("__dadd_rn(total, __dmul_rn(difference, difference))", "__fma_rn(difference, difference, total)"),
        "dot products are fused": ("__dadd_rn(total, __dmul_rn(a, b))", "__fma_rn(a, b, total)"),
        "ties go to the highest index": ("value == best && index < best_index", "value == best && index > best_index"),
        "a scan takes codewords that are not finite": ("usable = usable && finite(c);", ""),
        "a scan takes rows that are not finite": ("hopeless = hopeless || !finite(to_double(x[d]));", ";"),
        "a scan takes sums that are NaN": ("hopeless = hopeless || total != total;\n    keep_lower", "keep_lower"),
        "rows of zeros are divided": ("divisor == 0 ? 0.0 : ", ""),
        "a quotient is not corrected": ("q = __fma_rn(__fma_rn(-q, length, a), reciprocal, q);\n  return", "return"),
    },
    "coarse.cuh": {
        "no error bound": ("static_cast<float>(2 * eps *", "static_cast<float>(0 * eps *"),
        "half an error bound": ("static_cast<float>(2 * eps *", "static_cast<float>(0.02 * eps *"),
        "no bound is needed at unlike scales": ("bounded ? static_cast<float>(2", "true ? static_cast<float>(2"),
        "codewords that are not finite have a norm": ("usable ? static_cast<float>(0.5 * square) : HUGE_VALF", "static_cast<float>(0.5 * square)"),
        "a ragged codebook ends in zeros that win": ("largest_magnitude(x, D, k < K) >= 0", "(k >= K || largest_magnitude(x, D, k < K) >= 0)"),
        "unlimited rows take codewords that are not finite": ("h < HUGE_VALF ? h : NAN", "h"),
        "the second lowest of others is lost": ("fminf(fminf(second, other.second), theirs", "fminf(second, theirs"),
        "a thread forgets its second lowest": ("lowest[r].second = fminf(lowest[r].second, fmaxf(lowest[r].best, score));\n        if (score < lowest[r].best) lowest[r].index = first_code", "if (score < lowest[r].best) lowest[r].index = first_code"),
        "the last step of features is left out": ("step * 32 >= left", "step * 32 >= left - 32"),
        "a step too many": ("step * 32 >= left", "step * 32 > left"),
        "survivors of the upper half": ("4 * word + i / 2", "i / 2"),
        "sums that are NaN": ("hopeless = hopeless || total != total;", ""),
        "heads share half norms": ("half_norms[to] = usable", "half_norms[k] = usable"),
        "long rows come once": ("if (resident) fetch_rows = false;", "fetch_rows = false;"),
    },
    "few.cuh": {
        "index within the tile": ("lowest[r].index = tile * kTile + c", "lowest[r].index = c"),
        "the second lowest is forgotten": ("lowest[r].second = fminf(lowest[r].second, fmaxf(lowest[r].best, score));", ""),
        "a split lacks its last tile": ("min(begin + share, tiles)", "min(begin + share - (share > 1), tiles)"),
        "heads are alike": ("codebook.copy) + code * kFeatures", "codebook.copy) + (code - h * codebook.padded_K) * kFeatures"),
        "listed rows take codewords that are not finite": ("<= limit && half < HUGE_VALF)", "<= limit)"),
        "listed rows have no limit": ("if (__fmaf_rn(-ratio, dot, half) <= limit", "if (__fmaf_rn(-ratio, dot, half) < limit - 1e-3f * fabsf(limit)"),
        "listed sums that are NaN": ("hopeless ? -1 : choice.index", "choice.index"),
    },
    "nearest_codeword.cu": {
        "a split lacks its last tile": ("min(tile + share, tiles)", "min(tile + share - (share > 1), tiles)"),
        "the last split is left out": ("split < splits; ++split", "split < splits - 1; ++split"),
        "the other half of the codewords is left out": ("lowest[r].join(other[place.first_row + 8 * r]);", ""),
        "the lane beside is left out": ("lowest[r].join(lowest[r].from_lane(1));", ""),
        "listed rows are limited to the best": ("limits[slot] = found ? lowest.best + margin : HUGE_VALF", "limits[slot] = found ? lowest.best : HUGE_VALF"),
        "a masked row has a distance": ("masked ? 0.0 : found", "found"),
        "cosine is not 1 - cos": ("found.value + 1 : found.value", "found.value : found.value"),
        "heads share a codebook": ("codebook[(their_h * K + code) * D", "codebook[code * D"),
        "compare: sums that are NaN": ("choice.hopeless ? -1 : choice.index", "choice.index"),
        "compare: the next head's list": ("limits[h * N + first + threadIdx.x]", "limits[first + threadIdx.x]"),
        "fast takes no bound for a bound": ("margin < HUGE_VALF;", "true;"),
    },
    "residual_quantize.cu": {
        "a codeword is hidden": ("second < HUGE_VALF && second - best <= margin", "false"),
        "lanes' best are not compared": ("lane.best - best <= margin) ++near", "lane.best - best <= 0) ++near"),
        "rows scored again are limited to the best": ("hidden ? best + margin", "hidden ? best"),
        "sums that are NaN": ("chosen[row] = choice.hopeless ? -1 : choice.index", "chosen[row] = choice.index"),
        "valid rows: at least none": ("rows > 1 ? rows : 1", "rows"),
        "rows that end early are in the losses": ("chosen[i] >= 0 ? squares", "true ? squares"),
        "a residual that overflows": ("largest_magnitude(residual + (base + i) * D, D, chosen[i] >= 0) >= 0", "chosen[i] >= 0"),
        "scan: a residual that overflows": ("finite = finite && fabs(", "finite = finite || fabs("),
        "an earlier codebook of the same size": ("p.codebooks[l] == p.codebooks[l - 1] && p.K", "p.K"),
        "a part of a codebook": ("if (l > 0 && p.codebooks[l] == p.codebooks[l - 1] && p.K[l] == p.K[l - 1]) return", "if (l > 0 && p.codebooks[l] == p.codebooks[l - 1]) return"),
        "a shared codebook is not copied": ("if (l == 0 || p.codebooks[l] != p.codebooks[l - 1] || p.K[l] != p.K[l - 1]) prepare", "if (l == 0 || p.codebooks[l] != p.codebooks[0]) prepare"),
        "levels set twice": ("w.levels + l - count + 1, levels", "w.levels, levels"),
        "heads share codewords": ("(levels[l].codebook) + h * levels[l].K * D;", "(levels[l].codebook);"),
        "quantized: heads share codewords": ("codebook[(h * levels[l].K + k) * D + d]", "codebook[k * D + d]"),
        "the last block's rows": ("const bool wanted = i < here && ", "const bool wanted = "),
    },
}  # fmt: skip


def mutants(file: Path) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(what is changed and in which line, the changed text, the builds that should notice)"""
    text = file.read_text()
    for name, (pattern, replacement, builds) in ORDER.items():
        for match in re.finditer(pattern, text, re.M):
            line = text.count("\n", 0, match.start()) + 1
            changed = text[: match.start()] + match.expand(replacement) + text[match.end() :]
            yield f"{name} at line {line}", changed, builds
    for name, (stands, replacement) in VALUES.get(file.name, {}).items():
        assert text.count(stands) == 1, f"{file.name}: {stands!r} stands there {text.count(stands)} times"
        yield name, text.replace(stands, replacement), ("plain",)


def users() -> dict[Path, list[str]]:
    """The programs that each source is part of."""
    folder, out = cuda_harness.ROOT / "csrc/cuda", {}
    for name in cuda_harness.programs():
        waiting, seen = [f"{name}.cu"], set()
        while waiting:
            file = waiting.pop()
            if file not in seen:
                seen.add(file)
                out.setdefault(folder / file, []).append(name)
                waiting += re.findall(r'^#include "(\w+\.cuh)"', (folder / file).read_text(), re.M)
    return {file: programs for file, programs in sorted(out.items()) if file.name != "ptx.cuh"}


def noticed(program: str, builds: tuple[str, ...], place: Path) -> str:
    """What the first build says that notices something, or nothing; of float32 first."""
    for kind in builds:
        if said := cuda_harness.build([(program, kind)], place, place / "cuda"):
            return f"{kind}: does not compile: {said[-400:]}"
        for dtype in ("float32", ""):
            if wrong := cuda_harness.check(program, kind, dtype, folder=place).wrong:
                return f"{kind}: {short(wrong[0])}"
    return ""


def main(words: list[str]) -> int:
    count = missed = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(cuda_harness.ROOT / "csrc/cuda", place / "cuda")
        for source, programs in users().items():
            for what, text, builds in mutants(source):
                name = f"{source.name}: {what}"
                if words and not any(word in name for word in words):
                    continue
                (place / "cuda" / source.name).write_text(text)
                said = next(filter(None, (noticed(program, builds, place) for program in programs)), "")
                count, missed = count + 1, missed + (not said or "does not compile" in said)
                print(f"{name:70} {said or 'NOT NOTICED'}", flush=True)
                (place / "cuda" / source.name).write_text(source.read_text())
    print(f"{count} mutations, {missed} not noticed")
    return int(missed > 0 or count == 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(cuda_harness.missing() or main(sys.argv[1:]))

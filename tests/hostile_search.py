"""Searches that are hard to decide, for every emulated backend."""

import torch


def hostile_search(dtype) -> dict[str, list]:
    """Rows and codewords that are hard to decide, large enough for the kernels with tensor cores: ties, duplicates,
    rows in the middle of two codewords, unlike scales, NaN and infinity."""
    generator = torch.Generator().manual_seed(41)
    codebook = torch.randint(-2, 3, (1, 140, 32), generator=generator).to(torch.float64)
    codebook[0, 100:140] = codebook[0, 20:60]
    codebook[0, 60:90] = torch.randn(30, 32, generator=generator, dtype=torch.float64)
    z = torch.randn(1, 75, 32, generator=generator, dtype=torch.float64)
    z[0, :24] = codebook[0, 40:64]
    z[0, 24:40] = (codebook[0, 50:66] + codebook[0, 20:36]) / 2
    z[0, 40:44] *= 2.0 ** torch.tensor([12.0, -12.0, 6.0, -20.0])[:, None]
    z[0, 44, 3], z[0, 45, 31], codebook[0, 5, 0] = float("nan"), float("inf"), float("nan")
    z, codebook = z.to(dtype), codebook.to(dtype)
    mask = torch.rand(1, 75, generator=generator) < 0.9
    second = torch.randn(1, 40, 32, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "nearest_codeword": [
            ("hostile l2", (z, codebook, mask, 0, True)),
            ("hostile cosine", (z, codebook, None, 1, True)),
        ],
        "residual_quantize": [("hostile", (z, [codebook.nan_to_num(1.0), second], mask, 0))],
    }

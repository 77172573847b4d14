"""Two processes train one codebook: equal on both, and equal to one process with the joined batch."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vqkernels import ResidualVQ, VectorQuantize

DIM, K, STEPS = 8, 16, 4

BUILDS = {
    "ema": lambda: VectorQuantize(DIM, K),
    "cosine": lambda: VectorQuantize(DIM, K, use_cosine_sim=True),
    "residual": lambda: ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3),
    "shared": lambda: ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3, shared_codebook=True),
    "k-means": lambda: VectorQuantize(DIM, K, kmeans_init=True, threshold_ema_dead_code=3.3),
    "dropout": lambda: ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=4, quantize_dropout=True),
    "not synced": lambda: VectorQuantize(DIM, K, sync_codebook=False),
}


def batches():
    generator = torch.Generator().manual_seed(9)
    return torch.randn(STEPS, 50, DIM, generator=generator)


def train(rank, world, folder):
    torch.set_num_threads(1)
    result = {}
    # built before the process group exists: whether to share is decided when it matters
    torch.manual_seed(0)
    layers = {name: build() for name, build in BUILDS.items()}
    if world > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    torch.manual_seed(rank)
    for name, layer in layers.items():
        for batch in batches():
            # unequal shares; together the rows are those of the one process
            rows = batch if world == 1 else batch[:20] if rank == 0 else batch[20:]
            out = layer(rows[None])
        result[name] = {key: value.clone() for key, value in layer.state_dict().items()}
        if name == "dropout":
            result[name]["levels used"] = (out[1][0, 0] >= 0).clone()
    torch.save(result, os.path.join(folder, f"{world}-{rank}.pt"))
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo backend")
def test_two_processes_share_one_codebook(tmp_path):
    train(0, 1, str(tmp_path))
    mp.spawn(train, (2, str(tmp_path)), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name in BUILDS:
        for key in one[name]:
            a, b = first[name][key], second[name][key]
            if name == "not synced":
                assert key.endswith("initted") or not torch.equal(a, b), (name, key)
                continue
            assert torch.equal(a, b), f"{name}: {key} differs between the processes"
            if name not in ("k-means", "dropout"):  # those two draw at random
                torch.testing.assert_close(a, one[name][key], rtol=1e-5, atol=1e-6)
    # no whole number of rows brings the running count back to 3.3, so these were revived in the last step
    revived = first["k-means"]["_codebook.cluster_size"][0] == torch.tensor(3.3)
    assert revived.any()
    rows = batches()[-1]
    assert (first["k-means"]["_codebook.embed"][0, revived][:, None] == rows).all(-1).any(-1).all()

"""Processes that train one codebook together, over gloo: what each has, against one process with the joined batch."""

import copy
import datetime
import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from vqkernels import ResidualVQ, VectorQuantize

DIM, K, STEPS, ROWS = 8, 16, 4, 60
SHARES = {1: [slice(0, ROWS)], 2: [slice(0, 25), slice(25, ROWS)], 3: [slice(0, 10), slice(10, 10), slice(10, ROWS)]}

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo backend"
)

BUILDS = {
    "ema": lambda: VectorQuantize(DIM, K),
    "cosine": lambda: VectorQuantize(DIM, K, use_cosine_sim=True),
    "heads": lambda: VectorQuantize(DIM, K, heads=2, codebook_dim=4, separate_codebook_per_head=True),
    "revival": lambda: VectorQuantize(DIM, K, threshold_ema_dead_code=3.3),
    "k-means": lambda: VectorQuantize(DIM, K, kmeans_init=True, threshold_ema_dead_code=3.3),
    "k-means, one process's rows": lambda: VectorQuantize(DIM, K, kmeans_init=True, sync_kmeans=False),
    "affine": lambda: VectorQuantize(DIM, K, affine_param=True, sync_affine_param=True),
    "residual": lambda: ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3, threshold_ema_dead_code=2.3),
    "shared": lambda: ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=3, shared_codebook=True),
    "shared, revival": lambda: ResidualVQ(
        dim=DIM, codebook_size=K, num_quantizers=3, shared_codebook=True, threshold_ema_dead_code=2.3
    ),
    "dropout": lambda: ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=4, quantize_dropout=True),
    "not synced": lambda: VectorQuantize(DIM, K, sync_codebook=False),
}


def batches():
    return torch.randn(STEPS, ROWS, DIM, generator=torch.Generator().manual_seed(9))


def in_processes(world: int, work, folder, *args):
    """work(rank, world, *args) in every one of `world` gloo processes -> their results, by rank."""
    if world == 1:
        return [work(0, 1, *args)]
    multiprocessing.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", __name__])  # once for all
    mp.start_processes(_process, (world, str(folder), work, args), nprocs=world, start_method="forkserver")
    return [torch.load(os.path.join(folder, f"{world}-{rank}.pt"), weights_only=False) for rank in range(world)]


def _process(rank, world, folder, work, args):
    torch.set_num_threads(1)
    result = work(rank, world, *args, join=lambda: join(rank, world, folder, work.__name__))
    torch.save(result, os.path.join(folder, f"{world}-{rank}.pt"))
    dist.destroy_process_group()


def join(rank, world, folder, name):
    store = f"file://{folder}/{name}-{world}"
    patience = datetime.timedelta(seconds=60)  # a process that waits for another in vain fails instead of hanging
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)


def train(rank, world, deterministic, built_first, join=lambda: None):
    torch.use_deterministic_algorithms(deterministic)
    if not built_first:
        join()
    torch.manual_seed(0)
    layers = {name: build() for name, build in BUILDS.items()}
    if built_first:
        join()
    result = {}
    for name, layer in layers.items():
        torch.manual_seed(rank)
        for batch in batches():
            out = layer(batch[SHARES[world][rank]][None])
        result[name] = {key: value.clone() for key, value in layer.state_dict().items()}
        if name == "dropout" and out[1].numel():
            result[name]["levels"] = (out[1][0, 0] >= 0).sum()
    return result


@pytest.mark.parametrize(
    ("world", "deterministic", "built_first"), [(2, True, True), (2, False, True), (3, True, False)]
)
def test_processes_share_one_codebook(tmp_path, world, deterministic, built_first):
    """Three processes: one of them never has a row. Two: built before the process group exists."""
    (one,) = in_processes(1, train, tmp_path, deterministic, built_first)
    ranks = in_processes(world, train, tmp_path, deterministic, built_first)
    torch.use_deterministic_algorithms(True)
    for name in BUILDS:
        if name == "not synced":
            assert not torch.equal(ranks[0][name]["_codebook.embed"], ranks[1][name]["_codebook.embed"])
            continue
        for key, expected in one[name].items():
            for other in ranks[1:]:
                if key in other[name]:  # "levels" only where there are rows
                    assert torch.equal(ranks[0][name][key], other[name][key]), f"{name}: {key} differs"
            if name == "k-means, one process's rows":
                continue  # by design not the joined batch
            if deterministic:
                assert torch.equal(ranks[0][name][key], expected), f"{name}: {key} is not that of one process"
            elif name not in ("k-means", "revival", "residual", "shared, revival"):  # revived rows are drawn apart
                torch.testing.assert_close(ranks[0][name][key], expected, rtol=1e-5, atol=1e-6)
    revived = ranks[0]["revival"]["_codebook.cluster_size"][0] == torch.tensor(3.3)  # no count of rows comes to that
    assert revived.any()
    codes = ranks[0]["revival"]["_codebook.embed"][0, revived]
    assert (codes[:, None] == batches()[-1]).all(-1).any(-1).all(), "a revived codeword is a row of some process"


def degenerate(rank, world, join=lambda: None):
    join()
    torch.manual_seed(0)
    layers = {
        "plain": VectorQuantize(DIM, K, kmeans_init=True, threshold_ema_dead_code=2),
        "residual": ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=2, threshold_ema_dead_code=2),
    }
    x = torch.randn(1, 40, DIM)
    last = rank == world - 1
    for layer in layers.values():
        layer(x, mask=torch.full((1, 40), not last))  # all masked on one process
        layer(x[:, :0] if last else x)  # no rows on one process
        layer(torch.full_like(x, torch.nan) if last else x)
        before = copy.deepcopy(layer.state_dict())
        layer(x, mask=torch.zeros(1, 40, dtype=torch.bool))  # all masked everywhere
        for key, value in layer.state_dict().items():
            assert torch.equal(value, before[key]), key
    return {name: layer.state_dict() for name, layer in layers.items()}


@pytest.mark.parametrize("world", [2, 3])
def test_a_process_without_rows_does_not_hang(tmp_path, world):
    ranks = in_processes(world, degenerate, tmp_path)
    for name, state in ranks[0].items():
        for key, value in state.items():
            assert value.isfinite().all(), (name, key)
            assert all(torch.equal(value, other[name][key]) for other in ranks[1:]), (name, key)


def learn(rank, world, build, wrap, join=lambda: None):
    """Three steps of SGD on a learnable codebook; gradients are averaged over processes with equal shares."""
    join()
    torch.manual_seed(0)
    layer = build()
    module = layer
    if world > 1 and wrap == "ddp":
        module = DistributedDataParallel(layer)
    elif world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    share = ROWS // world
    for batch in batches():
        rows = batch[rank * share : (rank + 1) * share]
        quantized, _, loss = module(rows[None])
        optimizer.zero_grad()
        ((quantized - rows).square().mean() + loss.sum()).backward()
        optimizer.step()
    gather = (lambda t: t.full_tensor()) if world > 1 and wrap == "fsdp" else (lambda t: t)
    return {name: gather(p.detach()) for name, p in layer.named_parameters()} | dict(layer.named_buffers())


def learnable():
    return VectorQuantize(DIM, K, codebook_dim=4, learnable_codebook=True, ema_update=False)


def projected():
    return ResidualVQ(dim=DIM, codebook_size=K, num_quantizers=2, codebook_dim=4)


@pytest.mark.parametrize("build", [learnable, projected])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_data_parallel_training(tmp_path, wrap, build):
    (one,) = in_processes(1, learn, tmp_path, build, wrap)
    first, second = in_processes(2, learn, tmp_path, build, wrap)
    assert set(first) == set(one)
    for key, expected in one.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], expected, rtol=1e-4, atol=1e-6, msg=key)

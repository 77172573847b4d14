"""The CUDA kernels on the CPU: every operator's launcher with the registry's inputs in three builds, against the reference;
and small kernels with one bug each, which must be found."""

import re
from concurrent.futures import ThreadPoolExecutor

import cuda_harness
import pytest
import torch
from cuda_harness import BUILDS, Case

if reason := cuda_harness.missing():
    pytest.skip(reason, allow_module_level=True)

PAIRS = [(program, kind) for program in cuda_harness.programs() for kind in BUILDS]
printed: list[str] = []


def _threads(job, items):
    """{item: future}; two at a time, the programs run outside this process."""
    pool = ThreadPoolExecutor(2)
    futures = {item: pool.submit(job, *item) for item in items}
    pool.shutdown(wait=False)
    return futures


@pytest.fixture(scope="module")
def built():
    """What the compiler said if it refused something; every program in one go."""
    planted = cuda_harness.build([("planted", kind) for kind in BUILDS], kernels=cuda_harness.SOURCES)
    return cuda_harness.build(PAIRS) + planted


@pytest.fixture(scope="module")
def results(request, built):
    """{(program, build): future}, of those that were asked for."""
    asked = [
        item for item in request.session.items if item.path == request.path and item.name.startswith("test_kernels[")
    ]
    wanted = {(item.callspec.params["program"], item.callspec.params["kind"]) for item in asked}
    return _threads(cuda_harness.check, sorted(wanted, key=PAIRS.index))


@pytest.mark.parametrize("program, kind", PAIRS)
def test_kernels(program, kind, built, results):
    assert built == ""
    result = results[program, kind].result()
    printed.append(str(result))
    assert not result.wrong, "\n".join(result.wrong)
    assert result.cases > 4
    if kind == "plain":
        assert not result.unused, "no case launches these: add one to tests/cuda_cases.py"


def test_every_cuda_source_is_here():
    from vqkernels.registry import SPECS

    sources = {path.stem for path in (cuda_harness.ROOT / "csrc/cuda").glob("*.cu")}
    assert set(cuda_harness.programs()) == sources
    tested = {op for ops in cuda_harness.programs().values() for op in ops}
    assert tested == {spec.name for spec in SPECS.values() if "cuda" in spec.compiled}


# -------------------------------------------------------------------------------------------------------- planted bugs

# what is wrong: the build that must find it, and what it says (the others may find it as well)
BUGS = {
    "nothing": (None, ""),
    "no barrier before a tile is filled again": ("thread", "data race"),
    "rows beyond the end are read": ("address", "heap-buffer-overflow"),
    "index beyond a row of shared memory": ("address", "out of bounds"),
    "return before a shuffle of all lanes": ("plain", "__shfl_xor_sync waits for lane .*, which has ended"),
    "no barrier before the next copy into a stage": ("thread", "data race"),
    "rows of a stage are misaligned": ("plain", "no multiple of 16"),
    "waits for one group of copies too few": ("plain", "wrong result|depends on the order"),
    "no barrier after bins are set to zero": ("thread", "data race"),
    "bins in shared memory without atomics": ("thread", "data race"),
    "counts in global memory without atomics": ("thread", "data race"),
    "barriers in two branches": ("plain", "__syncthreads is divergent"),
    "more shared memory than a block may have": ("plain", "more is more than the device has left"),
}
SHORT = (
    *("data race", "heap-buffer-overflow", "out of bounds", "waits for lane", "multiple of 16", "warp divergence"),
    *("barrier divergence", "divergent", "depends on the order", "uninitialised", "race", "the device has"),
    *("heap-use-after-free", "runtime error"),
)


def planted(number: int) -> Case:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(70, 64, generator=generator)
    half, codes = x.bfloat16(), torch.randint(0, 9, (280,), generator=generator, dtype=torch.int32)
    outputs = torch.empty(70), torch.empty(70, 8), torch.empty(9, dtype=torch.int32)
    return Case("planted", f"bug {number}", (number, x, half, codes), outputs, seed=4, runs=4)


def verdict(case: Case, wrong: str, outputs) -> str:
    """What was found, or nothing."""
    if wrong:
        return wrong
    _, x, half, codes = case.args
    wanted = x.sum(1), half.float() @ half[:8].float().T, codes.bincount(minlength=9)
    right = [torch.allclose(got.float(), want.float(), atol=1e-4) for got, want in zip(outputs, wanted)]
    return "" if all(right) else "wrong result"


@pytest.fixture(scope="module")
def found(built):
    """{(bug, build): what was found}"""

    def run(number, kind):
        case = planted(number)
        said, answers, _ = cuda_harness.execute(cuda_harness.FOLDER / kind / "planted", [case], kind, f"{number}")
        return verdict(case, said, None) if said else verdict(case, *answers[0])

    pairs = [(number, kind) for number in range(len(BUGS)) for kind in BUILDS]
    futures = _threads(run, pairs)
    table = {pair: future.result() for pair, future in futures.items()}
    printed.append("planted bug                                   " + "".join(f"{kind:24}" for kind in BUILDS))
    for number, name in enumerate(BUGS):
        printed.append(f"{name:46}" + "".join(f"{short(table[number, kind]):24}" for kind in BUILDS))
    return table


def short(said: str) -> str:
    return next((word for word in SHORT if word in said), said.split("\n")[-1][:22] or "-")


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs(name, found):
    number, (kind, message) = list(BUGS).index(name), BUGS[name]
    if kind is None:
        assert not any(found[number, kind] for kind in BUILDS)
    else:
        assert re.search(message, found[number, kind]), found[number, kind] or "nothing was found"


def test_no_build_is_redundant(found):
    """Some bug is found by this one alone."""
    for alone in ("address", "thread"):
        others = [kind for kind in BUILDS if kind != alone]
        assert any(found[n, alone] and not any(found[n, kind] for kind in others) for n in range(len(BUGS))), alone

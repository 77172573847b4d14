"""Trains real projects that depend on vector-quantize-pytorch, their source unchanged: with that package, and with
``vqkernels.compat`` in its place; compares losses, codes, reconstructions and checkpoints.

    python tests/downstream.py [WORD ...]     all cases, or those whose name contains a word

Projects and the packages that they need are fetched with pip into build/downstream, never kept here. A case is held to the same numbers,
or, where it uses something that differs on purpose (docs/migrating.md), to a loss that is as good.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from incumbent_suite import PACKAGE, Alias
from torch import Tensor, nn

FOLDER = Path(__file__).parents[1] / "build" / "downstream"
# What the projects import beside this project's own environment. Without dependencies: pip would bring another torch.
FETCHED = """
    titok-pytorch==0.0.5 meshgpt-pytorch==1.8.1 audiolm-pytorch==2.4.0
    accelerate aiohappyeyeballs aiohttp aiosignal attrs beartype certifi charset-normalizer
    classifier-free-guidance-pytorch einops einx ema-pytorch encodec environs frozendict frozenlist ftfy
    gateloop-transformer hyper-connections jaxtyping local-attention loguru marshmallow multidict propcache
    python-dotenv pytorch-custom-utils pytorch-warmup requests rotary-embedding-torch sentencepiece
    taylor-series-linear-attention torch-einops-utils torch-geometric torchaudio urllib3 vector-quantize-pytorch==1.32.0
    wadler-lindig wcwidth x-transformers xxhash yarl
""".split()
# imported by a project for parts that no case uses: text and speech encoders with downloaded weights, a log server
UNUSED = ("open_clip", "fairseq", "wandb")
STEPS, SEED = 20, 5
# the largest difference of a loss that counts as rounding: 20 steps of Adam multiply that of the first
FIRST_STEP, LAST_STEP = 1e-5, 1e-3
HEAD = (
    "| case | loss, the package | loss, vqkernels | difference, first step | largest | codes equal at the end "
    "| what they decode to differs by | codes equal from the package's checkpoint | differs on purpose |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Case:
    """A model of a project, small, as its README builds and trains it.

    ``batch``, called with the number of a step, gives the model's arguments; ``codes`` and ``decode`` are the project's
    own functions for tokens and back. ``differs``: what makes the numbers differ on purpose, if anything does.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], dict]
    codes: Callable[[nn.Module, dict], Tensor]
    decode: Callable[[nn.Module, Tensor], Tensor]
    differs: str = ""


def titok(differs: str = "", **options) -> Case:
    def build():
        from titok_pytorch import TiTokTokenizer

        return TiTokTokenizer(
            dim=64, image_size=32, patch_size=8, num_latent_tokens=16, enc_depth=1, dec_depth=1, codebook_size=128,
            vq_kwargs=options,
        )  # fmt: skip

    return Case(
        build,
        lambda step: {"images": smooth(8, 3, 32, 32, seed=step)},
        lambda model, batch: model.tokenize(batch["images"]),
        lambda model, codes: model.codebook_ids_to_images(codes),
        differs,
    )


def meshgpt(differs: str = "", covering: bool = True, **options) -> Case:
    def build():
        from meshgpt_pytorch import MeshAutoencoder

        return MeshAutoencoder(
            num_discrete_coors=32, dim_coor_embed=8, dim_area_embed=4, dim_normal_embed=4, dim_angle_embed=4,
            encoder_dims_through_depth=(16, 32), decoder_dims_through_depth=(32, 32), dim_codebook=24,
            codebook_size=64, **options,
        )  # fmt: skip

    def batch(step):
        torch.manual_seed(step)
        faces = torch.randint(0, 40, (4, 30, 3))
        if covering:
            faces[:, :14].flatten(1)[:, :40] = torch.rand(4, 40).argsort(-1)
        faces[1, 20:] = -1  # the second mesh has fewer faces
        return {"vertices": torch.rand(4, 40, 3) * 2 - 1, "faces": faces}

    return Case(
        build,
        batch,
        lambda model, batch: model.tokenize(**batch),
        lambda model, codes: model.decode_from_codes_to_faces(codes)[0],
        differs,
    )


def soundstream(differs: str = "", **options) -> Case:
    def build():
        from audiolm_pytorch import SoundStream

        return SoundStream(
            channels=4, strides=(2, 4), channel_mults=(2, 4), codebook_dim=32, attn_dim_head=8, attn_heads=2,
            rq_num_quantizers=4, rq_groups=2, discr_multi_scales=(1,), complex_stft_discr_kwargs={"channels": 4},
            adversarial_loss_weight=0, **options,  # nobody trains the discriminators here
        )  # fmt: skip

    return Case(
        build,
        lambda step: {"x": smooth(4, 2048, seed=step)},
        lambda model, batch: model.tokenize(batch["x"]),
        lambda model, codes: model.decode(model.rq.get_output_from_indices(codes)),
        differs,
    )


START = "k-means start and revival"
PLAIN = {"kmeans_init": False, "threshold_ema_dead_code": 0}
CASES = {
    "titok": titok(),
    "titok, cosine": titok(use_cosine_sim=True),
    "titok, k-means and revival": titok(START, kmeans_init=True, threshold_ema_dead_code=2),
    "meshgpt": meshgpt("LFQ with a mask"),
    "meshgpt, residual VQ": meshgpt(use_residual_lfq=False, rvq_kwargs=PLAIN),
    "meshgpt, residual VQ, loose vertices": meshgpt(
        "zero vectors", covering=False, use_residual_lfq=False, rvq_kwargs=PLAIN
    ),
    "meshgpt, residual VQ, k-means and revival": meshgpt(START, use_residual_lfq=False),
    "soundstream": soundstream(START, codebook_size=64),
    "soundstream, LFQ": soundstream(codebook_size=64, use_lookup_free_quantizer=True),
    "soundstream, FSQ": soundstream(finite_scalar_quantizer_levels=[8, 5, 5, 3], use_finite_scalar_quantizer=True),
}


def smooth(*shape: int, seed: int) -> Tensor:
    """Noise without its high frequencies, in [-1, 1]."""
    torch.manual_seed(seed)
    x = torch.randn(shape)
    for dim in range(1, len(shape)):
        x = sum(x.roll(shift, dim) for shift in range(4)) if shape[dim] > 3 else x
    return x / x.abs().max()


def train(case: Case, ours: bool, other: dict | None) -> dict:
    """One run in this process, which has imported neither library yet; ``other``: the run with the other one."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(FOLDER))
    for name in UNUSED:
        sys.modules[name] = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader=None))
    if ours:
        sys.meta_path.insert(0, Alias())
    torch.manual_seed(SEED)
    model = case.build()
    homes = {type(m).__module__.split(".")[0] for m in model.modules()} & {PACKAGE, "vqkernels"}
    assert homes == {"vqkernels" if ours else PACKAGE}, homes
    run = {"start": {key: value.clone() for key, value in model.state_dict().items()}, "losses": [], "codes": []}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    held_out = case.batch(10_000)
    for step in range(STEPS):
        torch.manual_seed(SEED + step)
        loss = model.train()(**case.batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run["losses"].append(loss.item())
        if step in (0, STEPS - 1):
            run["codes"].append(case.codes(model.eval(), held_out))
    with torch.no_grad():
        run["decoded"] = case.decode(model, run["codes"][-1])
        run["state"] = {key: value.clone() for key, value in model.state_dict().items()}
        if other is not None:
            model.load_state_dict(other["state"])
            run["other's codes"] = case.codes(model.eval(), held_out)
            run["other's decoded"] = case.decode(model, other["codes"][-1])
    return run


def compare(name: str, theirs: dict, ours: dict) -> list[str]:
    """Prints a row; returns what is wrong."""
    wrong, differs = [], CASES[name].differs

    def check(right: bool, what: str):
        if not right:
            wrong.append(f"{name}: {what}")

    for which in ("start", "state"):
        a, b = ([(key, t.shape, t.dtype) for key, t in run[which].items()] for run in (theirs, ours))
        check(a == b, f"keys, shapes or dtypes differ: {set(a) ^ set(b)}")
    check(all(torch.equal(t, ours["start"][key]) for key, t in theirs["start"].items()), "initial weights differ")
    check(gap(theirs["decoded"], ours["other's decoded"]) < 1e-4, "the package's checkpoint and codes decode otherwise")
    moved = agreement(theirs["codes"][-1], ours["other's codes"])
    check(moved > 0.98, f"with the package's checkpoint {moved:.2%} of the codes agree")
    losses = [abs(a - b) / abs(a) for a, b in zip(theirs["losses"], ours["losses"], strict=True)]
    codes = [agreement(a, b) for a, b in zip(theirs["codes"], ours["codes"], strict=True)]
    if differs:
        end = [sum(run["losses"][-5:]) / 5 for run in (theirs, ours)]
        check(end[1] < 1.1 * end[0], f"loss at the end {end[1]:.4g}, with the package {end[0]:.4g}")
    else:
        check(
            losses[0] < FIRST_STEP and max(losses) < LAST_STEP, f"losses differ by {losses[0]:.1e}, {max(losses):.1e}"
        )
        check(min(codes) > 0.98, f"{codes[0]:.2%} of the codes agree after a step, {codes[-1]:.2%} at the end")
    print(
        f"| {name} | {theirs['losses'][-1]:.5f} | {ours['losses'][-1]:.5f} | {losses[0]:.1e} | {max(losses):.1e} "
        f"| {codes[-1]:.2%} | {gap(theirs['decoded'], ours['decoded']):.1e} | {moved:.2%} | {differs} |",
        flush=True,
    )
    return wrong


def agreement(a: Tensor, b: Tensor) -> float:
    return (a == b).float().mean().item()


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference relative to the largest value; padding is NaN in both."""
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    return ((a - b).nan_to_num().abs().max() / a.nan_to_num().abs().max()).item()


def fetch() -> None:
    done = FOLDER / "fetched"
    if done.is_file() and done.read_text() == " ".join(FETCHED):
        return
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(FOLDER)]
    if subprocess.run([*command, *FETCHED]).returncode:
        raise SystemExit("the projects cannot be fetched: see pip's message above")
    # its compiled part wants the torch that it was built beside; what the projects use of it is Python
    for library in FOLDER.glob("torchaudio/lib/*.so"):
        library.unlink()
    done.write_text(" ".join(FETCHED))


def main() -> int:
    if sys.argv[1:2] == ["--run"]:
        name, library, file, *others = sys.argv[2:]
        other = torch.load(others[0]) if others else None
        torch.save(train(CASES[name], library == "ours", other), file)
        return 0
    chosen = [name for name in CASES if not sys.argv[1:] or any(word in name for word in sys.argv[1:])]
    fetch()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    print(HEAD)
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / library) for library in ("theirs", "ours")]
        for name in chosen:
            for library, arguments in (("theirs", files[:1]), ("ours", files[::-1])):
                command = [sys.executable, __file__, "--run", name, library, *arguments]
                if subprocess.run(command, env=environment).returncode:
                    raise SystemExit(f"{name}: the run with {library} failed")
            wrong += compare(name, *map(torch.load, files))
    print("\n".join(wrong) or f"{len(chosen)} cases, nothing wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

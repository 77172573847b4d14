"""vqkernels train: a VQ-VAE, a VQ-GAN, a prior or a TIGER, from a configuration file and a few options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OWN = ("config.yaml", "metrics.jsonl", "model.safetensors", "checkpoint", "tensorboard", "tokenizer", "report.html")


def train(
    kind: Annotated[str, typer.Argument(help="vqvae, vqgan, prior (which learns the codes of one of those) or tiger.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of what differs from the defaults: sections data, model and train."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="fashion-mnist (default), fashion-mnist-subset, emoji or a folder of images; of tiger: a data folder."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Of a prior: the run of a VQ-VAE or VQ-GAN; default: out/vqvae. Of tiger: what tokenize wrote."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: out/KIND.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; default: 1500.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, batches and draws; default: 0.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other setting: --set model.quantizer=residual, of tiger --set epochs=20.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run in --out that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
) -> None:
    """Trains on images and keeps config.yaml, metrics.jsonl, model.safetensors and a checkpoint in a folder. 'vqkernels
    train vqvae' alone: Fashion-MNIST, a few minutes on two processor cores. A TIGER trains on the semantic IDs and
    histories of a data folder, to be used by vqkernels recommend."""
    from rich.console import Console

    from ..images import train as run
    from ..images.config import KINDS, config_from_dict, read_yaml, with_changes
    from ..images.runs import CONFIG
    from .compare import check_out, remove

    if kind not in (*KINDS, "tiger"):
        raise ValueError(f"{kind!r} cannot be trained; there are: {', '.join(KINDS)}, tiger")
    if kind == "tiger":
        if data is None or tokenizer is None or steps is not None:
            raise ValueError("tiger needs --data and --tokenizer, and its length is --set epochs=N, not --steps")
        from .train_tiger import train_tiger

        values = with_changes({} if config is None else read_yaml(config), changes or [])
        options = {"seed": seed, "resume": resume, "overwrite": overwrite}
        return train_tiger(
            data, tokenizer, out or Path("out/tiger"), values, **options, console=Console(highlight=False)
        )
    if tokenizer is not None and kind != "prior":
        raise ValueError(f"--tokenizer belongs to a prior, not to a {kind}")
    out = out or Path("out") / kind
    check_out(out, overwrite, resume)
    if config is not None:
        values = read_yaml(config)
    elif resume and (out / CONFIG).is_file():
        values = read_yaml(out / CONFIG)
    else:
        values = {"kind": kind}
        if kind == "prior" and Path("out/vqvae").is_dir():
            values["model"] = {"tokenizer": "out/vqvae"}
    if not isinstance(values, dict) or values.setdefault("kind", kind) != kind:
        raise ValueError(f"{config or out / CONFIG} is not of a {kind}: it says {values!r}")
    named = {"data.source": data, "model.tokenizer": tokenizer, "train.steps": steps, "train.seed": seed}
    given = [f"{name}={value}" for name, value in named.items() if value is not None]
    settings = config_from_dict(with_changes(values, [*given, *(changes or [])]))
    remove(out, OWN if overwrite else ())

    console = Console(highlight=False)
    console.print(f"{kind} on {settings.data.source}, {settings.train.steps} steps, into {out}", soft_wrap=True)
    try:
        records = run(settings, out, resume=resume)
    except FloatingPointError as error:
        raise ValueError(str(error)) from None
    except KeyboardInterrupt:
        console.print(f"Stopped. Go on with: vqkernels train {kind} --out {out} --resume", soft_wrap=True)
        raise typer.Exit(130) from None
    trained, held_out = (next(r for r in reversed(records) if key in r) for key in ("loss", "validation_loss"))
    console.print(f"{trained['step']} steps in {trained['seconds']:.0f} s; on held-out images:")
    for name, value in held_out.items():
        if name != "step":
            console.print(f"  {name.removeprefix('validation_').replace('_', ' '):<20}{value:12.5f}")
    console.print(f"Wrote {out}", soft_wrap=True)

"""vqkernels train tiger: a TIGER on the semantic IDs and histories of a data folder."""

from __future__ import annotations

import dataclasses
import inspect
import os
import time
from pathlib import Path

OWN = ("config.yaml", "checkpoint", "model", "catalogue")
GIVEN = ("self", "semantic_ids", "codebook_sizes", "sequences", "validation", "checkpoint", "resume", "progress")


def train_tiger(
    data, ids_from, out: Path, changes: dict, *, seed: int | None, resume: bool, overwrite: bool, console
) -> None:
    """The command's work. ``ids_from``: a tokenizer's folder or a JSON file of IDs; ``changes``: arguments of ``TIGER``
    and of its ``fit`` by name."""
    import yaml

    from ..data import DataError, load_folder, save_folder
    from ..data.catalogue import write_atomic
    from ..data.progress import progress_bar
    from ..images.config import convert, read_yaml
    from ..recommend import TIGER, evaluate, leave_one_out
    from .compare import check_out, remove

    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    if first:
        check_out(out, overwrite, resume)
        remove(out, OWN if overwrite else ())
    if resume and not changes and (out / "config.yaml").is_file():
        changes = read_yaml(out / "config.yaml")
    arguments = {kind: _arguments(function) for kind, function in (("model", TIGER.__init__), ("fit", TIGER.fit))}
    fields = [(p.name, type(p.default), p.default) for group in arguments.values() for p in group]
    changes |= {} if seed is None else {"seed": seed}
    settings = vars(convert(changes, dataclasses.make_dataclass("Settings", fields), ""))
    catalogue = load_folder(data)
    try:
        split = leave_one_out(catalogue.sequences)
    except ValueError as error:
        raise DataError(f"{data}: {error}") from None
    ids, sizes = _semantic_ids(Path(ids_from), catalogue)
    model = TIGER(ids, sizes, **{p.name: settings[p.name] for p in arguments["model"]})
    if first:
        save_folder(catalogue, out / "catalogue", overwrite=True)
        write_atomic(out / "config.yaml", yaml.safe_dump(settings).encode())
        console.print(f"[bold]{catalogue}[/bold]; {model.levels} codes of {model.codebook_sizes}; into {out}")
    began = time.perf_counter()
    with progress_bar(None if first else False, "TIGER", 1.0) as advance:
        seen = [0.0]

        def heard(share, loss):
            advance(share - seen[0], f"TIGER loss {loss:.3f}")
            seen[0] = share

        try:
            model.fit(
                split.train,
                **{p.name: settings[p.name] for p in arguments["fit"]},
                validation=split.validation,
                checkpoint=out,
                resume=resume,
                progress=heard,
            )
        except FloatingPointError as error:
            raise ValueError(str(error)) from None
    if not first:
        return
    model.save(out / "model")
    console.print(f"{len(model.history)} epochs, {sum(r['seconds'] for r in model.history):.0f} s of training "
                  f"({time.perf_counter() - began:.0f} s now); best validation NDCG@10 "
                  f"{max(r['validation_ndcg'] for r in model.history):.4f}; on the test items:")  # fmt: skip
    with console.status("Evaluating"):
        scores = evaluate(model, split.test, users=split.test.users)
    for name, value in scores.items():
        console.print(f"  {name:<8}{value:.4f}")
    console.print(f"Wrote {out}", soft_wrap=True)


def _arguments(function) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.name not in GIVEN]


def _semantic_ids(path: Path, catalogue):
    """IDs ``[num_items, L]``, row = item id - 1, and the sizes of their levels, or None where the file has none."""
    from ..data import DataError, read_index
    from ..semantic_ids import load_tokenizer

    if path.is_dir():
        tokenizer = load_tokenizer(path)
        ids, sizes = tokenizer.semantic_ids, tokenizer.codebook_sizes
    else:
        ids, items = read_index(path)
        expected = {str(n) for n in range(1, catalogue.num_items + 1)}
        if {str(item) for item in items} != expected:
            raise DataError(f"{path} names other items than 1 to {catalogue.num_items}, the item ids of the data")
        order = sorted(range(len(items)), key=lambda row: int(items[row]))
        ids, sizes = ids[order], None
    if len(ids) != catalogue.num_items:
        raise DataError(
            f"{path} has IDs of {len(ids)} items and the data {catalogue.num_items}. Give the tokenizer that was "
            "fitted on this data: vqkernels tokenize --data DATA --out IDS"
        )
    return ids, sizes

"""vqkernels recommend: the next items for a user or a history, by a trained model of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def recommend(
    run: Annotated[Path, typer.Option(help="Folder that vqkernels demo, compare or train tiger wrote.")],
    user: Annotated[str | None, typer.Option(help="A user of the data, by name.")] = None,
    history: Annotated[str | None, typer.Option(help='Item ids, oldest first, as in "1 2 3".')] = None,
    method: Annotated[
        str | None,
        typer.Option(help="The row whose model is used; by default the best by NDCG@10."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many items.")] = 10,
) -> None:
    """Recommends the next items, in words."""
    from rich.console import Console

    from ..data import DataError, load_folder
    from ..recommend import TIGER

    folder, name, beams = _model(run, method)
    if (user is None) == (history is None):
        raise DataError("give either --user with a user's name, or --history with item ids")
    catalogue = load_folder(run / "catalogue")
    who = None
    if user is not None:
        if user not in catalogue.users:
            raise DataError(
                f"user {user!r} is not in the data; it has {len(catalogue.users)}, "
                f"such as {', '.join(catalogue.users[:5])}"
            )
        who = [catalogue.users.index(user)]
        items = catalogue.sequences[who[0]]
    else:
        try:
            items = [int(word) for word in history.replace(",", " ").split()]
        except ValueError:
            raise DataError(
                f'--history {history!r} holds something that is no whole number; give item ids as in "1 2 3"'
            ) from None
    found, scores = TIGER.load(folder).recommend(items, k, beams=max(beams, k), users=who)

    console, title = Console(highlight=False), lambda item: f"{item:>6}  {catalogue.item_titles[item - 1]}"
    console.print(f"History, the latest {min(len(items), 8)} of {len(items)}:")
    for item in items[-8:]:
        console.print(f"{'':10}{title(item)}", markup=False)
    console.print(f"{name} recommends, with log-probabilities:")
    for item, score in zip(found, scores, strict=True):
        console.print(f"{score:10.2f}{title(item)}", markup=False)


def _model(run: Path, method: str | None) -> tuple[Path, str, int]:
    """The folder of the wanted model, its name in words, and the beams it was evaluated with."""
    from ..data import DataError
    from ..recommend.compare import Settings, method_folder, read_results
    from ..recommend.report import LABELS, best_row

    if (run / "model").is_dir() and method is None:
        return run / "model", "TIGER", Settings.beams
    results = read_results(run)
    trained = list(dict.fromkeys(r["method"] for r in results["rows"] if r["kind"] == "tiger"))
    if not trained:
        raise DataError(f"{run} has no finished model. Run vqkernels compare --resume with the same settings first")
    if method is not None and method not in trained:
        raise DataError(f"--method {method} has no model in {run}; there are: {', '.join(trained)}")
    row = best_row(results, method)
    folder = method_folder(run, row["method"], row["seed"]) / "model"
    return folder, f"TIGER on {LABELS[row['method']]}", results["settings"]["beams"]

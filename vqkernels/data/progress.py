"""One progress bar for everything that takes longer than a moment."""

from __future__ import annotations

import contextlib


@contextlib.contextmanager
def progress_bar(progress, description: str, total: int):
    """Yield ``advance(steps=1, description=None)``, shown as a rich progress bar on standard error.

    ``progress`` is None (own bar when standard error is a terminal, silence otherwise), False (silence) or a running
    ``rich.progress.Progress`` to which a task is added.
    """
    if progress is None:
        progress = _terminal_progress()
    if progress is None or progress is False:
        yield lambda steps=1, description=None: None
        return
    own = not progress.live.is_started
    with progress if own else contextlib.nullcontext():
        task = progress.add_task(description, total=total)

        def advance(steps: int = 1, description: str | None = None) -> None:
            progress.update(task, advance=steps, **({} if description is None else {"description": description}))

        yield advance


def _terminal_progress():
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:  # a bar is a courtesy: without rich the work goes on silently
        return None
    console = Console(stderr=True)
    return Progress(console=console, transient=True) if console.is_terminal else None

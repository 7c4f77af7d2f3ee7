"""The progress bar of long commands."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mulsched.errors import MissingExtra
from mulsched.replay.experiment import Progress

__all__ = ["progress_bar"]


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Give a callback that moves one bar, with the time that is left, on standard error.

    Raises MissingExtra without the extra ``mulsched[replay]``.
    """
    try:
        from rich import progress
        from rich.console import Console
    except ModuleNotFoundError as error:
        raise MissingExtra("the progress bar needs rich: pip install 'mulsched[replay]'") from error
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(file=sys.stderr)) as bar:
        phases: list[progress.Task] = []

        def tell(what: str, done: int, total: int) -> None:
            # a phase of its own, since its speed is not that of the one before
            if not phases or total != phases[-1].total or done < phases[-1].completed:
                for phase in phases:
                    bar.update(phase.id, visible=False)
                task = bar.add_task(what, total=total)
                phases.append(next(phase for phase in bar.tasks if phase.id == task))
            bar.update(phases[-1].id, description=what, completed=done)

        yield tell

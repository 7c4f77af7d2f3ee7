"""A decision and its explanation."""

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mulsched.failure import Alarm
from mulsched.indicators import COLUMNS, Columns

__all__ = ["Decision"]


@dataclass(slots=True, eq=False)  # frozen, it would take three times as long to make
class Decision:
    """Which instance, and everything the choice was made from: to be read, not changed.

    ``columns`` are the candidates' indicators at that moment; ``scores``, shape ``(n,)``, is NaN where a
    filter excluded the candidate; ``position`` is the chosen one's place in both. ``alarm``: what a
    failure detector left candidates out for, if it did.
    """

    instance: str
    position: int
    columns: Columns
    scores: NDArray[np.float64]
    policy: str
    ties: str
    request_id: Hashable = None
    alarm: Alarm | None = None

    @property
    def score(self) -> float:
        """The chosen instance's score; lower is better."""
        return self.scores.item(self.position)

    @property
    def matched_blocks(self) -> int:
        """Leading blocks of the prompt that the chosen instance holds."""
        return self.columns.table.item(0, self.position)

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens that lie on the chosen instance's GPU, and that it will not compute again."""
        return self.columns.table.item(1, self.position)

    @property
    def new_prefill_tokens(self) -> int:
        """Prompt tokens that the chosen instance has to compute, and the price of those that it loads."""
        return self.columns.table.item(2, self.position)

    @property
    def lower_tier_tokens(self) -> int:
        """Prompt tokens that the chosen instance loads from a tier below its GPU."""
        return self.columns.table.item(11, self.position)

    @property
    def indicators(self) -> dict[str, int]:
        """Every indicator of the chosen instance by name."""
        return dict(zip(COLUMNS, self.columns.table[:, self.position].tolist(), strict=True))

    def explain(self) -> str:
        """Return a table of every candidate and column, the best score first, and why the first won.

        ``lower_tier_tokens`` is shown where a candidate has any.
        """
        order = np.argsort(self.scores, kind="stable").tolist()
        order.remove(self.position)
        order.insert(0, self.position)
        shown = COLUMNS if self.columns.lower_tier_tokens.any() else COLUMNS[:-1]
        header = ("", "instance", "score", *shown)
        lines = [header]
        for at in order:
            score = "filtered" if np.isnan(self.scores[at]) else f"{self.scores[at]:.6g}"
            values = map(str, self.columns.table[: len(shown), at].tolist())
            lines.append(("*" if at == self.position else "", self.columns.instances[at], score, *values))
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        table = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self._reason(), *table])

    def _reason(self) -> str:
        request = self.columns.request
        equal = int(np.count_nonzero(self.scores == self.scores[self.position]))
        filtered = int(np.count_nonzero(np.isnan(self.scores)))
        reason = (
            f"{self.policy}: {request.prompt_tokens} prompt tokens to {self.instance}, score {self.score:.6g}"
            f" of {len(self.columns) - filtered} candidates"
        )
        if filtered:
            reason += f", {filtered} filtered out"
        if equal > 1 and self.ties == "first":
            reason += f"; {equal} equal scores, the first row wins"
        elif equal > 1:
            then = "the least recently chosen" if self.ties == "least_recent" else "a seeded draw"
            reason += f"; {equal} equal scores, the smallest batch wins, then {then}"
        if self.alarm is not None:
            reason += f"; {self.alarm}"
        return reason

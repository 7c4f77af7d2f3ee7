"""Prompts that share prefixes."""

from hypothesis import strategies as st

__all__ = ["prefixes", "prompts"]


def prefixes(*, branches: int = 3, max_blocks: int = 6) -> st.SearchStrategy[list[int]]:
    """Paths of block keys, so few that two of them often begin alike, part, and are equal.

    ``branches``: how many keys there are, 0 to ``branches - 1``.
    """
    return st.lists(st.integers(0, branches - 1), max_size=max_blocks)


@st.composite
def prompts(draw: st.DrawFn, *, block_size: int = 16, branches: int = 3, max_blocks: int = 6) -> list[int]:
    """Prompts of token ids that share trunks: whole blocks along ``prefixes()``, then part of a block.

    A prompt has at least one token.
    """
    path = draw(prefixes(branches=branches, max_blocks=max_blocks))
    whole = [token for branch in path for token in [branch] * block_size]
    least = 0 if whole else 1
    tail = draw(st.integers(least, max(least, block_size - 1)))
    return [*whole, *[branches] * tail]

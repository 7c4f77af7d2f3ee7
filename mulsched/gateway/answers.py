"""What the bytes of an answer tell while they pass: its first token, and the engine's own count."""

import re

__all__ = ["AnswerWatch"]

# An answer that quotes such a field has a backslash before the quotation mark.
_PROMPT = re.compile(rb'(?<!\\)"(?:prompt|input)_tokens":\s*(\d{1,12})(?!\d)')
_CACHED = re.compile(rb'(?<!\\)"cached_tokens":\s*(\d{1,12})(?!\d)')
_TAIL_BYTES = 2048  # usage comes at the end, with some hundred bytes


class AnswerWatch:
    """Follows one answer; give it every piece in order. O(piece).

    A stream of chat or of completions has its first token in its first ``data:``, since engines send nothing
    before it; a stream of responses announces itself first, and its first token is in its first delta.
    Comments, which engines send to keep a connection open, are no tokens. An answer that is not streamed
    tells nothing of its first token.
    """

    __slots__ = ("_mark", "_tail", "first_token")

    def __init__(self, *, streamed: bool, responses: bool) -> None:
        self._mark = None if not streamed else b'.delta"' if responses else b"data:"
        self._tail = b""
        self.first_token = False

    def feed(self, piece: bytes) -> bool:
        """Take the next piece; return whether the first token is in it."""
        self._tail = (self._tail + piece)[-_TAIL_BYTES - len(piece) :]
        if self.first_token or self._mark is None or self._mark not in self._tail:
            found = False
        else:
            found = self.first_token = True
        self._tail = self._tail[-_TAIL_BYTES:]
        return found

    def usage(self) -> tuple[int, int] | None:
        """Return prompt tokens and cached ones as the engine counts them; None if it does not say."""
        prompt, cached = _PROMPT.findall(self._tail), _CACHED.findall(self._tail)
        if not prompt or not cached:
            return None
        return int(prompt[-1]), int(cached[-1])

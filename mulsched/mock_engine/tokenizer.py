"""Text to tokens and back, without a model: four bytes a token, or a file of the ``tokenizers`` library.

Both are stable as a conversation grows: the prompt of a turn, and the answer to it, are a prefix of the
prompt of the next turn, token by token, since each message is tokenized by itself.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from mulsched.errors import InvalidArgument, MissingExtra
from mulsched.mock_engine.engine import Tokens

__all__ = ["ROLES", "ByteTokenizer", "FileTokenizer", "Message", "Tokenizer", "made_answer"]

Message = tuple[str, str]
"""Role and text."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

# three letters and a space before them: one token of the byte tokenizer, and one of most others
_WORDS = (
    "ace act add age aid aim air all and any ape arm art ash ask bag bar bat bay bed bee bet big bit box boy "
    "bus but cap car cat cow cry cup cut day den dig dog dot dry ear eat egg end eye fan far fig fin fit fly "
    "fog fox fun gap gas gem"
)


class Tokenizer(Protocol):
    """What the mock needs of a tokenizer. ``vocabulary``: the tokens of which it makes its answers."""

    vocabulary: Tokens

    def encode(self, text: str) -> Tokens:
        """Return the tokens of a text."""

    def decode(self, tokens: NDArray[np.integer]) -> str:
        """Return the text of tokens."""

    def chat(self, messages: Sequence[Message]) -> Tokens:
        """Return the prompt that asks for the assistant's next message."""

    def pieces(self, answer: Tokens) -> list[str]:
        """Return the text that each token of an answer adds."""


class ByteTokenizer:
    """A token is four bytes of UTF-8, read as a little-endian number.

    The last token of a text is filled up with bytes 255, which no UTF-8 has. A token that begins with 255
    stands for no text: 255 and three letters open a message of that role (``sys``, ``use``, ``ass``...),
    ``255 e o m`` closes one. A chat is, for each message, its opening, its text, the closing; then the
    opening of the answer. O(bytes).
    """

    def __init__(self) -> None:
        self._piece = {int(self.encode(f" {word}")[0]): f" {word}" for word in _WORDS.split()}
        self.vocabulary: Tokens = np.array(list(self._piece), dtype=np.uint32)

    def encode(self, text: str) -> Tokens:
        """Return a token for each four bytes. Raises UnicodeEncodeError (a lone surrogate)."""
        data = text.encode()
        return np.frombuffer(data + b"\xff" * (-len(data) % 4), dtype="<u4").astype(np.uint32, copy=False)

    def decode(self, tokens: NDArray[np.integer]) -> str:
        """Return the text; tokens that stand for none add none, and broken UTF-8 is replaced."""
        numbers = np.asarray(tokens).astype("<u4")
        data: bytes = numbers[numbers & 0xFF != 0xFF].tobytes().replace(b"\xff", b"")
        return data.decode(errors="replace")

    def chat(self, messages: Sequence[Message]) -> Tokens:
        """Return the prompt; see the class."""
        parts = [
            part for role, text in messages for part in (_special(role), self.encode(text), _special("eom"))
        ]
        return np.concatenate([*parts, _special("assistant")])

    def pieces(self, answer: Tokens) -> list[str]:
        """Return the words."""
        return [self._piece[token] for token in answer.tolist()]


def _special(name: str) -> Tokens:
    return np.frombuffer(b"\xff" + name[:3].encode(), dtype="<u4").astype(np.uint32, copy=False)


class FileTokenizer:
    """A ``tokenizer.json``. A message is ``<|ROLE|>``, a line break, its text, ``<|end|>`` and a line break.

    The answers are made of tokens that come back when their text is tokenized again, so that a follow-up
    finds the answer in the cache; if the file has no such tokens, of its first ones.
    Raises MissingExtra, FileNotFoundError, InvalidArgument (not a tokenizer's file).
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise MissingExtra(
                "a tokenizer's file needs tokenizers: pip install 'mulsched[tokenizer]'"
            ) from error
        text = Path(path).read_text(encoding="utf-8")
        try:
            self._tokenizer = Library.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise InvalidArgument(f"{path} is not a tokenizer's file: {error}") from None
        self._delta = lru_cache(maxsize=65_536)(self._added_text)
        self.vocabulary: Tokens = np.array(self._stable_tokens(), dtype=np.uint32)

    def encode(self, text: str) -> Tokens:
        """Return the tokens, without any that a model wants at the start or the end."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, tokens: NDArray[np.integer]) -> str:
        """Return the text, without special tokens."""
        decoded: str = self._tokenizer.decode(np.asarray(tokens).tolist())
        return decoded

    def chat(self, messages: Sequence[Message]) -> Tokens:
        """Return the prompt; see the class."""
        parts = [
            part
            for role, text in messages
            for part in (self.encode(f"<|{role}|>\n"), self.encode(text), self.encode("<|end|>\n"))
        ]
        return np.concatenate([*parts, self.encode("<|assistant|>\n")])

    def pieces(self, answer: Tokens) -> list[str]:
        """Return what each token adds to the text of the one before it."""
        tokens = answer.tolist()
        return [self._delta(before, token) for before, token in zip([None, *tokens], tokens, strict=False)]

    def _added_text(self, before: int | None, token: int) -> str:
        decoded: str = self._tokenizer.decode([token] if before is None else [before, token])
        return decoded if before is None else decoded[len(self._tokenizer.decode([before])) :]

    def _stable_tokens(self) -> list[int]:
        words = [self._tokenizer.encode(f" {word}", add_special_tokens=False).ids for word in _WORDS.split()]
        stable = [
            ids[0]
            for ids in words
            if len(ids) == 1 and self.encode(self._tokenizer.decode(ids * 3)).tolist() == ids * 3
        ]
        return stable or list(range(min(64, self._tokenizer.get_vocab_size())))


def made_answer(prompt: Tokens, n_tokens: int, vocabulary: Tokens) -> Tokens:
    """Return ``n_tokens`` of the vocabulary, the same for the same prompt, shape ``(n_tokens,)``.

    Longer answers to a prompt begin with the shorter ones. O(tokens).
    """
    seed = xxhash.xxh3_64_intdigest(prompt.astype("<u4", copy=False).tobytes())
    # the 64-bit mixing function of SplitMix (Steele et al. 2014) on a counter
    state = np.uint64(seed) + np.arange(1, n_tokens + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    picked: Tokens = vocabulary[(state % np.uint64(len(vocabulary))).astype(np.int64)]
    return picked

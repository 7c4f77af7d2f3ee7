"""Tokenizers of Hugging Face's ``tokenizers`` package: from a text to the tokens that a model sees."""

from pathlib import Path
from typing import Any, Protocol

from mulsched.errors import InvalidArgument, MissingExtra

__all__ = ["Tokenizer", "load_tokenizer"]


class Tokenizer(Protocol):
    """What is asked of a tokenizer; that of the ``tokenizers`` package does it."""

    def encode(self, sequence: str, /, *, add_special_tokens: bool = ...) -> Any:
        """Return an object whose ``ids`` are the tokens of a text."""

    def encode_batch_fast(self, input: list[str], /, *, add_special_tokens: bool = ...) -> Any:
        """Return such an object for each text, and let other threads run meanwhile."""


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of a model's directory, a ``tokenizer.json``, or a model on Hugging Face's hub.

    The last is looked up over the network. Raises MissingExtra without the extra ``mulsched[tokenizer]``,
    InvalidArgument if there is none.
    """
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise MissingExtra("a tokenizer needs tokenizers: pip install 'mulsched[tokenizer]'") from error
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    load = tokenizers.Tokenizer.from_file if path.exists() else tokenizers.Tokenizer.from_pretrained
    try:
        found: Tokenizer = load(str(path) if path.exists() else name)
    except Exception as error:  # the package raises nothing narrower
        raise InvalidArgument(f"no tokenizer in or under {name!r}: {error}") from None
    return found

"""From the body of a request to a decision: what a prompt is routed by.

Without a tokenizer a prompt is routed as :mod:`mulsched.prompt_routing` says. With a tokenizer everything is
tokens, and with the engine's own chat template they are the ones that its KV events speak of.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mulsched.block_keys import block_keys
from mulsched.decision import Decision
from mulsched.errors import InvalidArgument, InvalidType, MissingExtra
from mulsched.lifecycle import Lifecycle
from mulsched.openai_prompt import parse_prompt
from mulsched.prompt_routing import CHARACTERS_PER_TOKEN, NO_KEYS, namespace_of
from mulsched.types import Namespace

__all__ = ["Encode", "PromptReader", "RoutedPrompt", "load_tokenizer"]

Tokens = NDArray[np.uint32]
# Shorter texts are tokenized on the event loop, in about a millisecond.
_THREAD_CHARACTERS = 4_096


class Encode(Protocol):
    """From text to token ids. ``whole``: the text is a prompt to which the model's own start is added."""

    def __call__(self, text: str, *, whole: bool) -> Sequence[int]: ...  # noqa: D102


class RoutedPrompt(Protocol):
    """Books a prompt on an instance, each time it is called."""

    def __call__(  # noqa: D102
        self, lifecycle: Lifecycle, request_id: str, candidates: Sequence[str] | None, now: float
    ) -> Decision: ...


class PromptReader:
    """Reads prompts. ``block_size`` in tokens.

    ``encode``: the engines' tokenizer, None for routing by text. ``chat_template``: from the body of a chat
    request to the text that the model sees; without it a rendering of the project's own is tokenized, whose
    tokens are none of the engine's.
    """

    def __init__(
        self,
        block_size: int,
        encode: Encode | None = None,
        chat_template: Callable[[Mapping[str, Any]], str] | None = None,
    ) -> None:
        self._block_size = block_size
        self._encode = encode
        self._chat_template = chat_template

    @property
    def router_block_size(self) -> int:
        """The block size of a router for such prompts."""
        return self._block_size if self._encode is not None else self._block_size * CHARACTERS_PER_TOKEN

    @property
    def tokenizes(self) -> bool:
        """Whether prompts become the tokens that KV events speak of."""
        return self._encode is not None

    @property
    def units_per_token(self) -> int:
        """How much of what the router counts is a token."""
        return 1 if self._encode is not None else CHARACTERS_PER_TOKEN

    async def read(self, body: Mapping[str, Any], *, adapter: bool = False) -> RoutedPrompt:
        """Return how to book the prompt; one that cannot be read, by load: the engine will refuse it.

        ``adapter``: its model is one of another model's.
        """
        try:
            prompt = parse_prompt(body)
        except (InvalidArgument, InvalidType):
            return _by_load
        namespace = namespace_of(prompt)
        if namespace is not None and self._encode is not None:
            # events name adapters, and no model: what they tell holds for the one that the engine has
            namespace = replace(namespace, model=None, lora=prompt.model if adapter else None)
        if prompt.token_ids is not None:
            return self._of_tokens(np.array(prompt.token_ids, dtype=np.uint32), namespace)
        assert prompt.text is not None
        if self._encode is None:
            return _of_text(prompt.text, namespace)
        text, whole = prompt.text, "messages" not in body
        if self._chat_template is not None and not whole:
            try:
                text = self._chat_template(body)
            except InvalidArgument:
                return _by_load
        if len(text) < _THREAD_CHARACTERS:
            tokens = self._encode(text, whole=whole)
        else:
            encode = self._encode
            tokens = await asyncio.to_thread(lambda: encode(text, whole=whole))
        if not len(tokens):
            return _by_load
        return self._of_tokens(np.array(tokens, dtype=np.uint32), namespace)

    def _of_tokens(self, tokens: Tokens, namespace: Namespace | None) -> RoutedPrompt:
        keys = block_keys(tokens, self._block_size, namespace=namespace)
        length = len(tokens) * self.units_per_token

        def book(
            lifecycle: Lifecycle, request_id: str, candidates: Sequence[str] | None, now: float
        ) -> Decision:
            return lifecycle.route_keys(
                keys, prompt_tokens=length, request_id=request_id, candidates=candidates, now=now
            )

        return book


def _of_text(text: str, namespace: Namespace | None) -> RoutedPrompt:
    def book(lifecycle: Lifecycle, request_id: str, candidates: Sequence[str] | None, now: float) -> Decision:
        return lifecycle.route_text(
            text, request_id=request_id, candidates=candidates, namespace=namespace, now=now
        )

    return book


def _by_load(lifecycle: Lifecycle, request_id: str, candidates: Sequence[str] | None, now: float) -> Decision:
    return lifecycle.route_keys(
        NO_KEYS, prompt_tokens=1, request_id=request_id, candidates=candidates, now=now
    )


def load_tokenizer(name: str) -> Encode:
    """Return the tokenizer of a model's directory, a ``tokenizer.json``, or a model on Hugging Face's hub.

    Raises MissingExtra, InvalidArgument.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtra("a tokenizer needs tokenizers: pip install 'mulsched[tokenizer]'") from error
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path.is_file() else Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises nothing narrower
        raise InvalidArgument(f"{name} is neither a tokenizer's file nor a model's name: {error}") from None

    def encode(text: str, *, whole: bool) -> Sequence[int]:
        ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=whole).ids
        return ids

    return encode

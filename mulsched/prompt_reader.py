"""From the body of a request to what its prompt is routed by, with the engines' tokenizer or without.

Without a tokenizer a prompt is routed as :mod:`mulsched.prompt_routing` says. With a tokenizer everything is
tokens, and with the engine's own chat template they are the ones that its KV events speak of.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mulsched.block_keys import block_keys
from mulsched.errors import InvalidArgument, InvalidType
from mulsched.openai_prompt import encodable, parse_prompt
from mulsched.prompt_routing import CHARACTERS_PER_TOKEN, UNREADABLE, PromptKeys, namespace_of, prompt_keys
from mulsched.tokenizer import Tokenizer
from mulsched.types import Namespace

__all__ = ["PromptReader"]

# Shorter texts are tokenized on the event loop, in a millisecond or two.
_THREAD_CHARACTERS = 4_096


class PromptReader:
    """Reads prompts. ``block_size`` in tokens.

    ``tokenizer``: the engines', None for routing by text. ``chat_template``: from the body of a chat
    request to the text that the model sees; without it a rendering of the project's own is tokenized, whose
    tokens are none of the engine's.
    """

    def __init__(
        self,
        block_size: int,
        tokenizer: Tokenizer | None = None,
        chat_template: Callable[[Mapping[str, Any]], str] | None = None,
    ) -> None:
        self._block_size = block_size
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        # of one unit as ever, which in blocks of one token is a whole block and must have a key
        one_token = PromptKeys(np.zeros(1, dtype=np.uint64), 1)
        self.unreadable = UNREADABLE if self.router_block_size > 1 else one_token
        """What ``read`` returns for a prompt that cannot be read; its length is 1."""

    @property
    def router_block_size(self) -> int:
        """The block size of a router for such prompts."""
        return self._block_size * self.units_per_token

    @property
    def units_per_token(self) -> int:
        """How much of what the router counts is a token."""
        return 1 if self._tokenizer is not None else CHARACTERS_PER_TOKEN

    async def read(self, body: Mapping[str, Any], *, adapter: bool = False) -> PromptKeys:
        """Return what the prompt is routed by: ``unreadable`` if it cannot be read.

        ``adapter``: its model is one of another model's. Long texts are tokenized in a thread.
        """
        try:
            prompt = parse_prompt(body)
        except (InvalidArgument, InvalidType):
            return self.unreadable
        if self._tokenizer is None:
            return prompt_keys(prompt, self.router_block_size)
        namespace = namespace_of(prompt)
        if namespace is not None:
            # events name adapters, and no model: what they tell holds for the one that the engine has
            namespace = replace(namespace, model=None, lora=prompt.model if adapter else None)
        if prompt.token_ids is not None:
            return self._of_tokens(prompt.token_ids, namespace)
        assert prompt.text is not None
        text, whole = prompt.text, "messages" not in body
        if self._chat_template is not None and not whole:
            try:
                text = encodable(self._chat_template(body))
            except InvalidArgument:
                return self.unreadable
        if len(text) < _THREAD_CHARACTERS:
            tokens = self._tokens(text, whole)
        else:
            tokens = await asyncio.to_thread(self._tokens, text, whole)
        return self._of_tokens(tokens, namespace) if len(tokens) else self.unreadable

    def _tokens(self, text: str, whole: bool) -> Sequence[int]:
        """Return the tokens of a text; to a ``whole`` prompt the model's own start is added."""
        assert self._tokenizer is not None
        # not ``encode``, which keeps Python's lock to its end and takes longer, for short texts too
        ids: Sequence[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=whole)[0].ids
        return ids

    def _of_tokens(self, tokens: Sequence[int], namespace: Namespace | None) -> PromptKeys:
        ids = np.array(tokens, dtype=np.uint32)
        return PromptKeys(block_keys(ids, self._block_size, namespace=namespace), len(ids))

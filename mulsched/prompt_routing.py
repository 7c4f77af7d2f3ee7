"""A request's prompt, as text or token ids, to what it is routed by, for hosts without a tokenizer.

Prompts are routed by their text, in blocks of as many characters as a block of tokens has on average. Token
ids are used as they are and counted in the same unit. Four characters a token are OpenAI's rule of thumb for
English; a product does not mind the unit.
"""

from typing import NamedTuple

import numpy as np

from mulsched.block_keys import block_keys, text_block_keys
from mulsched.openai_prompt import Prompt
from mulsched.types import Keys, Namespace

__all__ = ["CHARACTERS_PER_TOKEN", "UNREADABLE", "PromptKeys", "namespace_of", "prompt_keys"]

CHARACTERS_PER_TOKEN = 4


class PromptKeys(NamedTuple):
    """What a prompt is routed by: its block keys, and its length in the router's unit."""

    keys: Keys
    length: int


UNREADABLE = PromptKeys(np.empty(0, dtype=np.uint64), 1)
"""A prompt that cannot be read: placed by load alone, and its server will say what is wrong with it."""


def namespace_of(prompt: Prompt) -> Namespace | None:
    """Return the namespace of a prompt: model and cache salt, None without either."""
    if prompt.model is None and prompt.cache_salt is None:
        return None
    return Namespace(model=prompt.model, cache_salt=prompt.cache_salt)


def prompt_keys(prompt: Prompt, block_chars: int) -> PromptKeys:
    """Return what a prompt is routed by, its length in characters.

    ``block_chars``: the router's block size, ``CHARACTERS_PER_TOKEN`` times the engines'. O(prompt).
    """
    namespace = namespace_of(prompt)
    if prompt.text is not None:
        return PromptKeys(text_block_keys(prompt.text, block_chars, namespace=namespace), len(prompt.text))
    assert prompt.token_ids is not None
    keys = block_keys(prompt.token_ids, block_chars // CHARACTERS_PER_TOKEN, namespace=namespace)
    return PromptKeys(keys, len(prompt.token_ids) * CHARACTERS_PER_TOKEN)

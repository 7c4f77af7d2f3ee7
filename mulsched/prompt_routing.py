"""A request's prompt, as text or token ids, to a reserved instance, for hosts without a tokenizer.

Prompts are routed by their text, in blocks of as many characters as a block of tokens has on average. Token
ids are used as they are and counted in the same unit. Four characters a token are OpenAI's rule of thumb for
English; a product does not mind the unit.
"""

from collections.abc import Hashable, Iterable

import numpy as np

from mulsched.block_keys import block_keys, text_block_keys
from mulsched.decision import Decision
from mulsched.lifecycle import Lifecycle
from mulsched.openai_prompt import Prompt
from mulsched.types import Keys, Namespace

__all__ = ["CHARACTERS_PER_TOKEN", "NO_KEYS", "namespace_of", "prompt_keys", "reserve_prompt"]

CHARACTERS_PER_TOKEN = 4

NO_KEYS = np.empty(0, dtype=np.uint64)
"""The keys of a prompt that cannot be read: with one unit of it, it is placed by load alone."""


def namespace_of(prompt: Prompt) -> Namespace | None:
    """Return the namespace of a prompt: model and cache salt, None without either."""
    if prompt.model is None and prompt.cache_salt is None:
        return None
    return Namespace(model=prompt.model, cache_salt=prompt.cache_salt)


def prompt_keys(prompt: Prompt | None, block_chars: int) -> tuple[Keys, int]:
    """Return the block keys of a prompt and its length in characters, as a router takes them.

    ``prompt``: None for one that cannot be read. ``block_chars``: the router's block size,
    ``CHARACTERS_PER_TOKEN`` times the engines'. O(prompt).
    """
    if prompt is not None and prompt.text is not None:
        return text_block_keys(prompt.text, block_chars, namespace=namespace_of(prompt)), len(prompt.text)
    if prompt is not None and prompt.token_ids is not None:
        keys = block_keys(
            prompt.token_ids, block_chars // CHARACTERS_PER_TOKEN, namespace=namespace_of(prompt)
        )
        return keys, len(prompt.token_ids) * CHARACTERS_PER_TOKEN
    return NO_KEYS, 1


def reserve_prompt(
    lifecycle: Lifecycle,
    prompt: Prompt | None,
    *,
    request_id: Hashable,
    now: float,
    candidates: Iterable[str] | None = None,
) -> Decision:
    """Select and reserve an instance; the router's blocks are ``CHARACTERS_PER_TOKEN`` times the engines'.

    ``prompt``: None for one that cannot be read, which goes where the load is least: its server will say
    what is wrong with it. Raises as :meth:`Lifecycle.route`.
    """
    keys, length = prompt_keys(prompt, lifecycle.router.block_size)
    return lifecycle.route_keys(
        keys, prompt_tokens=length, request_id=request_id, now=now, candidates=candidates
    )

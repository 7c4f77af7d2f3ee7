"""A request's prompt, as text or token ids, to a reserved instance, for hosts without a tokenizer.

Prompts are routed by their text, in blocks of as many characters as a block of tokens has on average. Token
ids are used as they are and counted in the same unit. Four characters a token are OpenAI's rule of thumb for
English; a product does not mind the unit.
"""

from collections.abc import Hashable, Iterable

import numpy as np

from mulsched.block_keys import block_keys
from mulsched.decision import Decision
from mulsched.lifecycle import Lifecycle
from mulsched.openai_prompt import Prompt
from mulsched.types import Namespace

__all__ = ["CHARACTERS_PER_TOKEN", "NO_KEYS", "namespace_of", "reserve_prompt"]

CHARACTERS_PER_TOKEN = 4

NO_KEYS = np.empty(0, dtype=np.uint64)
"""The keys of a prompt that cannot be read: with one unit of it, it is placed by load alone."""


def namespace_of(prompt: Prompt) -> Namespace | None:
    """Return the namespace of a prompt: model and cache salt, None without either."""
    if prompt.model is None and prompt.cache_salt is None:
        return None
    return Namespace(model=prompt.model, cache_salt=prompt.cache_salt)


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
    if prompt is not None and prompt.text is not None:
        return lifecycle.route_text(
            prompt.text,
            request_id=request_id,
            now=now,
            candidates=candidates,
            namespace=namespace_of(prompt),
        )
    keys, length = NO_KEYS, 1
    if prompt is not None and prompt.token_ids is not None:
        size = lifecycle.router.block_size // CHARACTERS_PER_TOKEN
        keys = block_keys(prompt.token_ids, size, namespace=namespace_of(prompt))
        length = len(prompt.token_ids) * CHARACTERS_PER_TOKEN
    return lifecycle.route_keys(
        keys, prompt_tokens=length, request_id=request_id, now=now, candidates=candidates
    )

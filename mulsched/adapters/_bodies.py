"""From the body of a request to a reserved instance, for hosts that show neither tokens nor KV events.

Prompts are routed by their text, in blocks of as many characters as a block of tokens has on average. Four
characters a token are arbitrary; a product does not mind the unit.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np

from mulsched.block_keys import block_keys
from mulsched.errors import InvalidArgument, InvalidType
from mulsched.lifecycle import Lifecycle
from mulsched.load import check_count
from mulsched.openai_prompt import Prompt, parse_prompt
from mulsched.router import PolicyLike, Router
from mulsched.types import Namespace

__all__ = ["BodyRouter", "as_body"]

CHARACTERS_PER_TOKEN = 4
_PROMPTS = ("messages", "prompt", "input")
_SHARED = ("model", "cache_salt", "tools")


class BodyRouter:
    """Reserves instances that come and go for requests given as OpenAI-style bodies.

    ``block_size``, ``cache_tokens``: tokens in a block and in the KV cache of an instance; what is cached is
    predicted in an LRU of that size. ``prefill_tokens_per_s``: the rate by which first tokens are estimated,
    None if the host reports them (see :mod:`mulsched.lifecycle`). Raises InvalidType, InvalidArgument.
    """

    def __init__(
        self,
        *,
        block_size: int = 16,
        cache_tokens: int = 500_000,
        policy: PolicyLike = "lmetric",
        seed: int = 0,
        prefill_tokens_per_s: float | None = None,
        expire_after_s: float = 3600.0,
    ) -> None:
        check_count(block_size, "block_size", least=1)
        check_count(cache_tokens, "cache_tokens", least=block_size)
        self._block_size = block_size
        self._cache_blocks = cache_tokens // block_size
        rate = None if prefill_tokens_per_s is None else prefill_tokens_per_s * CHARACTERS_PER_TOKEN
        router = Router(block_size=block_size * CHARACTERS_PER_TOKEN, policy=policy, seed=seed)
        self.lifecycle = Lifecycle(router, prefill_tokens_per_s=rate, expire_after_s=expire_after_s)

    def set_instances(self, instances: Iterable[str]) -> None:
        """Add the instances that are new, forget with all their state those that are gone."""
        wanted, known = dict.fromkeys(instances), self.lifecycle.router.instances
        for name in known:
            if name not in wanted:
                self.lifecycle.remove_instance(name)
        for name in wanted:
            if name not in known:
                self.lifecycle.router.add_instance(name, cache_blocks=self._cache_blocks)

    def reserve(
        self, body: Any, *, request_id: Hashable, now: float, candidates: Iterable[str] | None = None
    ) -> str:
        """Select an instance and reserve it in one atomic step; return its name.

        A body without a prompt that can be read is placed by load alone: its server will say what is wrong
        with it. Raises NoEligibleInstance, UnknownInstance.
        """
        try:
            prompt = parse_prompt(body)
        except (InvalidArgument, InvalidType):
            return self._reserve_keys(np.empty(0, dtype=np.uint64), 1, request_id, now, candidates)
        namespace = _namespace(prompt)
        if prompt.token_ids is not None:
            keys = block_keys(prompt.token_ids, self._block_size, namespace=namespace)
            length = len(prompt.token_ids) * CHARACTERS_PER_TOKEN
            return self._reserve_keys(keys, length, request_id, now, candidates)
        assert prompt.text is not None
        return self.lifecycle.route_text(
            prompt.text, request_id=request_id, now=now, candidates=candidates, namespace=namespace
        ).instance

    def _reserve_keys(
        self, keys: Any, length: int, request_id: Hashable, now: float, candidates: Iterable[str] | None
    ) -> str:
        return self.lifecycle.route_keys(
            keys, prompt_tokens=length, request_id=request_id, now=now, candidates=candidates
        ).instance


def _namespace(prompt: Prompt) -> Namespace | None:
    if prompt.model is None and prompt.cache_salt is None:
        return None
    return Namespace(model=prompt.model, cache_salt=prompt.cache_salt)


def as_body(value: Any) -> Mapping[str, Any] | None:
    """Return an argument of a call as a body, if it is one: a mapping, an object with fields, a text."""
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, Mapping):
        return value if value.keys() & set(_PROMPTS) else None
    body = {name: _plain(getattr(value, name)) for name in (*_SHARED, *_PROMPTS) if hasattr(value, name)}
    return body if body.keys() & set(_PROMPTS) else None


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value

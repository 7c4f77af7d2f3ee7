"""From the body of a request to a reserved instance, for hosts that show neither tokens nor KV events.

What a prompt is routed by is in :mod:`mulsched.prompt_routing`.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Literal

from mulsched.errors import InvalidArgument, InvalidType
from mulsched.lifecycle import Lifecycle
from mulsched.load import check_count
from mulsched.openai_prompt import parse_prompt
from mulsched.prompt_routing import CHARACTERS_PER_TOKEN, UNREADABLE, PromptKeys, prompt_keys
from mulsched.router import PolicyLike, Router

__all__ = ["BodyRouter", "End", "as_body"]

End = tuple[Literal["finish", "cancel"], Hashable, str | None]
"""How a request ended, its id, and the instance that says so, if one does."""

_PROMPTS = ("messages", "prompt", "input")
_SHARED = ("model", "cache_salt", "tools")


class BodyRouter:
    """Reserves instances that come and go for requests given as OpenAI-style bodies.

    ``block_size``, ``cache_tokens``: tokens in a block and in the KV cache of an instance; what is cached is
    predicted in an LRU of that size. ``prefill_tokens_per_s``: the rate by which first tokens are estimated,
    None if the host reports them, or if nobody measured it (see :mod:`mulsched.lifecycle`). Raises
    InvalidType, InvalidArgument.
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

    def read(self, body: Any) -> PromptKeys:
        """Return what a body is routed by: block keys, and a length in characters.

        A body without a prompt that can be read is placed by load alone: its server will say what is wrong
        with it.
        """
        try:
            prompt = parse_prompt(body)
        except (InvalidArgument, InvalidType):
            return UNREADABLE
        return prompt_keys(prompt, self.lifecycle.router.block_size)

    def reserve(
        self, body: Any, *, request_id: Hashable, now: float, candidates: Iterable[str] | None = None
    ) -> str:
        """Select an instance and reserve it in one atomic step; return its name.

        Raises NoEligibleInstance, UnknownInstance.
        """
        return self.reserve_keys(self.read(body), request_id=request_id, now=now, candidates=candidates)

    def reserve_keys(
        self,
        prompt: PromptKeys,
        *,
        request_id: Hashable,
        now: float,
        candidates: Iterable[str] | None = None,
    ) -> str:
        """Do what ``reserve`` does for a body that was read."""
        keys, length = prompt
        return self.lifecycle.route_keys(
            keys, prompt_tokens=length, request_id=request_id, now=now, candidates=candidates
        ).instance

    def pick_keys(self, prompt: PromptKeys, *, now: float, candidates: Iterable[str]) -> str:
        """Select an instance for a request that others send there and of whose life nobody tells.

        Nothing stays booked, and its prefix counts as cached there at once. Raises as ``reserve``.
        """
        keys, length = prompt
        self.lifecycle.advance(now)
        router, request_id = self.lifecycle.router, object()
        decision = router.route_keys(
            keys, prompt_tokens=length, request_id=request_id, now=now, candidates=candidates
        )
        # not by the lifecycle: to it an end proves that the instance has prefilled all that came before
        router.finish(request_id)
        return decision.instance

    def end(self, end: End, *, now: float) -> None:
        """Take the end of a request."""
        signal, request_id, instance = end
        hear = self.lifecycle.finish if signal == "finish" else self.lifecycle.cancel
        hear(request_id, now=now, instance=instance)


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

"""One router for many processes: what stands in the actor that they all ask."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

from mulsched.adapters._bodies import BodyRouter, End
from mulsched.prompt_routing import PromptKeys

__all__ = ["SharedRouter"]


class SharedRouter:
    """Reserves instances for processes that come and go, and need not announce themselves.

    The instances are those that any process has offered; one that a process saw die is gone for all, with
    what was booked there, until it is offered again. What no process tells an end of, and instances that
    none offers, leave after ``expire_after_s``. ``on_empty`` is called when the last instance is gone: the
    state is then worth nothing. Other arguments are those of :class:`BodyRouter`.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        on_empty: Callable[[], None],
        *,
        expire_after_s: float = 3600.0,
        **options: Any,
    ) -> None:
        self.bodies = BodyRouter(expire_after_s=expire_after_s, **options)
        self._clock = clock
        self._on_empty = on_empty
        self._expire_after_s = expire_after_s
        self._offered: dict[str, float] = {}

    def reserve(
        self, prompt: PromptKeys, request_id: Hashable, candidates: list[str], ends: Iterable[End] = ()
    ) -> str:
        """Take ends, then select one of the candidates and reserve it; O(instances) beside the router's part.

        An id that is booked already moves: see :meth:`Lifecycle.route`.
        """
        self.end(ends)
        now = self._clock()
        self._offered.update(dict.fromkeys(candidates, now))
        self._offered = {name: t for name, t in self._offered.items() if now - t <= self._expire_after_s}
        self.bodies.set_instances(self._offered)
        return self.bodies.reserve_keys(prompt, request_id=request_id, now=now, candidates=candidates)

    def end(self, ends: Iterable[End]) -> None:
        """Take the ends of requests."""
        for end in ends:
            self.bodies.end(end, now=self._clock())

    def forget(self, instances: Iterable[str]) -> None:
        """Remove instances that a process saw die."""
        for name in instances:
            self._offered.pop(name, None)
        self.bodies.set_instances(self._offered)
        if not self._offered:
            self._on_empty()

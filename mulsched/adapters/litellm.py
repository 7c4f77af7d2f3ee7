"""A routing strategy for LiteLLM's router.

::

    router = litellm.Router(model_list=[...])
    install(router)

An instance is a deployment, by its ``model_info.id``. Written for LiteLLM 1.109.
"""

import time
import uuid
from collections.abc import Callable
from typing import Any

from mulsched.adapters._bodies import BodyRouter
from mulsched.errors import MissingExtra, NoEligibleInstance

try:
    import litellm
    from litellm.integrations.custom_logger import CustomLogger
    from litellm.router_utils.cooldown_handlers import get_cooldown_deployments
    from litellm.types.router import CustomRoutingStrategyBase
except ImportError as error:
    raise MissingExtra("the LiteLLM adapter needs litellm: pip install 'mulsched[litellm]'") from error

__all__ = ["LMetricStrategy", "install"]

_ID = "mulsched_request_id"


def install(
    router: litellm.Router, *, clock: Callable[[], float] = time.monotonic, **options: Any
) -> "LMetricStrategy":
    """Route with LMetric from now on, and listen to how requests end; return the strategy.

    ``options``: keyword arguments of :class:`BodyRouter`. LiteLLM tells no first token: without
    ``prefill_tokens_per_s`` a prompt stays in the queue term until its request ends.
    """
    bodies = BodyRouter(**options)
    strategy = LMetricStrategy(router, bodies, clock)
    router.register_plugin(strategy)
    litellm.logging_callback_manager.add_litellm_callback(_Ends(bodies, clock))
    return strategy


class LMetricStrategy(CustomRoutingStrategyBase):  # type: ignore[misc]
    """Chooses among the deployments of a model that LiteLLM itself would use now, and books the request.

    A strategy of one's own stands before LiteLLM's health checks and cooldowns, so this one asks for them.
    The synchronous calls, which LiteLLM offers less for, respect cooldowns alone.
    """

    def __init__(self, router: litellm.Router, bodies: BodyRouter, clock: Callable[[], float]) -> None:
        self._router = router
        self._clock = clock
        self.bodies = bodies

    async def async_get_available_deployment(
        self,
        model: str,
        messages: list[dict[str, str]] | None = None,
        input: str | list[Any] | None = None,
        specific_deployment: bool | None = False,
        request_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return an element of the router's model list."""
        healthy = await self._router.select(
            model,
            request_kwargs,
            kind="healthy",
            messages=messages,
            input=input,
            specific_deployment=specific_deployment,
        )
        return self._choose(model, healthy, messages, input, request_kwargs)

    def get_available_deployment(
        self,
        model: str,
        messages: list[dict[str, str]] | None = None,
        input: str | list[Any] | None = None,
        specific_deployment: bool | None = False,
        request_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return an element of the router's model list."""
        cooling = set(get_cooldown_deployments(ctx=self._router._core_ctx, parent_otel_span=None))
        deployments = self._router.registry().deployments(model) or []
        healthy = [each for each in deployments if each["model_info"]["id"] not in cooling]
        return self._choose(model, healthy, messages, input, request_kwargs)

    def _choose(
        self,
        model: str,
        healthy: Any,
        messages: list[dict[str, str]] | None,
        given: str | list[Any] | None,
        request_kwargs: dict[str, Any] | None,
    ) -> Any:
        if isinstance(healthy, dict):  # the caller named a deployment
            healthy = [healthy]
        if not healthy:
            raise NoEligibleInstance(f"no deployment of {model!r} is available")
        self.bodies.set_instances(self._router.registry().names(kind="ids"))
        by_id = {each["model_info"]["id"]: each for each in healthy}
        kwargs = {} if request_kwargs is None else request_kwargs
        prompt = {"messages": messages} if messages else {"prompt": given if given else kwargs.get("prompt")}
        body = {**prompt, "model": model, "tools": kwargs.get("tools")}
        request_id = kwargs.setdefault("metadata", {}).setdefault(_ID, uuid.uuid4().hex)
        return by_id[self.bodies.reserve(body, request_id=request_id, now=self._clock(), candidates=by_id)]


class _Ends(CustomLogger):  # type: ignore[misc]
    """Hears of the end of each attempt, from whichever of LiteLLM's threads."""

    def __init__(self, bodies: BodyRouter, clock: Callable[[], float]) -> None:
        super().__init__()
        self.key = uuid.uuid4().hex  # LiteLLM drops a logger whose class and public fields it has already
        self._lifecycle = bodies.lifecycle
        self._clock = clock

    def log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        self._end(kwargs, self._lifecycle.finish)

    async def async_log_success_event(
        self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        self._end(kwargs, self._lifecycle.finish)

    def log_failure_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        self._end(kwargs, self._lifecycle.cancel)

    async def async_log_failure_event(
        self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        self._end(kwargs, self._lifecycle.cancel)

    def _end(self, kwargs: Any, signal: Callable[..., bool]) -> None:
        parameters = kwargs.get("litellm_params") or {}
        request_id = (parameters.get("metadata") or {}).get(_ID)
        if request_id is not None:
            instance = (parameters.get("model_info") or {}).get("id")
            signal(request_id, now=self._clock(), instance=instance)

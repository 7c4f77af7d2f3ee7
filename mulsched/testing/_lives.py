"""Lives of requests in any legal order, and the driver that leads a router through them."""

from collections.abc import Iterable
from dataclasses import dataclass

from hypothesis import strategies as st

from mulsched.decision import Decision
from mulsched.router import Router
from mulsched.testing._prompts import prompts as shared_trunks

__all__ = ["Cancel", "Dispatch", "Finish", "FirstToken", "Step", "request_lives", "run_lives"]


@dataclass(frozen=True, slots=True)
class Dispatch:
    """A request comes in and is routed."""

    request_id: int
    tokens: tuple[int, ...]
    session: str | None = None


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Its prefill is done."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Finish:
    """It is done, after its first token or, if its answer is one token or none, without."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """It is taken off, at any stage."""

    request_id: int


Step = Dispatch | FirstToken | Finish | Cancel


@st.composite
def request_lives(
    draw: st.DrawFn,
    *,
    prompts: st.SearchStrategy[list[int]] | None = None,
    sessions: bool = True,
    max_size: int = 20,
    all_end: bool = False,
) -> list[Step]:
    """Up to ``max_size`` steps of requests that overlap in any legal order.

    A request is dispatched once, has at most one first token after that, and ends at most once, after
    either. ``prompts``: by default ``strategies.prompts()``. ``all_end``: whether those still there at the
    last step are finished after it, which makes the list longer.
    """
    prompt = shared_trunks() if prompts is None else prompts
    waiting: list[int] = []
    running: list[int] = []
    steps: list[Step] = []
    requests = 0
    for _ in range(draw(st.integers(0, max_size))):
        kinds = ["dispatch"]
        if waiting:
            kinds += ["first_token", "first_token", "end"]
        elif running:
            kinds += ["end"]
        kind = draw(st.sampled_from(kinds))
        if kind == "dispatch":
            session = draw(st.none() | st.sampled_from(["s", "t"])) if sessions else None
            steps.append(Dispatch(requests, tuple(draw(prompt)), session))
            waiting.append(requests)
            requests += 1
        elif kind == "first_token":
            request = draw(st.sampled_from(waiting))
            waiting.remove(request)
            running.append(request)
            steps.append(FirstToken(request))
        else:
            request = draw(st.sampled_from([*running, *waiting]))
            (running if request in running else waiting).remove(request)
            steps.append(Finish(request) if draw(st.booleans()) else Cancel(request))
    if all_end:
        steps += [Finish(request) for request in [*running, *waiting]]
    return steps


def run_lives(router: Router, steps: Iterable[Step], *, start: float = 0.0) -> list[Decision]:
    """Lead a router through the steps, one a second from ``start``; return its decisions in order.

    Raises what the router raises: requests that were lost with an instance are unknown to it.
    """
    decisions = []
    for second, step in enumerate(steps):
        if isinstance(step, Dispatch):
            decisions.append(
                router.route(
                    list(step.tokens), request_id=step.request_id, session=step.session, now=start + second
                )
            )
        elif isinstance(step, FirstToken):
            router.first_token(step.request_id)
        elif isinstance(step, Finish):
            router.finish(step.request_id)
        else:
            router.cancel(step.request_id)
    return decisions

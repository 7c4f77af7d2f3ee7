"""What a detector adds to a request, two routers in turn: ``cd benchmarks && python -m failure.cost``.

Quantiles of ``route_keys``, the decision, and of ``finish``; turns, since a busy machine's clock drifts.
"""

import gc
import time

from bench_failure import BOOKED, KEYS, PROMPT_TOKENS, busy_router

from mulsched import Router
from mulsched.failure import FailureDetector

LIVES = 12_000
QUANTILES = (0.05, 0.25, 0.5)


def main() -> None:
    gc.disable()
    print("| instances | quantile | call | without | with a detector | more, µs |")
    print("| --- | --- | --- | --- | --- | --- |")
    for instances in (16, 64):
        routers = busy_router(None, instances), busy_router(FailureDetector(), instances)
        taken: dict[str, tuple[list[float], list[float]]] = {"route_keys": ([], []), "finish": ([], [])}
        for request_id in range(BOOKED, BOOKED + LIVES):
            for at in (0, 1) if request_id % 2 else (1, 0):
                for call, spent in life_us(routers[at], request_id).items():
                    taken[call][at].append(spent)
        for quantile in QUANTILES:
            for call, both in taken.items():
                without, with_it = (sorted(spent)[int(LIVES * quantile)] for spent in both)
                times = f"{without:.2f} | {with_it:.2f} | {with_it - without:.2f}"
                print(f"| {instances} | {quantile} | {call} | {times} |")


def life_us(router: Router, request_id: int) -> dict[str, float]:
    """Time the end of the oldest request and the decision of one more."""
    start = time.perf_counter_ns()
    router.finish(request_id - BOOKED)
    ended = time.perf_counter_ns()
    router.route_keys(KEYS[request_id % BOOKED], prompt_tokens=PROMPT_TOKENS, request_id=request_id)
    return {"finish": (ended - start) / 1e3, "route_keys": (time.perf_counter_ns() - ended) / 1e3}


if __name__ == "__main__":
    main()

"""What a detector adds to a request, two routers in turn: ``cd benchmarks && python -m failure.cost``.

Quantiles of ``finish`` and ``route_keys`` together; turns, since a busy machine's clock drifts.
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
    print("| instances | quantile | without | with a detector | more, µs |\n| --- | --- | --- | --- | --- |")
    for instances in (16, 64):
        routers = busy_router(None, instances), busy_router(FailureDetector(), instances)
        taken: tuple[list[float], list[float]] = ([], [])
        for request_id in range(BOOKED, BOOKED + LIVES):
            for at in (0, 1) if request_id % 2 else (1, 0):
                taken[at].append(life_us(routers[at], request_id))
        for quantile in QUANTILES:
            without, with_it = (sorted(times)[int(LIVES * quantile)] for times in taken)
            print(f"| {instances} | {quantile} | {without:.2f} | {with_it:.2f} | {with_it - without:.2f} |")


def life_us(router: Router, request_id: int) -> float:
    """Time the end of the oldest request and the decision of one more."""
    start = time.perf_counter_ns()
    router.finish(request_id - BOOKED)
    router.route_keys(KEYS[request_id % BOOKED], prompt_tokens=PROMPT_TOKENS, request_id=request_id)
    return (time.perf_counter_ns() - start) / 1e3


if __name__ == "__main__":
    main()

"""Many replays in parallel processes, their results one at a time."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from mulsched.replay.simulator import ReplayResult, replay
from mulsched.replay.trace import Trace

__all__ = ["Job", "replay_each"]

Job = tuple[Trace, Mapping[str, Any]]
"""A trace, and arguments of :func:`~mulsched.replay.replay` for it."""

Progress = Callable[[int, int, int], None]

_channel: Any = None  # in a worker process: where progress goes


def _start_worker(channel: Any) -> None:
    global _channel
    _channel = channel


def _work(job: int, trace: Trace, options: Mapping[str, Any]) -> ReplayResult:
    return replay(trace, progress=lambda done, total: _channel.put((job, done, total)), **options)


def replay_each(
    jobs: Sequence[Job], *, processes: int = 1, progress: Progress | None = None
) -> Iterator[ReplayResult]:
    """Yield the result of each job, in the order of the jobs; it does not depend on ``processes``.

    Unlike :func:`~mulsched.replay.replay_many` each job has a trace of its own, and results need not be held
    together. ``progress(job, done, all)`` is called in this process. The first error ends the iteration;
    jobs that have not started are dropped. Raises as :func:`~mulsched.replay.replay`.
    """
    if processes <= 1 or len(jobs) <= 1:
        for job, (trace, options) in enumerate(jobs):
            yield replay(trace, progress=_telling(progress, job), **options)
        return
    context = get_context("spawn")  # fork would copy locks that other threads hold
    channel = context.SimpleQueue()
    with ProcessPoolExecutor(
        min(processes, len(jobs)), mp_context=context, initializer=_start_worker, initargs=(channel,)
    ) as pool:
        futures: deque[Future[ReplayResult]] = deque()
        for job, (trace, options) in enumerate(jobs):
            futures.append(pool.submit(_work, job, trace, options))
            futures[-1].add_done_callback(lambda _: channel.put(None))  # wakes the reader
        try:
            while futures:
                while not futures[0].done():
                    message = channel.get()
                    if message is not None and progress is not None:
                        progress(*message)
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()
            # workers that still run must not block on a full channel
            while not all(future.done() for future in futures):
                channel.get()


def _telling(progress: Progress | None, job: int) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(job, done, total)

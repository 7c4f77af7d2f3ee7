"""Many replays in parallel processes."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

from mulsched.replay.simulator import ReplayResult, replay
from mulsched.replay.trace import Trace

__all__ = ["Job", "replay_each", "replay_many"]

Job = tuple[Trace, Mapping[str, Any]]
"""A trace, and arguments of :func:`~mulsched.replay.replay` for it."""

Progress = Callable[[int, int, int], None]

_channel: Any = None  # in a worker process: where progress goes, (job, done, all); its end is the job alone


def _start_worker(channel: Any) -> None:
    global _channel
    _channel = channel


def _work(job: int, trace: Trace, options: Mapping[str, Any]) -> ReplayResult:
    return replay(trace, progress=lambda done, total: _channel.put((job, done, total)), **options)


def replay_each(
    jobs: Sequence[Job], *, processes: int = 1, progress: Progress | None = None
) -> Iterator[ReplayResult]:
    """Yield the result of each job, in the order of the jobs; it does not depend on ``processes``.

    Unlike :func:`replay_many` each job has a trace of its own, and results need not be held together.
    ``progress(job, done, all)`` is called in this process, for the last time before the job's result comes.
    With more than one process policies must be names. The first error ends the iteration; jobs that have
    not started are dropped. Raises as :func:`~mulsched.replay.replay`.
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
            futures[-1].add_done_callback(partial(_tell_end, channel, job))
        ended: set[int] = set()
        try:
            for job in range(len(jobs)):
                # a job's progress comes before its end, and waits in the channel when the job is done
                while job not in ended:
                    message = channel.get()
                    if isinstance(message, int):
                        ended.add(message)
                    elif progress is not None:
                        progress(*message)
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()
            # workers that still run must not block on a full channel
            while not all(future.done() for future in futures):
                channel.get()


def replay_many(
    trace: Trace, jobs: Sequence[Mapping[str, Any]], *, processes: int = 1, progress: Progress | None = None
) -> list[ReplayResult]:
    """Replay a trace once for each job, arguments of :func:`~mulsched.replay.replay`: see replay_each.

    Returns the results in the order of the jobs. Raises as :func:`~mulsched.replay.replay`.
    """
    return list(replay_each([(trace, job) for job in jobs], processes=processes, progress=progress))


def _tell_end(channel: Any, job: int, future: Future[ReplayResult]) -> None:
    # Nobody waits for a cancelled one, and whoever cancels is who would have to read.
    if not future.cancelled():
        channel.put(job)


def _telling(progress: Progress | None, job: int) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(job, done, total)

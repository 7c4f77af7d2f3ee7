"""The end of tasks that run in the background."""

import asyncio

__all__ = ["end_task"]


async def end_task(task: "asyncio.Task[None]", *, patience_s: float = 1.0) -> None:
    """Cancel a task and wait until it has ended; what it raised is not told.

    ``patience_s``: it is cancelled again after so long. Before Python 3.12 ``asyncio.wait_for`` drops a
    cancellation that comes together with what it waits for, and the task would go on for ever.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=patience_s)

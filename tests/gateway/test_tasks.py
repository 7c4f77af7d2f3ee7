"""Tasks that run in the background end when they are told to."""

import asyncio

from mulsched.gateway.tasks import end_task


def test_a_task_that_drops_a_cancellation_ends_all_the_same():
    async def scenario():
        async def stubborn():
            for _ in range(3):
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    dropped.append(True)
            await asyncio.Event().wait()

        dropped = []
        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            await end_task(task, patience_s=0.001)
        assert (task.cancelled(), len(dropped)) == (True, 3)

    asyncio.run(scenario())

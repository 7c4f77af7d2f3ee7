"""LMetric over three workers of Dynamo: prints which of them answers each turn of three conversations.

Start them first, with the packages that docs/adapters.md names for ``dynamo_mocker``; of MODEL, any model's
directory, they read ``config.json`` and the tokenizer::

    export DYN_FILE_KV=/tmp/discovery HF_HUB_OFFLINE=1
    python -m dynamo.mocker --model-path MODEL --endpoint dyn://dynamo.backend.generate --block-size 16 \\
        --discovery-backend file --event-plane zmq --num-workers 3 &
    python docs/examples/dynamo_workers.py
"""

import asyncio
import json
import os
from pathlib import Path

from dynamo.llm import KvRouter, KvRouterConfig
from dynamo.runtime import DistributedRuntime

from mulsched.adapters.dynamo import LMetricWorkers

WORKERS = 3


def channels() -> list[str]:
    """Return the addresses of the workers' events, which Dynamo's discovery has in files."""
    records = (
        json.loads(path.read_text()) for path in Path(os.environ["DYN_FILE_KV"]).rglob("*kv%2Devents*")
    )
    return [r["transport"]["config"]["endpoint"] for r in records if r["type"] == "EventChannel"]


async def main() -> None:
    """Run three conversations of three turns."""
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    endpoint = runtime.endpoint("dynamo.backend.generate")
    kv_router = KvRouter(endpoint, 16, KvRouterConfig())
    while len(await kv_router.get_potential_loads([1])) < WORKERS or len(channels()) < WORKERS:
        await asyncio.sleep(0.1)
    workers = LMetricWorkers(kv_router, block_size=16)
    events = asyncio.create_task(workers.follow(*channels()))
    for turn in range(3):
        for topic in range(3):
            tokens = [2 + topic] * 500 + [5] * turn
            outputs = workers.generate(tokens, "mock", stop_conditions={"max_tokens": 8})
            first, *_ = [output async for output in outputs]
            print(topic, turn, first["routing_data"]["worker_id"]["decode_worker_id"])
    events.cancel()
    runtime.shutdown()


if __name__ == "__main__":
    asyncio.run(main())

"""What a KvEventSubscriber costs for a message: ZeroMQ on loopback, the event loop and all.

``python benchmarks/kv_subscriber.py [--subscribers N] [--messages N] [--rate N]``. The publishers, like
vLLM's, are another process. CPU time is the whole subscribing process's, ZeroMQ's thread included.
Without ``--rate`` each publisher sends as fast as it can, so that messages wait; with it so many a second,
and a message finds an event loop that sleeps, unless another's came just before.
"""

import argparse
import asyncio
import multiprocessing
import time

import zmq
from bench_events import messages
from engine_stream import engine_messages

from mulsched import Router
from mulsched.events import KvEventSubscriber

STREAMS = {
    "1 event of 1 block": lambda n: messages(n, 1, 1),
    "1 event of 16 blocks": lambda n: messages(16 * n, 16, 1),
    "16 events of 1 block": lambda n: messages(16 * n, 1, 16),
    "an engine's": lambda n: [payload for payload, _ in engine_messages(n)][:n],
}


def publish(payloads, subscribers, rate, ports):
    context = zmq.Context()
    sockets = []
    for _ in range(subscribers):
        socket = context.socket(zmq.XPUB)  # says when a subscription arrives
        socket.setsockopt(zmq.SNDHWM, 0)  # keep what the other side has not read yet
        sockets.append(socket)
    ports.send([socket.bind_to_random_port("tcp://127.0.0.1") for socket in sockets])
    for socket in sockets:
        socket.recv()
    ports.send("subscribed")
    begin = time.perf_counter()
    for number, payload in enumerate(payloads):
        if rate:
            time.sleep(max(0.0, begin + number / rate - time.perf_counter()))
        for socket in sockets:
            socket.send_multipart((b"", number.to_bytes(8, "big"), payload))
    ports.recv()
    context.destroy(linger=0)


async def follow(ports, subscribers, n_messages):
    router = Router(block_size=16)
    followers = []
    for i, port in enumerate(ports.recv()):
        router.add_instance(f"engine {i}")
        followers.append(KvEventSubscriber(router, f"engine {i}", f"tcp://127.0.0.1:{port}"))
    tasks = [asyncio.create_task(follower.run()) for follower in followers]
    while not ports.poll():
        await asyncio.sleep(0.01)
    ports.recv()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    while sum(follower.counts["messages"] for follower in followers) < subscribers * n_messages:
        await asyncio.sleep(0.05)
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    counts = sum((follower.counts for follower in followers), start=type(followers[0].counts)())
    assert not any(follower.tracker.counts["gaps"] for follower in followers)
    assert counts["UnknownBlock"] == 0
    return cpu_s, wall_s, counts["blocks_stored"] + counts["blocks_removed"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subscribers", type=int, default=1)
    parser.add_argument("--messages", type=int, default=5_000)
    parser.add_argument("--rate", type=float, default=0.0, help="messages/s of each publisher; 0: no pause")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name, stream in STREAMS.items():
        payloads = stream(options.messages)
        best = None
        for _ in range(options.rounds):
            ours, theirs = multiprocessing.Pipe()
            publisher = multiprocessing.Process(
                target=publish, args=(payloads, options.subscribers, options.rate, theirs)
            )
            publisher.start()
            try:
                measured = asyncio.run(follow(ours, options.subscribers, len(payloads)))
            finally:
                ours.send("done")
                publisher.join()
            best = measured if best is None else min(best, measured)
        cpu_s, wall_s, blocks = best
        n = options.subscribers * len(payloads)
        print(
            f"{name}: {cpu_s / n * 1e6:.0f} us of CPU a message, {n / cpu_s:,.0f} messages and "
            f"{blocks / cpu_s / 1e6:.2f} M blocks a CPU second; {n / wall_s:,.0f} messages/s by the clock"
        )


if __name__ == "__main__":
    main()

"""The subscriber against a publisher on loopback."""

import asyncio

import numpy as np
import pytest
import zmq
from kv_publisher import Publisher, until
from kv_wire import batch, cleared, removed, stored

from mulsched import BlockRemoved, InvalidArgument, InvalidType, Namespace, Router, UnknownInstance
from mulsched.events import KvEventSubscriber, decode_sglang

PROMPT = list(range(100, 140))
BLOCKS = [batch(stored([n], PROMPT[4 * n : 4 * n + 4], n - 1 if n else None)) for n in range(10)]


def new_router():
    router = Router(block_size=4)
    router.add_instance("gpu-0", cache_blocks=100)
    return router


def hit(router, tokens=PROMPT):
    return router.select([*tokens, 1]).hit_tokens


def subscriber_of(router, publisher, **options):
    options = {"replay_endpoint": publisher.replay_endpoint, "replay_timeout_s": 10.0} | options
    return KvEventSubscriber(router, "gpu-0", publisher.endpoint, **options)


def run(scenario, *, subscriber=None, **publisher_options):
    """Run a scenario with a router, a publisher and a subscriber; return the subscriber."""

    async def main():
        router = new_router()
        async with Publisher(**publisher_options) as publisher:
            subscribed = subscriber_of(router, publisher, **(subscriber or {}))
            await scenario(router, publisher, subscribed)
            return subscribed

    return asyncio.run(main())


def test_a_warm_engine_is_known_before_it_says_anything_new():
    async def scenario(router, publisher, subscriber):
        for block in BLOCKS:
            await publisher.publish(block)
        async with subscriber:
            await until(lambda: subscriber.state == "known")
        assert hit(router) == 40
        assert publisher.asked == [0]

    run(scenario)


@pytest.mark.parametrize("replay_topic", [True, False])
def test_lost_messages_are_replayed(replay_topic):
    async def scenario(router, publisher, subscriber):
        async with subscriber:
            await until(lambda: subscriber.state == "known")
            await publisher.subscribed()
            for n, block in enumerate(BLOCKS):
                await publisher.publish(block, lose=n in (2, 3, 7))
            await until(lambda: subscriber.counts["blocks_stored"] == 10 and subscriber.state == "known")
        assert hit(router) == 40

    subscriber = run(scenario, replay_topic=replay_topic)
    assert subscriber.tracker.counts["clears"] == 1


def test_a_gap_that_cannot_be_replayed_clears_and_carries_on():
    async def scenario(router, publisher, subscriber):
        async with subscriber:
            await until(lambda: subscriber.state == "known")
            await publisher.subscribed()
            await publisher.publish(BLOCKS[0])
            await until(lambda: hit(router) == 4)
            for block in BLOCKS[1:4]:
                await publisher.publish(block, lose=True)
            await publisher.publish(BLOCKS[4])
            await until(lambda: subscriber.state == "unknown")
            assert hit(router) == 0
            assert subscriber.counts["UnknownBlock"] == 1
            await publisher.publish(batch(cleared()))
            await publisher.publish(BLOCKS[0])
            await until(lambda: hit(router) == 4)
            assert subscriber.state == "known"

    subscriber = run(scenario, kept=1)
    assert subscriber.tracker.counts["lost_messages"] == 3


def test_a_restarted_engine_is_learned_anew():
    async def scenario(router, publisher, subscriber):
        for block in BLOCKS:
            await publisher.publish(block)
        async with subscriber:
            await until(lambda: subscriber.state == "known")
            ports = [int(e.rpartition(":")[2]) for e in (publisher.endpoint, publisher.replay_endpoint)]
            await publisher.__aexit__()
            async with Publisher(ports=ports) as restarted:
                await restarted.publish(BLOCKS[0])
                await until(
                    lambda: subscriber.state == "known" and subscriber.tracker.counts["restarts"] == 1
                )
                assert hit(router) == 4

    run(scenario)


def test_without_a_replay_socket_what_is_live_is_followed():
    async def scenario(router, publisher, subscriber):
        async with subscriber:
            await publisher.subscribed()
            await publisher.publish(BLOCKS[0])
            await until(lambda: hit(router) == 4)
            await publisher.publish(BLOCKS[1], lose=True)
            await publisher.publish(BLOCKS[2])
            await until(lambda: subscriber.state == "unknown")
        assert publisher.asked == []

    run(scenario, subscriber={"replay_endpoint": None})


def test_a_silent_replay_socket_holds_nothing_up():
    async def scenario(router, publisher, subscriber):
        async with subscriber:
            await publisher.subscribed()
            await publisher.publish(BLOCKS[0])
            await until(lambda: hit(router) == 4)
            assert subscriber.tracker.counts["replays_failed"] >= 1

    run(scenario, answers=False, subscriber={"replay_timeout_s": 0.05})


def test_what_is_predicted_stays_until_the_publisher_is_heard_of():
    async def scenario(router, publisher, subscriber):
        router.route([*PROMPT, 1], request_id=1)
        router.first_token(1)
        async with subscriber:
            await until(lambda: publisher.asked)
            assert hit(router) == 40
            publisher.answers = True
            await until(lambda: subscriber.state == "known")
            assert hit(router) == 0

    run(scenario, answers=False, subscriber={"replay_timeout_s": 0.05})


def test_an_event_loop_that_sleeps_is_woken_by_what_comes():
    async def scenario(router, publisher, subscriber):
        heard = asyncio.Event()
        apply = router.apply

        def apply_and_say(event):
            apply(event)
            if isinstance(event, BlockRemoved):
                heard.set()

        router.apply = apply_and_say
        async with subscriber:
            await publisher.subscribed()
            for _ in range(3):
                await publisher.publish(batch(removed([b"not plain, so applied by itself"])))
                await asyncio.wait_for(heard.wait(), 5)
                heard.clear()

    run(scenario)


MALFORMED = [
    [b"kv"],
    [b"kv", b"\0" * 8],
    [b"kv", b"\0" * 7, b"x"],
    [b"kv", b"\0" * 8, b"x", b"more"],
    [b"kv"] * 50,
]


def test_malformed_messages_are_counted_and_passed_over():
    async def scenario(router, publisher, subscriber):
        async with subscriber:
            await until(lambda: subscriber.state == "known")
            await publisher.subscribed()
            for frames in MALFORMED:
                await publisher.live.send_multipart(frames)
            await publisher.publish(BLOCKS[0])
            await until(lambda: hit(router) == 4)
            assert subscriber.counts["malformed_messages"] == len(MALFORMED)
            assert subscriber.state == "known"

    run(scenario)


@pytest.mark.parametrize("payload", [b"\xc1", batch(removed(["x"])), batch(*[None] * 65)])
def test_a_message_whose_removals_are_lost_clears(payload):
    async def scenario(router, publisher, subscriber):
        async with subscriber:
            await until(lambda: subscriber.state == "known")
            await publisher.subscribed()
            await publisher.publish(BLOCKS[0])
            await publisher.publish(payload)
            await until(lambda: subscriber.state == "unknown")
            assert hit(router) == 0
            await publisher.publish(BLOCKS[0])
            await until(lambda: hit(router) == 4)

    run(scenario)


def test_a_message_above_the_limit_is_refused_and_the_next_ones_are_followed():
    async def scenario(router, publisher, subscriber):
        async with subscriber:
            await until(lambda: subscriber.state == "known")
            await publisher.subscribed()
            await publisher.publish(BLOCKS[0])
            await publisher.publish(bytes(100_000))
            await until(lambda: subscriber.counts["connections"] == 2)
            publisher.kept = 1
            await publisher.publish(BLOCKS[0])
            await until(lambda: hit(router) == 4 and subscriber.state == "unknown")

    run(scenario, subscriber={"max_message_bytes": 50_000, "replay_timeout_s": 0.2})


def test_an_instance_that_is_removed_meanwhile_does_no_harm():
    async def scenario(router, publisher, subscriber):
        async with subscriber:
            await until(lambda: subscriber.state == "known")
            await publisher.subscribed()
            router.remove_instance("gpu-0")
            await publisher.publish(BLOCKS[0])
            await until(lambda: subscriber.counts["UnknownInstance"] == 1)

    run(scenario)


def test_a_context_that_is_terminated_ends_the_subscriber_and_is_let_go():
    async def scenario():
        router, context = Router(), zmq.Context()
        router.add_instance("a")
        subscriber = KvEventSubscriber(router, "a", "tcp://127.0.0.1:9", context=context)
        running = asyncio.create_task(subscriber.run())
        await asyncio.sleep(0)
        terminated = asyncio.create_task(asyncio.to_thread(context.term))
        with pytest.raises(zmq.ContextTerminated):
            await running
        await terminated

    async def within_a_minute():
        asyncio.get_running_loop().set_exception_handler(
            lambda *_: None
        )  # the descriptor's callback fails too
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(within_a_minute())


def test_a_long_history_is_replayed_whole():
    async def scenario(router, publisher, subscriber):
        for n in range(5_000):
            await publisher.publish(batch(stored([n], [n] * 4)))
        async with subscriber:
            await until(lambda: subscriber.state == "known")
        assert subscriber.counts["blocks_stored"] == 5_000

    run(scenario)


def test_the_decoder_is_a_choice():
    async def scenario(router, publisher, subscriber):
        await publisher.publish(batch(stored([1], [1] * 4), stored([1], [1] * 4), removed([1])))
        async with subscriber:
            await until(lambda: subscriber.state == "known")
        assert hit(router, [1] * 4) == 0

    run(scenario, subscriber={"decode": decode_sglang})


def test_only_messages_of_the_topic_are_taken():
    async def scenario(router, publisher, subscriber):
        async with subscriber:
            await publisher.subscribed()
            await publisher.publish(BLOCKS[0])
            publisher.topic = b"other"
            await publisher.publish(BLOCKS[1])
            publisher.topic = b"kv@pod"
            await publisher.publish(BLOCKS[2])
            await until(lambda: subscriber.counts["messages"] == 2)

    run(scenario, subscriber={"topic": "kv", "replay_endpoint": None})


def test_salted_prompts_are_found_by_their_own_requests_only():
    async def scenario(router, publisher, subscriber):
        first = stored([1], PROMPT[:4], extra_keys=[("salt",)])
        await publisher.publish(batch(first, stored([2], PROMPT[4:8], 1, extra_keys=[None])))
        async with subscriber:
            await until(lambda: subscriber.state == "known")
        hits = [
            router.select([*PROMPT, 1], namespace=Namespace(cache_salt=salt)).hit_tokens
            for salt in ("salt", "other", None)
        ]
        assert hits == [8, 0, 0]

    run(scenario)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("gpu-1", "tcp://x:1"), {}, UnknownInstance, "gpu-1"),
        (("gpu-0", 5557), {}, InvalidType, "endpoint must be a str, got int"),
        (("gpu-0", "tcp://x:1"), {"topic": b"x"}, InvalidType, "topic must be a str, got bytes"),
        (("gpu-0", "tcp://x:1"), {"max_message_bytes": 0}, InvalidArgument, "must be above 0"),
        (("gpu-0", "tcp://x:1"), {"replay_timeout_s": np.nan}, InvalidArgument, "must be above 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        KvEventSubscriber(new_router(), *arguments, **options)

"""Engines that are asked where they publish their KV events: when, and what becomes of what was known."""

import asyncio
import json

import pytest
from fake_engine import FakeEngine, answers
from gateway_harness import Front
from kv_publisher import Publisher, until
from kv_wire import batch, stored
from made_tokenizer import MadeTokenizer

from mulsched.gateway import EngineConfig, PromptReader

BLOCKS = batch(stored([1, 2], [7] * 32, block_size=16))
OTHER = batch(stored([3], [8] * 16, block_size=16))


def encode(text, *, whole):
    return list(text.encode())


def tells(*publishers):
    """Return the page of an engine with these publishers."""
    return json.dumps(
        {
            rank: {"endpoint": each.endpoint, "replay_endpoint": each.replay_endpoint}
            for rank, each in enumerate(publishers)
        }
    ).encode()


def run(scenario, **options):
    """Run ``scenario(front, engine, check)`` over an engine that is asked."""

    async def guarded():
        async with asyncio.timeout(60), FakeEngine(answers()) as engine:
            config = EngineConfig(engine.url, "auto")
            prompts = PromptReader(16, MadeTokenizer(encode))
            async with Front((), engines=(config,), prompts=prompts, **options) as front:

                async def check(times=1, *, healthy=True):
                    engine.healthy = healthy
                    for _ in range(times):
                        await front.gateway.fleet.check()

                await scenario(front, engine, check)

    asyncio.run(guarded())


def blocks(front, engine):
    return front.gateway.lifecycle.router.index.blocks(engine.name)


def subscriber(front, engine):
    return front.gateway.fleet.listeners.subscribers.get(engine.name)


async def follow(front, engine, check, publisher):
    """Let the engine tell of a publisher, and wait until its ``BLOCKS`` are known."""
    engine.kv_event_sources = tells(publisher)
    await check()
    await until(lambda: blocks(front, engine) == 2)


async def eject_and_return(check):
    await check(3, healthy=False)
    await check(2)


def test_an_engine_that_tells_later_is_followed_from_then_on():
    async def scenario(front, engine, check):
        await front.post("/v1/completions", {"prompt": [9] * 160})
        assert blocks(front, engine) == 10  # predicted
        async with Publisher() as publisher:
            await publisher.publish(BLOCKS)
            engine.kv_event_sources = tells(publisher)
            await check()
            await until(lambda: subscriber(front, engine).state == "known")
            assert blocks(front, engine) == 2

    run(scenario)


def test_an_engine_that_does_not_tell_is_asked_ever_less():
    async def scenario(front, engine, check):
        asked = []
        for number in range(1, 100):
            before = engine.sources_asked
            await check()
            if engine.sources_asked > before:
                asked.append(number)
        assert asked == [1, 3, 7, 15, 31, 63, 95]
        assert len([line for line in front.logged if line["event"] == "kv_events_unknown"]) == 1

    run(scenario)


def test_an_engine_that_is_connected_is_not_asked_again():
    async def scenario(front, engine, check):
        async with Publisher() as publisher:
            engine.kv_event_sources = tells(publisher)
            await check()
            await until(lambda: subscriber(front, engine).state == "known")
            before = engine.sources_asked
            await check(10)
            assert engine.sources_asked == before

    run(scenario)


def test_an_engine_that_returns_with_another_endpoint_is_followed_there():
    async def scenario(front, engine, check):
        async with Publisher() as first, Publisher() as second:
            await first.publish(BLOCKS)
            await second.publish(OTHER)
            await follow(front, engine, check, first)
            engine.kv_event_sources = tells(second)
            await eject_and_return(check)
            assert subscriber(front, engine).endpoint == second.endpoint
            await until(lambda: subscriber(front, engine).state == "known")
            assert blocks(front, engine) == 1

    run(scenario)


def test_an_engine_that_moves_its_endpoint_too_fast_to_be_ejected_is_followed_there():
    async def scenario(front, engine, check):
        async with Publisher() as second:
            await second.publish(OTHER)
            async with Publisher() as first:
                await first.publish(BLOCKS)
                await follow(front, engine, check, first)
                await check()
            engine.kv_event_sources = tells(second)
            await until(lambda: subscriber(front, engine).counts["disconnections"])
            await check()
            assert subscriber(front, engine).endpoint == second.endpoint
            await until(lambda: subscriber(front, engine).state == "known")
            assert blocks(front, engine) == 1

    run(scenario)


def test_what_was_cached_before_a_move_is_forgotten_at_once():
    async def scenario(front, engine, check):
        async with Publisher() as first, Publisher(answers=False) as second:
            await first.publish(BLOCKS)
            await follow(front, engine, check, first)
            engine.kv_event_sources = tells(second)
            await eject_and_return(check)
            assert blocks(front, engine) == 0

    run(scenario)


def test_an_engine_that_returns_without_events_is_predicted():
    async def scenario(front, engine, check):
        async with Publisher() as publisher:
            engine.kv_event_sources = tells(publisher)
            await check()
            assert subscriber(front, engine) is not None
            engine.kv_event_sources = None
            await eject_and_return(check)
            assert subscriber(front, engine) is None
            await front.post("/v1/completions", {"prompt": [9] * 160})
            assert blocks(front, engine) == 10

    run(scenario)


@pytest.mark.parametrize("told", [b"fails", b"[]"])
def test_a_question_that_fails_changes_nothing(told):
    async def scenario(front, engine, check):
        async with Publisher() as publisher:
            await publisher.publish(BLOCKS)
            engine.kv_event_sources = tells(publisher)
            await check()
            await until(lambda: blocks(front, engine) == 2)
            following = subscriber(front, engine)
            engine.kv_event_sources = told
            await eject_and_return(check)
            assert subscriber(front, engine) is following
            assert blocks(front, engine) == 2

    run(scenario)


def test_an_address_that_zeromq_refuses_is_logged():
    async def scenario(front, engine, check):
        engine.kv_event_sources = b'{"0": {"endpoint": "tcp://no port"}}'
        await check()
        await until(lambda: any(line["event"] == "kv_events_failed" for line in front.logged))
        assert (await front.post())[0] == 200

    run(scenario)


def test_copies_in_the_hosts_memory_decide_at_their_price():
    """Three engines without load: nothing, a copy in the host's memory, and blocks on the GPU but fewer."""

    async def scenario():
        async with (
            asyncio.timeout(60),
            Publisher() as nothing,
            Publisher() as host,
            Publisher() as gpu,
            FakeEngine(answers()) as first,
            FakeEngine(answers()) as second,
            FakeEngine(answers()) as third,
        ):
            await nothing.publish(OTHER)
            await host.publish(batch(stored([1, 2, 3, 4], [7] * 64, block_size=16, medium="CPU")))
            await gpu.publish(batch(stored([5], [7] * 16, block_size=16)))
            engines = tuple(
                EngineConfig(engine.url, publisher.endpoint, publisher.replay_endpoint)
                for engine, publisher in ((first, nothing), (second, host), (third, gpu))
            )
            chosen = []
            for ratios in (None, {"CPU": 0.1}):
                prompts = PromptReader(16, MadeTokenizer(encode))
                async with Front((), engines=engines, prompts=prompts, tier_cost_ratio=ratios) as front:
                    listening = front.gateway.fleet.listeners.subscribers
                    await until(lambda heard=listening: all(each.state == "known" for each in heard.values()))
                    await front.post("/v1/completions", {"prompt": [7] * 65})
                    decision = json.loads((await front.get("/instances"))[1])["decisions"][0]
                    candidates = {each["instance"]: each for each in decision["candidates"]}
                    told = candidates[decision["instance"]]
                    chosen.append((decision["instance"], decision["lower_tier"], told["new_prefill_tokens"]))
            assert chosen == [(third.name, 0, 49), (second.name, 64, 1 + 7)]

    asyncio.run(scenario())

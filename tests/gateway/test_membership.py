"""Engines that come and go while the gateway runs: who may say so, and what becomes of requests and state."""

import asyncio
import json
import random

import pytest
from fake_engine import FakeEngine, answers, dies, streams
from gateway_harness import ASK, CHAT, run
from kv_publisher import Publisher, until
from kv_wire import batch, stored
from made_tokenizer import MadeTokenizer
from membership_harness import ADMIN, add, encode, front, gone, guarded, ready, remove

from mulsched.gateway import EngineConfig, PromptReader

# -- who may ---------------------------------------------------------------------------------------


def test_without_an_admin_key_nobody_may_add_or_remove():
    async def scenario(front):
        status, body = await add(front, "http://127.0.0.1:9")
        assert (status, body["error"]["code"]) == (403, "no_admin_key")
        assert (await remove(front, front.engines[0].name))[0] == 403
        assert list(front.gateway.fleet.engines) == [front.engines[0].name]

    run(scenario, answers())


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer client"}, {"Authorization": "admin"}])
@pytest.mark.parametrize("api_keys", [(), ("client",)])
def test_only_an_admin_key_may(headers, api_keys):
    async def scenario(front):
        refused = {401, 403} if api_keys else {403}
        assert (await add(front, "http://127.0.0.1:9", headers))[0] in refused
        assert (await remove(front, front.engines[0].name, headers))[0] in refused
        assert list(front.gateway.fleet.engines) == [front.engines[0].name]

    run(scenario, answers(), admin_keys=("admin",), api_keys=api_keys)


def test_where_there_is_an_admin_key_draining_takes_it():
    async def scenario(front):
        path = f"/instances/{front.engines[0].name}"
        for headers, status in (({}, 403), (ADMIN, 200)):
            async with front.http.put(path, json={"draining": True}, headers=headers) as response:
                assert response.status == status

    run(scenario, answers(), admin_keys=("admin",))


def test_an_admin_key_opens_what_an_api_key_does():
    async def scenario(front):
        assert (await front.post(**ADMIN))[0] == 200
        assert (await front.get("/instances", **ADMIN))[0] == 200

    run(scenario, answers(), admin_keys=("admin",), api_keys=("client",))


# -- adding ----------------------------------------------------------------------------------------


def test_an_engine_added_under_load_gets_requests():
    async def scenario():
        async with FakeEngine(answers()) as other, front(streams(b"data: a\n\n", held, b"data: b\n\n")) as it:
            streaming = [await it.http.post(CHAT, json=ASK) for _ in range(3)]
            assert await add(it, other.url) == (201, {"instances": [other.name]})
            await ready(it, other.name)
            assert (await it.post("/v1/completions", {"prompt": "another"}))[0] == 200
            assert len(other.asked) == 1
            held.set()
            assert [await each.read() for each in streaming] == [b"data: a\n\ndata: b\n\n"] * 3

    held = asyncio.Event()
    guarded(scenario)


def test_an_engine_that_is_not_up_yet_is_taken_in_by_a_later_check():
    async def scenario():
        async with FakeEngine(answers()) as late, front(answers()) as it:
            late.healthy = False
            assert (await add(it, late.url))[0] == 201
            for _ in range(4):
                await it.gateway.fleet.check()
            engine = it.gateway.fleet.engines[late.name]
            assert (engine.state, late.name in it.gateway.fleet.eligible()) == ("starting", False)
            late.healthy = True
            await it.gateway.fleet.check()
            assert late.name in it.gateway.fleet.eligible()

    guarded(scenario)


def test_an_engine_that_is_there_is_not_added_again():
    async def scenario(front):
        status, body = await add(front, front.engines[0].url.replace("http:", "https:"))
        assert (status, body["error"]["code"]) == (409, "duplicate_instance")
        assert len(front.gateway.fleet.engines) == 1

    run(scenario, answers(), admin_keys=("admin",))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"url": 1}',
        b'{"url": "h:1", "drain": true}',
        b'{"url": "h:1"}',
        b'{"url": "http://u:p@h:1"}',
        b'{"url": "http://h:1\\n"}',
        b'{"url": "http://h:1/a b"}',
        b'{"url": "http://[::1"}',
        b'{"url": "http://a..b:1"}',
        b'{"url": "http://xn--zz-:1"}',
        b'{"url": "http://h:1", "kv_events": "5557"}',
        b'{"url": "http://h:1", "kv_events": "tcp://h:99999"}',
        b'{"url": "http://h:1", "kv_replay": "tcp://h:1"}',
        b'{"url": "http://h:1", "kv_events": "auto"}',
    ],
    ids=range(16),
)
def test_what_is_no_engine_is_refused(body):
    """The last one for want of a tokenizer."""

    async def scenario(front):
        async with front.http.post("/instances", data=body, headers=ADMIN) as response:
            assert response.status == 400
        assert list(front.gateway.fleet.engines) == [front.engines[0].name]

    run(scenario, answers(), admin_keys=("admin",))


def test_a_gateway_may_begin_without_engines():
    async def scenario():
        async with FakeEngine(answers()) as engine, front() as it:
            status, body, headers = await it.post()
            assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "no_engine", "2")
            assert (await it.get("/healthz"))[0] == 503
            await add(it, engine.url)
            await ready(it, engine.name)
            assert (await it.post())[0] == 200
            assert (await it.get("/healthz"))[0] == 200

    guarded(scenario)


def test_a_warm_engine_that_is_added_is_known_by_its_events():
    async def scenario():
        async with FakeEngine(answers()) as warm, Publisher() as publisher:
            await publisher.publish(batch(stored([1, 2], [7] * 32, block_size=16)))
            async with front(answers(), prompts=PromptReader(16, MadeTokenizer(encode))) as it:
                endpoints = {"kv_events": publisher.endpoint, "kv_replay": publisher.replay_endpoint}
                assert (await add(it, warm.url, **endpoints))[0] == 201
                await until(lambda: warm.name in it.gateway.fleet.listeners.subscribers)
                await until(lambda: it.gateway.lifecycle.router.index.blocks(warm.name) == 2)
                await it.post("/v1/completions", {"prompt": [7] * 40})
                assert len(warm.asked) == 1
                assert [line["hit"] for line in it.requests_logged()] == [32]

    guarded(scenario)


# -- removing --------------------------------------------------------------------------------------


def test_an_engine_is_removed_when_its_streams_have_ended():
    async def scenario(front):
        leaving, other = front.engines
        streaming = await front.http.post(CHAT, json=ASK)
        await streaming.content.readany()
        assert await remove(front, leaving.name) == (202, {"instances": [leaving.name], "in_flight": 1})
        for _ in range(3):
            assert (await front.post())[0] == 200
        assert [len(engine.asked) for engine in front.engines] == [1, 3]
        shown = json.loads((await front.get("/instances"))[1])["instances"]
        assert [(each["leaving"], each["eligible"]) for each in shown] == [(True, False), (False, True)]
        held.set()
        assert await streaming.content.read() == b"data: b\n\n"
        await gone(front, leaving.name)
        assert front.gateway.lifecycle.router.instances == (other.name,)
        assert front.router_is_empty()

    held = asyncio.Event()
    run(scenario, streams(b"data: a\n\n", held, b"data: b\n\n"), answers(), admin_keys=("admin",))


def test_no_series_and_no_row_of_the_page_are_left_of_a_removed_engine():
    async def scenario(front):
        leaving = front.engines[0].name
        for _ in range(4):
            await front.post()
        assert f'instance="{leaving}"' in (await front.get("/metrics"))[1]
        await remove(front, leaving)
        await gone(front, leaving)
        shown = json.loads((await front.get("/instances"))[1])
        assert [each["instance"] for each in shown["instances"]] == [front.engines[1].name]
        assert shown["alarms"] == []
        assert f'instance="{leaving}"' not in (await front.get("/metrics"))[1]

    run(scenario, answers(), answers(), admin_keys=("admin",))


def test_a_removed_engine_is_not_listened_to_any_more():
    async def scenario():
        async with FakeEngine(answers()) as engine, Publisher() as publisher:
            config = EngineConfig(engine.url, publisher.endpoint, publisher.replay_endpoint)
            options = {"prompts": PromptReader(16, MadeTokenizer(encode)), "poll_load_s": 3600.0}
            async with front(engines=(config,), **options) as it:
                await publisher.subscribed()
                await remove(it, engine.name)
                await gone(it, engine.name)
                listeners = it.gateway.fleet.listeners
                assert (listeners.subscribers, listeners.pollers) == ({}, {})
                assert await publisher.live.recv() == b"\x00"  # unsubscribed
                names = {task.get_name() for task in asyncio.all_tasks()}
                assert not any(engine.name in name for name in names)

    guarded(scenario)


def test_an_engine_that_does_not_come_idle_is_forgotten_all_the_same():
    async def scenario(front):
        leaving = front.engines[0]
        streaming = await front.http.post(CHAT, json=ASK)
        await streaming.content.readany()
        await remove(front, leaving.name)
        await gone(front, leaving.name)
        assert front.router_is_empty()
        assert [line["in_flight"] for line in front.logged if line["event"] == "drain_timeout"] == [1]
        held.set()
        assert await streaming.content.read() == b"data: b\n\n"
        await front.idle()
        assert [line["outcome"] for line in front.requests_logged()] == ["finished"]

    held = asyncio.Event()
    stream = streams(b"data: a\n\n", held, b"data: b\n\n")
    run(scenario, stream, answers(), admin_keys=("admin",), drain_timeout_s=0.05)


def test_a_request_whose_engine_fails_while_it_is_removed_goes_elsewhere():
    async def scenario(front):
        leaving, other = front.engines
        asked = asyncio.ensure_future(front.post())
        await leaving.arrived.wait()
        await remove(front, leaving.name)
        held.set()
        assert (await asked)[0] == 200
        assert len(other.asked) == 1
        await gone(front, leaving.name)
        assert front.router_is_empty()

    held = asyncio.Event()

    async def unavailable(asked, reader, writer):
        await held.wait()
        await answers(status=503)(asked, reader, writer)

    run(scenario, unavailable, answers(), admin_keys=("admin",))


def test_a_request_outlives_its_engine_and_is_tried_elsewhere():
    async def scenario(front):
        leaving, other = front.engines
        asked = asyncio.ensure_future(front.post())
        await leaving.arrived.wait()
        await remove(front, leaving.name)
        await gone(front, leaving.name)
        held.set()
        assert (await asked)[0] == 200
        assert len(other.asked) == 1
        assert front.router_is_empty()

    held = asyncio.Event()

    async def dies_late(asked, reader, writer):
        await held.wait()

    run(scenario, dies_late, answers(), admin_keys=("admin",), drain_timeout_s=0.05)


def test_what_an_engine_left_behind_does_not_touch_the_next_of_its_name():
    async def scenario(front):
        engine = front.engines[0]
        left = [asyncio.ensure_future(front.post()) for _ in range(3)]
        await until(lambda: len(engine.asked) == 3)
        await remove(front, engine.name)
        await gone(front, engine.name)
        engine.answer = answers()
        assert (await add(front, engine.url))[0] == 201
        await ready(front, engine.name)
        held.set()  # three failures in a row, which would eject it
        await asyncio.gather(*left)
        again = front.gateway.fleet.engines[engine.name]
        assert (again.state, again.in_flight, again.counts["failures"]) == ("healthy", 0, 0)
        assert front.gateway.lifecycle.router.instances == (engine.name,)
        assert front.router_is_empty()

    held = asyncio.Event()

    async def dies_late(asked, reader, writer):
        await held.wait()

    run(scenario, dies_late, admin_keys=("admin",), drain_timeout_s=0.05)


def test_an_ejected_engine_can_be_removed():
    async def scenario(front):
        dead = front.engines[0]
        dead.healthy = False
        for _ in range(3):
            await front.gateway.fleet.check()
        assert (await remove(front, dead.name))[0] == 202
        await gone(front, dead.name)
        assert (await front.post())[0] == 200
        assert json.loads((await front.get("/instances"))[1])["alarms"] == []

    run(scenario, dies, answers(), admin_keys=("admin",))


def test_the_last_engine_can_be_removed():
    async def scenario(front):
        await remove(front, front.engines[0].name)
        await gone(front, front.engines[0].name)
        status, _, headers = await front.post()
        assert (status, headers["Retry-After"]) == (503, "2")

    run(scenario, answers(), admin_keys=("admin",))


@pytest.mark.parametrize("name", ["nobody:1", "", "x/0"])
def test_an_unknown_engine_is_not_removed(name):
    async def scenario(front):
        status, body = await remove(front, name)
        assert (status, body["error"]["code"]) == (404, "unknown_instance")

    run(scenario, answers(), admin_keys=("admin",))


def test_an_engine_that_is_being_removed_is_neither_taken_back_nor_added():
    async def scenario(front):
        engine = front.engines[0]
        streaming = await front.http.post(CHAT, json=ASK)
        await remove(front, engine.name)
        async with front.http.put(
            f"/instances/{engine.name}", json={"draining": False}, headers=ADMIN
        ) as response:
            assert response.status == 409
        assert (await add(front, engine.url))[0] == 409
        assert (await remove(front, engine.name))[0] == 202
        held.set()
        await streaming.read()
        await gone(front, engine.name)
        assert (await add(front, engine.url))[0] == 201

    held = asyncio.Event()
    run(scenario, streams(b"data: a\n\n", held), admin_keys=("admin",))


def test_ranks_come_and_go_together():
    async def scenario():
        async with FakeEngine(answers()) as engine, front(data_parallel_size=2) as it:
            names = [f"{engine.name}/0", f"{engine.name}/1"]
            assert await add(it, engine.url) == (201, {"instances": names})
            await until(lambda: len(it.gateway.fleet.eligible()) == 2)
            assert (await remove(it, names[0]))[0] == 404
            assert await remove(it, engine.name) == (202, {"instances": names, "in_flight": 0})
            await gone(it, names[0])
            await gone(it, names[1])
            assert it.gateway.lifecycle.router.instances == ()

    guarded(scenario)


@pytest.mark.parametrize("policy", ["lmetric", "lmetric_guarded", "round_robin", "sglang_cache_aware"])
def test_no_request_suffers_from_engines_that_come_and_go(policy):
    """One engine stays; the others come and go under load, seeded."""

    async def scenario():
        rng = random.Random(1)
        options = {"policy": policy, "prefill_tokens_per_s": 1000.0}
        async with (
            FakeEngine(streams(b"data: a\n\n", b"data: b\n\n")) as first,
            FakeEngine(streams(b"data: a\n\n", b"data: b\n\n")) as second,
            front(streams(b"data: a\n\n", b"data: b\n\n"), **options) as it,
        ):
            passing = []

            async def ask(number):
                body = {"prompt": f"{number % 50} " * 100, "stream": True}
                async with it.http.post("/v1/completions", json=body) as response:
                    assert (response.status, await response.read()) == (200, b"data: a\n\ndata: b\n\n")

            for number in range(150):
                passing.append(asyncio.ensure_future(ask(number)))
                engine = rng.choice((first, second))
                if rng.random() < 0.2:
                    status, _ = await add(it, engine.url)
                    assert status in (201, 409)
                    if status == 201:
                        await ready(it, engine.name)
                elif rng.random() < 0.2:
                    assert (await remove(it, engine.name))[0] in (202, 404)
                else:
                    await asyncio.sleep(0)
            await asyncio.gather(*passing)
            await it.idle()
            assert it.router_is_empty()
            assert len(first.asked) + len(second.asked) > 0
            await until(lambda: not any(engine.leaving for engine in it.gateway.fleet.engines.values()))
            assert set(it.gateway.lifecycle.router.instances) <= set(it.gateway.fleet.engines)
            assert not [line for line in it.logged if line["event"] == "internal_error"]

    guarded(scenario)

"""Which engines get requests: health, ejection and return, draining, and what is forgotten with an engine."""

import asyncio
import json

import pytest
from fake_engine import FakeEngine, answers, dies, streams
from gateway_harness import ASK, CHAT, Front, run
from kv_publisher import Publisher, until
from kv_wire import batch, removed, stored
from made_tokenizer import MadeTokenizer

from mulsched.gateway import EngineConfig, PromptReader
from mulsched.mock_engine.engine import MockEngine
from mulsched.mock_engine.kv_events import KvEventPublisher
from mulsched.mock_engine.server import MockServer
from mulsched.mock_engine.tokenizer import ByteTokenizer
from mulsched.replay.profile import Profile

OLD = {"prompt": "x" * 4000}


async def check(front, times=1):
    for _ in range(times):
        await front.gateway.fleet.check()


def eligible(front):
    names = front.gateway.fleet.eligible()
    return [engine.name in names for engine in front.engines]


def test_an_engine_that_fails_its_checks_is_ejected_and_comes_back():
    async def scenario(front):
        seen = [eligible(front)]
        front.engines[0].healthy = False
        for _ in range(3):
            await check(front)
            seen.append(eligible(front))
        front.engines[0].healthy = True
        for _ in range(2):
            await check(front)
            seen.append(eligible(front))
        assert [first for first, _ in seen] == [True, True, True, False, False, True]
        assert all(second for _, second in seen)

    run(scenario, answers(), answers())


def test_failures_in_a_row_eject_and_an_answer_between_them_does_not():
    async def scenario(front):
        outcomes = iter([False, False, True, False, False, False])

        async def now_and_then(asked, reader, writer):
            if next(outcomes):
                await answers()(asked, reader, writer)

        front.engines[0].answer = now_and_then
        seen = []
        for _ in range(6):
            await front.post()
            seen.append(front.gateway.fleet.engines[front.engines[0].name].state)
        assert seen == ["healthy"] * 5 + ["ejected"]

    run(scenario, dies, max_attempts=1)


def test_an_ejected_engine_gets_no_requests():
    async def scenario(front):
        front.engines[0].healthy = False
        await check(front, 3)
        for _ in range(3):
            assert (await front.post())[0] == 200
        assert [len(engine.asked) for engine in front.engines] == [0, 3]

    run(scenario, answers(), answers())


def test_what_an_ejected_engine_had_cached_is_forgotten():
    async def scenario(front):
        await front.post("/v1/completions", OLD)
        for healthy, times in ((False, 3), (True, 2)):
            front.engines[0].healthy = healthy
            await check(front, times)
        await front.post("/v1/completions", OLD)
        assert [line["hit"] for line in front.requests_logged()] == [0, 0]

    run(scenario, answers())


def test_a_request_outlives_the_ejection_of_its_engine():
    async def scenario(front):
        async with front.http.post(CHAT, json=ASK) as response:
            await response.content.readany()
            front.engines[0].healthy = False
            await check(front, 3)
            gate.set()
            assert await response.content.read() == b"data: b\n\n"
        await front.idle()
        assert front.router_is_empty()

    gate = asyncio.Event()
    run(scenario, streams(b"data: a\n\n", gate, b"data: b\n\n"))


def test_an_engine_that_is_not_there_at_the_start_is_taken_in_when_it_is():
    async def scenario(front):
        engine = front.gateway.fleet.engines[front.engines[0].name]
        assert (engine.state, eligible(front)) == ("starting", [False, True])
        front.engines[0].healthy = True
        await check(front)
        assert (engine.state, eligible(front)) == ("healthy", [True, True])

    def unwell(front):
        front.engines[0].healthy = False

    run(scenario, answers(), answers(), before=unwell)


def test_the_log_says_why_an_engine_is_not_ready_once_for_each_reason():
    async def scenario(front):
        await check(front)
        front.engines[0].healthy = True
        await check(front)
        told = [line for line in front.logged if line["event"] == "engine_not_ready"]
        name = front.engines[0].name
        reason = "health check: status 500"
        assert told == [{"event": "engine_not_ready", "instance": name, "reason": reason}]

    def unwell(front):
        front.engines[0].healthy = False

    run(scenario, answers(), before=unwell)


def test_without_a_healthy_engine_clients_are_asked_to_come_again():
    async def scenario(front):
        front.engines[0].healthy = False
        await check(front, 3)
        status, body, headers = await front.post()
        assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "no_engine", "2")
        assert (await front.get("/healthz"))[0] == (await front.get("/v1/models"))[0] == 503

    run(scenario, answers())


async def put(front, name, body, **options):
    async with front.http.put(f"/instances/{name}", data=json.dumps(body), **options) as response:
        return response.status


def test_a_draining_engine_ends_what_it_has_and_gets_nothing_new():
    async def scenario(front):
        first = await front.http.post(CHAT, json=ASK)
        await first.content.readany()
        assert await put(front, front.engines[0].name, {"draining": True}) == 200
        front.engines[1].answer = answers()
        for _ in range(2):
            assert (await front.post())[0] == 200
        gate.set()
        assert await first.content.read() == b"data: b\n\n"
        assert [len(engine.asked) for engine in front.engines] == [1, 2]
        assert await put(front, front.engines[0].name, {"draining": False}) == 200
        assert eligible(front) == [True, True]

    gate = asyncio.Event()
    run(scenario, streams(b"data: a\n\n", gate, b"data: b\n\n"), dies)


@pytest.mark.parametrize(
    ("name", "body", "status"),
    [
        ("nobody:1", {"draining": True}, 404),
        ("", {"draining": True}, 404),
        ("x", {}, 400),
        ("x", {"draining": 1}, 400),
    ],
)
def test_draining_needs_a_name_and_yes_or_no(name, body, status):
    async def scenario(front):
        assert await put(front, name, body) == status

    run(scenario, answers())


def test_the_models_of_all_engines_are_one_list():
    async def scenario(front):
        front.engines[0].models, front.engines[1].models = ["a", "b"], ["b", "c"]
        await check(front)
        status, text = await front.get("/v1/models")
        assert status == 200
        assert [model["id"] for model in json.loads(text)["data"]] == ["a", "b", "c"]

    run(scenario, answers(), answers())


def serving(*models):
    """Return a ``before`` that gives each engine its models."""

    def tell(front):
        for engine, names in zip(front.engines, models, strict=True):
            engine.models = names

    return tell


def asks(model):
    return {"model": model, "prompt": "hello"}


def test_a_request_goes_to_an_engine_that_serves_its_model():
    async def scenario(front):
        for model in ("b", "b", "a", "b"):
            assert (await front.post("/v1/completions", asks(model)))[0] == 200
        assert [len(engine.asked) for engine in front.engines] == [1, 3]

    run(scenario, answers(), answers(), before=serving(["a"], ["b"]))


def test_an_engine_that_tells_no_models_may_serve_any():
    async def scenario(front):
        assert (await front.post("/v1/completions", asks("c")))[0] == 200
        assert [len(engine.asked) for engine in front.engines] == [0, 1]

    run(scenario, answers(), answers(), before=serving(["a"], []))


def test_a_model_that_no_engine_has_is_not_found():
    async def scenario(front):
        status, body, _ = await front.post("/v1/completions", asks("c"))
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        assert body["error"]["type"] == "invalid_request_error"

    run(scenario, answers(), answers(), before=serving(["a"], ["b"]))


def test_a_model_whose_engine_is_away_may_come_again():
    async def scenario(front):
        front.engines[1].healthy = False
        await check(front, 3)
        status, body, headers = await front.post("/v1/completions", asks("b"))
        assert (status, body["error"]["code"]) == (503, "no_engine")
        assert headers["Retry-After"] == "2"

    run(scenario, answers(), answers(), before=serving(["a"], ["b"]))


def test_a_request_is_tried_again_where_its_model_is_served_only():
    async def scenario(front):
        assert (await front.post("/v1/completions", asks("b")))[0] == 502
        assert front.engines[0].asked == []

    run(scenario, answers(), dies, before=serving(["a"], ["b"]))


def test_a_model_that_is_loaded_later_is_found_by_the_next_check():
    async def scenario(front):
        front.engines[1].models = ["a", "b"]
        assert (await front.post("/v1/completions", asks("b")))[0] == 404
        await check(front)
        assert (await front.post("/v1/completions", asks("b")))[0] == 200

    run(scenario, answers(), answers(), before=serving(["a"], ["a"]))


def test_a_request_names_the_rank_it_is_for():
    async def scenario():
        async with asyncio.timeout(60), FakeEngine(answers()) as engine:
            ranks = EngineConfig(engine.url).ranks(2)
            async with Front((), engines=ranks, policy="round_robin") as front:
                for _ in range(2):
                    await front.post(X_data_parallel_rank="7")
                assert [asked.header("X-data-parallel-rank") for asked in engine.asked] == [["0"], ["1"]]
                name = f"{engine.name}/1"
                async with front.http.put(f"/instances/{name}", json={"draining": True}) as response:
                    assert (await response.json())["instance"] == name

    asyncio.run(scenario())


def test_load_from_elsewhere_counts_where_engines_are_polled():
    async def scenario(front):
        pollers = front.gateway.fleet.listeners.pollers
        while not all(poller.load for poller in pollers.values()):
            await asyncio.sleep(0)
        assert len(pollers) == 2
        for _ in range(3):
            await front.post("/v1/completions", {"prompt": "hello"})
        assert [len(engine.asked) for engine in front.engines] == [0, 3]

    def tell(front):
        for engine, running in zip(front.engines, (7, 0), strict=True):
            engine.metrics = b"vllm:num_requests_running %d\nvllm:num_requests_waiting 0\n" % running

    run(scenario, answers(), answers(), before=tell, poll_load_s=3600.0)


TOLD = "endpoint-load-metrics: TEXT named_metrics.num_requests_waiting={}"


def test_load_from_elsewhere_counts_where_answers_tell_it():
    async def scenario(front):
        asked = [await front.post("/v1/completions", {"prompt": "hello"}) for _ in range(4)]
        assert [len(engine.asked) for engine in front.engines] == [1, 3]
        load = front.gateway.lifecycle.router.load(front.engines[0].name)
        assert (load["waiting"], load["running"]) == (7 - 1, 0)  # one of seven may be the gateway's own
        assert front.engines[0].asked[0].header("endpoint-load-metrics-format") == ["TEXT"]
        assert all("endpoint-load-metrics" not in headers for _, _, headers in asked)

    run(scenario, answers(extra=[TOLD.format(7)]), answers(extra=[TOLD.format(0)]), load_headers=True)


def test_load_in_answers_that_cannot_be_read_is_counted_and_changes_nothing():
    async def scenario(front):
        await front.post("/v1/completions", {"prompt": "hello"})
        engine = front.gateway.fleet.engines[front.engines[0].name]
        assert (engine.counts["load_headers"], engine.counts["malformed_load_headers"]) == (0, 1)
        assert front.gateway.lifecycle.router.load(engine.name)["waiting"] == 0
        assert "mulsched_instance_malformed_load_headers_total" in (await front.get("/metrics"))[1]

    run(scenario, answers(extra=[TOLD.format("many")]), load_headers=True)


def test_load_in_answers_is_neither_asked_for_nor_heeded_by_default():
    async def scenario(front):
        _, _, headers = await front.post("/v1/completions", {"prompt": "hello"})
        assert headers["endpoint-load-metrics"].startswith("TEXT")
        assert front.engines[0].asked[0].header("endpoint-load-metrics-format") == []
        assert front.gateway.lifecycle.router.load(front.engines[0].name)["waiting"] == 0

    run(scenario, answers(extra=[TOLD.format(7)]))


@pytest.mark.parametrize(
    ("page", "given", "blocks"),
    [
        (b'vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="50"} 1.0\n', None, 100),
        (b'vllm:cache_config_info{num_gpu_blocks="50",block_size="32"} 1.0\n', 160, 10),
        (b"", None, 100_000 // 16),
        (b'vllm:cache_config_info{num_gpu_blocks="None",block_size="16"} 1.0\n', None, 100_000 // 16),
    ],
)
def test_the_size_of_a_cache_is_given_or_told_by_its_metrics(page, given, blocks):
    async def scenario(front):
        await front.post("/v1/completions", {"prompt": "".join(f"{i:064d}" for i in range(blocks + 5))})
        assert front.gateway.lifecycle.router.index.blocks(front.engines[0].name) == blocks

    def tell(front):
        front.engines[0].metrics = page

    run(scenario, answers(), before=tell, kv_tokens=given)


PROFILE = Profile("fast", lambda *load: 1e-4, block_size=16, kv_blocks=1000)


def encode(text, *, whole):
    return ByteTokenizer().encode(text)


@pytest.mark.parametrize("auto", [False, True])
def test_kv_events_tell_what_an_engine_has_cached(auto):
    """An engine of its own that publishes, two requests, and no prediction of what it holds."""

    async def scenario():
        publisher = KvEventPublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", clock=lambda: 1.5)
        server = MockServer(
            MockEngine("gpu-0", PROFILE), ByteTokenizer(), model="m", clock=lambda: 1.5, publisher=publisher
        )
        url = f"http://127.0.0.1:{await server.start('127.0.0.1', 0)}"
        given = ("auto",) if auto else (publisher.endpoint, publisher.replay_endpoint)
        engine = EngineConfig(url, *given)
        try:
            async with Front((), engines=(engine,), prompts=PromptReader(16, MadeTokenizer(encode))) as front:
                ask = {"prompt": "x" * 16 * 4 * 5, "max_tokens": 1}
                await front.post("/v1/completions", ask)
                while front.gateway.lifecycle.router.index.blocks(engine.name) < 5:
                    await asyncio.sleep(0)
                await front.post("/v1/completions", {"prompt": [int(encode("xxxx", whole=True)[0])] * 16 * 6})
                assert [line["hit"] for line in front.requests_logged()] == [0, 16 * 5]
                assert [line["reported_cached_tokens"] for line in front.requests_logged()] == [0, 16 * 5]
        finally:  # sockets that are left open hold up whoever collects them
            await server.stop()

    async def guarded():
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(guarded())


@pytest.mark.parametrize(("kv_format", "left"), [("vllm", 1), ("sglang", 0)])
def test_a_block_announced_twice_is_a_copy_for_vllm_alone(kv_format, left):
    async def scenario():
        async with FakeEngine(answers()) as fake, Publisher() as publisher:
            engine = EngineConfig(fake.url, publisher.endpoint, publisher.replay_endpoint)
            options = {
                "engines": (engine,),
                "prompts": PromptReader(16, MadeTokenizer(encode)),
                "kv_format": kv_format,
            }
            async with Front((), **options) as front:
                twice = stored([7], [1] * 16, block_size=16)
                subscriber = front.gateway.fleet.listeners.subscribers[engine.name]
                await until(lambda: subscriber.state == "known")
                await publisher.subscribed()
                await publisher.publish(batch(twice, twice, removed([7])))
                await until(lambda: subscriber.counts["blocks_removed"])
                assert front.gateway.lifecycle.router.index.blocks(engine.name) == left

    async def guarded():
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(guarded())


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (None, "0 publishers"),
        (b"{}", "0 publishers"),
        (b'{"0": {"endpoint": "tcp://*:1"}, "1": {"endpoint": "tcp://*:2"}}', "2 publishers"),
        (b"[]", "InvalidEvents"),
    ],
)
def test_an_engine_that_does_not_tell_of_its_events_is_routed_by_prediction_and_logged(told, reason):
    async def scenario():
        async with FakeEngine(answers()) as fake:
            fake.kv_event_sources = told
            engine = EngineConfig(fake.url, "auto")
            async with Front((), engines=(engine,), prompts=PromptReader(16, MadeTokenizer(encode))) as front:
                await front.post("/v1/completions", {"prompt": "x" * 16 * 4 * 5})
                assert front.gateway.lifecycle.router.index.blocks(engine.name) > 0
                [line] = [line for line in front.logged if line["event"] == "kv_events_unknown"]
                assert (line["instance"], line["reason"]) == (engine.name, reason)
                fake.healthy = False
                await check(front, 3)
                assert front.gateway.lifecycle.router.instances == ()  # what it held is forgotten

    async def guarded():
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(guarded())

"""The engines' own load, and where their publishers are, asked for over HTTP on loopback."""

import asyncio
import json

import pytest
from aiohttp import ClientSession, web

from mulsched import InvalidArgument, InvalidEvents, Router, UnknownInstance
from mulsched.events import EngineLoad, KvEventSource, LoadPoller, discover_kv_events, read_engine_load

VLLM = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a}b,engine=\\"7\\""} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 5.0
vllm:num_requests_waiting{engine="1",model_name="m"} 6.0 1700000000
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 50.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 7.5e-01
"""
SGLANG = b"""\
sglang:num_running_reqs{engine_type="unified",model_name="m",tp_rank="0"} 2.0
sglang:num_queue_reqs{engine_type="unified",model_name="m",tp_rank="0"} 9.0
sglang:token_usage{engine_type="unified",model_name="m",tp_rank="0"} 0.5
"""


@pytest.mark.parametrize(
    ("page", "rank", "load"),
    [
        (VLLM, None, EngineLoad(7, 11, 0.75)),
        (VLLM, 0, EngineLoad(3, 5, 0.25)),
        (VLLM, 1, EngineLoad(4, 6, 0.75)),
        (SGLANG, None, EngineLoad(2, 9, 0.5)),
        (SGLANG, 0, EngineLoad(2, 9, 0.5)),
        (b"vllm:num_requests_running 1\r\nvllm:num_requests_waiting\t2\r\n", None, EngineLoad(1, 2, None)),
    ],
)
def test_a_page_says_how_many_run_and_wait_and_how_full_the_cache_is(page, rank, load):
    assert read_engine_load(page, rank=rank) == load


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (b"", "does not say how many requests"),
        (b"vllm:num_requests_running 1\n", "does not say how many requests"),
        (b"vllm:num_requests_running NaN\n", "at least 0, got b'NaN'"),
        (b"vllm:num_requests_running -1\n", "at least 0, got b'-1'"),
        (b"vllm:num_requests_running +Inf\n", "at least 0, got"),
        (b"vllm:num_requests_running x\n", "at least 0, got b'x'"),
    ],
)
def test_a_page_that_does_not_say_is_refused(page, message):
    with pytest.raises(InvalidEvents, match=message):
        read_engine_load(page)


def test_a_rank_that_is_not_there_is_refused():
    with pytest.raises(InvalidEvents):
        read_engine_load(VLLM, rank=2)


# -- over HTTP --------------------------------------------------------------------------------------------------


def serve(path, answers, scenario):
    """Run a scenario with a session and the URL of a server that gives these answers, the last for ever."""
    answers = list(answers)

    async def handle(request):
        status, body = answers[0] if len(answers) == 1 else answers.pop(0)
        return web.Response(status=status, body=body, headers={"Location": path} if status == 307 else None)

    async def main():
        app = web.Application()
        app.router.add_get(path, handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            async with ClientSession() as session:
                return await scenario(session, f"http://127.0.0.1:{port}")
        finally:
            await runner.cleanup()

    return asyncio.run(main())


def new_router():
    router = Router(block_size=4)
    router.add_instance("gpu-0")
    return router


def counts_of(router):
    load = router.load("gpu-0")
    return load["running"], load["waiting"]


def test_a_poll_reports_to_the_router():
    router = new_router()

    async def scenario(session, url):
        poller = LoadPoller(router, "gpu-0", url + "/metrics", rank=1)
        assert await poller.poll(session)
        assert poller.load == EngineLoad(4, 6, 0.75)

    serve("/metrics", [(200, VLLM)], scenario)
    assert counts_of(router) == (4, 6)


@pytest.mark.parametrize(
    "answer", [(404, b""), (500, b""), (307, b""), (200, b"<html>"), (200, b"vllm:num_requests_running -1")]
)
def test_a_bad_answer_leaves_the_last_good_one_while_it_is_fresh(answer):
    router = new_router()

    async def scenario(session, url):
        poller = LoadPoller(router, "gpu-0", url + "/metrics", stale_after_s=1e6)
        assert [await poller.poll(session) for _ in range(2)] == [True, False]
        assert (poller.load, poller.counts["failures"]) == (EngineLoad(2, 9, 0.5), 1)

    serve("/metrics", [(200, SGLANG), answer, (200, VLLM)], scenario)
    assert counts_of(router) == (2, 9)


def test_an_answer_that_is_too_old_leaves_the_bookings_alone():
    router = new_router()
    router.route([1, 2, 3], request_id="mine")

    async def scenario(session, url):
        poller = LoadPoller(router, "gpu-0", url + "/metrics", stale_after_s=1e-9)
        await poller.poll(session)
        assert sum(counts_of(router)) == 11
        await poller.poll(session)
        assert (poller.load, poller.counts["stale"]) == (None, 1)

    serve("/metrics", [(200, SGLANG), (500, b"")], scenario)
    assert counts_of(router) == (0, 1)


def test_an_engine_that_is_not_there_is_a_failure():
    async def scenario(session, url):
        poller = LoadPoller(new_router(), "gpu-0", "http://127.0.0.1:1/metrics")
        assert not await poller.poll(session)

    serve("/", [(200, b"")], scenario)


def test_run_polls_again_and_again_until_it_is_cancelled():
    router = new_router()

    async def scenario(session, url):
        poller = LoadPoller(router, "gpu-0", url + "/metrics", period_s=0.001)
        task = asyncio.create_task(poller.run())
        async with asyncio.timeout(20):
            while poller.counts["polls"] < 3:
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    serve("/metrics", [(200, SGLANG)], scenario)
    assert counts_of(router) == (2, 9)


def test_an_instance_that_is_removed_meanwhile_does_no_harm():
    router = new_router()

    async def scenario(session, url):
        poller = LoadPoller(router, "gpu-0", url + "/metrics")
        router.remove_instance("gpu-0")
        await poller.poll(session)
        assert poller.counts["UnknownInstance"] == 1

    serve("/metrics", [(200, SGLANG)], scenario)


@pytest.mark.parametrize(
    ("instance", "options", "error"),
    [
        ("gpu-1", {}, UnknownInstance),
        ("gpu-0", {"period_s": 0}, InvalidArgument),
        ("gpu-0", {"timeout_s": -1}, InvalidArgument),
        ("gpu-0", {"stale_after_s": 0}, InvalidArgument),
    ],
)
def test_bad_arguments_are_refused(instance, options, error):
    with pytest.raises(error):
        LoadPoller(new_router(), instance, "http://x/metrics", **options)


# -- discovery --------------------------------------------------------------------------------------------------


def discovered(status, body, host="127.0.0.1"):
    async def scenario(session, url):
        return await discover_kv_events(url.replace("127.0.0.1", host) + "/", session=session)

    return serve("/kv_event_sources", [(status, body)], scenario)


def config(endpoint, **fields):
    return {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint, "replay_endpoint": None,
            "buffer_steps": 10_000, "hwm": 100_000, "topic": "kv"} | fields  # fmt: skip


@pytest.mark.parametrize(
    ("bound", "reachable"),
    [
        ("tcp://*:5557", "tcp://localhost:5557"),
        ("tcp://0.0.0.0:5557", "tcp://localhost:5557"),
        ("tcp://[::]:5557", "tcp://localhost:5557"),
        ("tcp://10.0.0.7:5557", "tcp://10.0.0.7:5557"),
        ("ipc:///tmp/kv", "ipc:///tmp/kv"),
    ],
)
def test_an_address_of_every_interface_becomes_the_engines_host(bound, reachable):
    body = json.dumps({"0": config(bound, replay_endpoint=bound)}).encode()
    assert discovered(200, body, "localhost") == (KvEventSource(0, reachable, reachable, "kv"),)


def test_each_rank_has_its_publisher():
    body = json.dumps(
        {"1": config("tcp://h:2"), "0": config("tcp://h:1"), "2": config("tcp://h:3", publisher="null")}
    )
    assert [(s.rank, s.endpoint) for s in discovered(200, body.encode())] == [
        (0, "tcp://h:1"),
        (1, "tcp://h:2"),
    ]


def test_an_engine_without_the_page_has_no_publishers_that_can_be_found():
    assert discovered(404, b"") == ()


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"x": {}}', b'{"0": {}}', b'{"0": {"endpoint": 7}}', b"[" * 100_000]
)
def test_an_answer_of_another_form_is_refused(body):
    with pytest.raises(InvalidEvents, match="not a map from rank to publisher"):
        discovered(200, body)


def test_what_is_no_url_is_refused():
    with pytest.raises(InvalidArgument, match="a URL such as"):
        asyncio.run(discover_kv_events("gpu-0"))

"""``mulsched endpoint-picker``, as it is started."""

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys

import grpc
import pytest
from bounded import killed_after
from fake_engine import FakeEngine, answers
from kv_publisher import Publisher, until
from kv_wire import batch, removed, stored
from test_envoy_server import ask, process

from mulsched import Lifecycle, Router
from mulsched.adapters.envoy import Fleet
from mulsched.adapters.envoy.watches import kv_events_of, metrics_of
from mulsched.cli import main
from mulsched.commands import endpoint_picker
from mulsched.mock_engine.engine import MockEngine
from mulsched.mock_engine.kv_events import KvEventPublisher
from mulsched.mock_engine.server import MockServer
from mulsched.mock_engine.tokenizer import ByteTokenizer
from mulsched.prompt_reader import PromptReader
from mulsched.replay.profile import Profile


def started(*options):
    command = [sys.executable, "-m", "mulsched", "endpoint-picker", "--port", "0", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "options", [("--engine", "127.0.0.1:81"), ("--service", "127.0.0.1:81", "--prefill-tokens-per-s", "1000")]
)
def test_the_command_picks_until_it_is_stopped(options):
    async def one(port):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stream = process(channel)
            picked = await ask(stream, json.dumps({"prompt": "sea"}).encode())
            await stream.done_writing()
            while await stream.read() is not grpc.aio.EOF:
                pass
            return picked

    with started(*options) as process_, killed_after(120, process_):
        try:
            port = int(re.search(r":(\d+), policy lmetric", process_.stdout.readline())[1])
            assert asyncio.run(asyncio.wait_for(one(port), 60)) == "127.0.0.1:81"
            process_.send_signal(signal.SIGTERM)
            assert process_.wait(30) == 0
            assert process_.stdout.read() == "requests: cancelled 1, picked 1\n"
        finally:
            process_.kill()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --engine, once for each endpoint, or --service"),
        (["--engine", "10.0.0.1:1", "--service", "a:1"], "give either --engine"),
        (["--engine", "gpu-0:8000"], "must be ip:port, such as 10.0.0.7:8000, got 'gpu-0:8000'"),
        (["--engine", "10.0.0.1:1", "--engine", "10.0.0.1:1"], "there already"),
        (["--service", "gpus"], "--service must be NAME:PORT, got 'gpus'"),
        (["--engine", "10.0.0.1:1", "--kv-events"], "--kv-events goes with --tokenizer"),
        (["--engine", "10.0.0.1:1", "--tier-cost-ratio", "CPU=0"], "--tier-cost-ratio goes with --kv-events"),
        (["--engine", "10.0.0.1:1", "--block-size", "0"], "--block-size must be at least 1, got 0"),
        (["--engine", "10.0.0.1:1", "--metrics-poll", "0"], "the period of polls must be above 0, got 0.0"),
        (["--engine", "10.0.0.1:1", "--tokenizer", "/none"], "no tokenizer in or under '/none'"),
    ],
)
def test_bad_options_are_refused_in_a_line(options, message, capsys):
    assert main(["endpoint-picker", "--port", "0", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_router_is_told_what_tiers_cost():
    parser = argparse.ArgumentParser()
    endpoint_picker.add_parser(parser.add_subparsers())
    given = ("--engine", "10.0.0.1:1", "--kv-events", "--tier-cost-ratio", "CPU=0.1")
    options = parser.parse_args(["endpoint-picker", *given])
    lifecycle = endpoint_picker._lifecycle(options, PromptReader(16))
    assert lifecycle.router.media == ("GPU", "CPU")


def test_an_endpoint_is_watched_by_its_metrics_and_its_events():
    """A mock engine, asked behind the picker's back: the router learns of the load and of the cache."""

    async def run():
        profile = Profile("fast", lambda *load: 1e-4, block_size=16, kv_blocks=1000)
        publisher = KvEventPublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", clock=lambda: 0.0)
        engine = MockServer(
            MockEngine("gpu-0", profile),
            ByteTokenizer(),
            model="mock",
            clock=lambda: 0.0,
            publisher=publisher,
        )
        endpoint = f"127.0.0.1:{await engine.start('127.0.0.1', 0)}"
        router = Router(block_size=16)
        fleet = Fleet(
            Lifecycle(router),
            cache_blocks=100,
            watches=[metrics_of(router, period_s=0.01), kv_events_of(router)],
        )
        fleet.add(endpoint)
        prompt = list(range(64))
        body = json.dumps({"prompt": prompt, "max_tokens": 2000, "ignore_eos": True, "stream": True}).encode()
        host, port = endpoint.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        seen = {"load": False, "cache": False}
        while not all(seen.values()):
            seen["load"] |= router.load(endpoint)["running"] == 1
            seen["cache"] |= router.select([*prompt, 1]).hit_tokens == 64
            await asyncio.sleep(0.005)
        writer.close()
        fleet.close()
        await asyncio.wait_for(engine.stop(), 10)

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize(("kv_format", "left"), [("vllm", 1), ("sglang", 0)])
def test_a_block_announced_twice_is_a_copy_for_vllm_alone(kv_format, left):
    async def run():
        router = Router(block_size=4)
        async with FakeEngine(answers()) as engine, Publisher() as publisher:
            sources = {0: {"endpoint": publisher.endpoint, "replay_endpoint": publisher.replay_endpoint}}
            engine.kv_event_sources = json.dumps(sources).encode()
            fleet = Fleet(Lifecycle(router), watches=[kv_events_of(router, kv_format=kv_format)])
            fleet.add(engine.name)
            await publisher.subscribed()
            twice = stored([7], [1] * 4)
            await publisher.publish(batch(twice, twice, stored([8], [2] * 4), removed([7])))
            await until(lambda: router.index.blocks(engine.name) == left + 1)
            fleet.close()

    asyncio.run(asyncio.wait_for(run(), 30))

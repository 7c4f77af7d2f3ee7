"""Two real vLLM engines behind the gateway: what it predicts is what they find. Opt in with ``-m vllm``."""

import asyncio
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from real_vllm import ADAPTER, BLOCK_SIZE, WAIT_S, WORDS, Gateway, fleet, post, wait

from mulsched.events.load_header import LOAD_FORMAT_HEADER, LOAD_HEADER, read_load_header

pytestmark = pytest.mark.vllm
TURNS = 5


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    python = os.environ.get("MULSCHED_VLLM_PYTHON")
    assert python, "set MULSCHED_VLLM_PYTHON to a Python that has vllm"
    with fleet(python, tmp_path_factory.mktemp("vllm")) as started:
        yield started


def words(rng, count):
    return " ".join(rng.choices(WORDS, k=count))


class Client:
    """Sends requests and keeps what the gateway expected beside what the engine told."""

    def __init__(self, gateway, name):
        self.gateway, self.name = gateway, name
        self.openai = openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key="-", timeout=120, max_retries=0
        )
        self.told = []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        await self.openai.close()

    async def ask(self, kind, *, stream, **body):
        """Send a request; return the text of its answer."""
        api = self.openai.chat.completions if kind == "chat" else self.openai.completions
        request_id = f"{self.name}-{len(self.told)}"
        self.told.append((request_id, None))
        body = {"model": "tiny", "max_tokens": 8, "temperature": 0, "stream": stream} | body
        body["extra_headers"] = {"X-Request-Id": request_id}
        if stream:
            body["stream_options"] = {"include_usage": True}
        answer = await api.create(**body)
        answers = [each async for each in answer] if stream else [answer]
        usage = answers[-1].usage
        self.told[int(request_id.rpartition("-")[2])] = request_id, usage
        parts = [choice for each in answers for choice in each.choices]
        return "".join(
            (part.text if kind == "text" else (part.delta if stream else part.message).content) or ""
            for part in parts
        )

    def results(self):
        """Return for each request its id, instance, tokens, and cached ones: expected, and told by the engine."""
        rows = []
        for request_id, usage in self.told:
            line = self.gateway.logged(request_id)
            assert line["prompt"] == usage.prompt_tokens, "the gateway's tokens are not the engine's"
            cached = usage.prompt_tokens_details.cached_tokens
            rows.append((request_id, line["instance"], line["prompt"], line["hit"], cached))
        return rows


async def converse(client, rng, after):
    """Send forty requests one after another, each ``after`` the one before it."""
    systems = [words(rng, count) for count in (40, 70, 100, 130)]
    talks = [[{"role": "system", "content": system}] for system in systems]
    exact = rng.choices(range(2, 512), k=4 * BLOCK_SIZE)
    for turn in range(TURNS):
        for i, talk in enumerate(talks):
            said = words(rng, 12)
            parts = [{"type": "text", "text": text} for text in (said, "again")]
            talk.append({"role": "user", "content": parts if turn % 2 else said})
            said = await client.ask("chat", stream=(turn + i) % 2 == 0, messages=talk)
            talk.append({"role": "assistant", "content": said})
            await after()
        system = rng.choice(systems)
        salt = {"cache_salt": f"tenant-{turn % 2}"}
        for stream, body in (
            (True, {"prompt": f"{system} {words(rng, 8)}"}),
            (False, {"prompt": f"{system} {words(rng, 8)}", "max_tokens": 70}),  # some blocks of its own
            (True, {"prompt": exact}),  # a whole number of blocks, the last of which is computed again
            (False, {"prompt": systems[0], "extra_body": salt}),
        ):
            await client.ask("text", stream=stream, **body)
            await after()


def run(gateway, name, scenario):
    """Run ``scenario(client, rng, caught_up)``; return the client."""

    async def bounded():
        async with asyncio.timeout(900), Client(gateway, name) as client:
            await scenario(client, random.Random(5), lambda: asyncio.to_thread(gateway.catch_up))
            return client

    client = asyncio.run(bounded())
    print(*client.results(), sep="\n")
    return client


def differing(rows):
    return [row for row in rows if row[3] != row[4]]


def test_hits_are_as_predicted_once_events_are_applied(gateway):
    def by_metrics():
        return sum(engine.metric("vllm:prefix_cache_hits_total") for engine in gateway.engines.values())

    before = by_metrics()
    rows = run(gateway, "sequential", converse).results()
    assert len(rows) == 40
    assert differing(rows) == []
    assert sum(row[3] for row in rows) == by_metrics() - before > 0
    assert {row[1] for row in rows} == set(gateway.engines)
    assert gateway.metric("mulsched_kv_events_total", kind="blocks_removed") > 0


def test_an_adapter_has_a_cache_of_its_own_where_it_is_served(gateway):
    async def scenario(client, rng, caught_up):
        prompt = words(rng, 60)
        for model in ("tiny", ADAPTER, "tiny", ADAPTER):
            await client.ask("text", stream=False, model=model, prompt=prompt)
            await caught_up()

    rows = run(gateway, "adapter", scenario).results()
    assert differing(rows) == []
    assert [row[3] > 0 for row in rows] == [False, False, True, True]
    assert rows[1][1] == rows[3][1] == list(gateway.engines)[1]


async def in_a_row(client, rng, caught_up):
    async def at_once():
        pass

    await converse(client, rng, at_once)


async def eight_at_a_time(client, rng, caught_up):
    systems = [words(rng, count) for count in (40, 70, 100, 130)]
    for _ in range(5):
        prompts = [f"{rng.choice(systems)} {words(rng, 8)}" for _ in range(8)]
        await asyncio.gather(*(client.ask("text", stream=True, prompt=prompt) for prompt in prompts))


@pytest.mark.parametrize("load", [in_a_row, eight_at_a_time])
def test_whatever_was_missed_under_load_predictions_are_exact_again_after_it(gateway, load):
    """How far they were off meanwhile is printed, and stands in docs/gateway.md."""
    prompts = [words(random.Random(number), 80) for number in range(4)]

    async def scenario(client, rng, caught_up):
        await load(client, rng, caught_up)
        for prompt in prompts * 2:
            await caught_up()
            await client.ask("text", stream=False, prompt=prompt)
        await caught_up()

    rows = run(gateway, load.__name__, scenario).results()
    assert len(rows) == 48
    print(f"{load.__name__}: {len(differing(rows[:40]))} of 40 differ")
    assert differing(rows[40:]) == []
    assert sum(row[3] for row in rows[44:]) > 0


CHAT = "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}
TEXT = "/v1/completions", {"prompt": "hello"}


def body(asked, **fields):
    return {"model": "tiny", "max_tokens": 2} | asked | fields


@pytest.mark.parametrize(("path", "asked"), [CHAT, TEXT])
@pytest.mark.parametrize("form", ["TEXT", "JSON"])
def test_an_engine_tells_with_its_answer_how_many_requests_wait(gateway, path, asked, form):
    url = next(iter(gateway.engines.values())).url + path
    told = post(url, body(asked), **{LOAD_FORMAT_HEADER: form})[LOAD_HEADER]
    print(told)
    assert told.startswith(form)
    load = read_load_header(told)
    assert load.waiting == 0
    assert load.running is None


@pytest.mark.parametrize(("path", "asked"), [CHAT, TEXT])
def test_an_engine_tells_nothing_with_a_stream(gateway, path, asked):
    url = next(iter(gateway.engines.values())).url + path
    assert LOAD_HEADER not in post(url, body(asked, stream=True), **{LOAD_FORMAT_HEADER: "TEXT"})


def test_requests_that_wait_for_room_in_the_cache_are_told(gateway):
    """The cache holds two of eight such prompts, so that some wait when the first is answered."""
    url = next(iter(gateway.engines.values())).url + "/v1/completions"

    def ask(number):
        tokens = random.Random(number).choices(range(2, 512), k=400)
        asked = body({"prompt": tokens}, max_tokens=60, ignore_eos=True)
        return read_load_header(post(url, asked, **{LOAD_FORMAT_HEADER: "TEXT"})[LOAD_HEADER]).waiting

    with ThreadPoolExecutor(8) as threads:
        waiting = list(threads.map(ask, range(8)))
    print(waiting)
    assert max(waiting) >= 2


def test_the_gateway_reads_the_load_of_every_answer_that_tells_it_and_keeps_it_from_clients(gateway):
    with Gateway(gateway.directory, gateway.engines.values(), "--load-headers").started() as front:
        for path, asked in (CHAT, TEXT):
            for stream in (False, True, False):
                assert LOAD_HEADER not in post(front.url + path, body(asked, stream=stream))
        assert front.metric("mulsched_instance_load_headers_total") == 4
        assert front.metric("mulsched_instance_malformed_load_headers_total") == 0


def test_the_gateway_counts_requests_on_an_engine_that_others_sent(gateway):
    """Others send to the first engine for as long as it takes the gateway to see it."""
    name, engine = next(iter(gateway.engines.items()))
    seen = threading.Event()

    def others():
        while not seen.is_set():
            post(f"{engine.url}/v1/completions", body({"prompt": "others"}, max_tokens=300, ignore_eos=True))

    with (
        Gateway(gateway.directory, gateway.engines.values(), "--poll-load", "0.1").started() as front,
        ThreadPoolExecutor(2) as threads,
    ):

        def decided_by():
            post(f"{front.url}/v1/completions", body({"prompt": "hello"}))
            candidates = front.overview()["decisions"][0]["candidates"]
            return {each["instance"]: each["running"] + each["waiting"] for each in candidates}

        sent = [threads.submit(others) for _ in range(2)]
        try:
            wait(lambda: decided_by()[name] == 2, WAIT_S, front.log)
        finally:
            seen.set()
        for each in sent:
            each.result()
        wait(lambda: set(decided_by().values()) == {0}, WAIT_S, front.log)

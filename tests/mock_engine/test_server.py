"""The mock as its clients see it: OpenAI's own client, plain HTTP, and subscribers of its events."""

import asyncio
import dataclasses
import json

import aiohttp
import msgspec
import openai
import pytest
import zmq
import zmq.asyncio

from mulsched.errors import InvalidArgument
from mulsched.mock_engine.engine import MockEngine
from mulsched.mock_engine.kv_events import KvEventPublisher
from mulsched.mock_engine.server import MockServer
from mulsched.mock_engine.tokenizer import ByteTokenizer
from mulsched.replay.profile import Profile

PROFILE = Profile("fast", lambda *load: 1e-4, block_size=4, kv_blocks=1000)
HELLO = [{"role": "user", "content": "Hello, how are you today?"}]


class Served:
    """A server, OpenAI's client of it, and a plain one."""

    def __init__(self, profile=PROFILE, events=False, **options):
        self.profile, self.events, self.options = profile, events, options

    async def __aenter__(self):
        self.engine = MockEngine("gpu-0", self.profile)
        publisher = None
        if self.events:
            anywhere = "tcp://127.0.0.1:*"
            publisher = KvEventPublisher(anywhere, anywhere, clock=lambda: 1.5)
        options = {"model": "mock", "clock": lambda: 1234.5, "publisher": publisher} | self.options
        self.server = MockServer(self.engine, ByteTokenizer(), **options)
        self.url = f"http://127.0.0.1:{await self.server.start('127.0.0.1', 0)}"
        self.openai = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.http = aiohttp.ClientSession(self.url)
        return self

    async def __aexit__(self, *error):
        await self.openai.close()
        await self.http.close()
        await self.server.stop()

    async def post(self, path, **body):
        async with self.http.post(path, json=body) as response:
            return response.status, await response.json()

    async def get(self, path):
        async with self.http.get(path) as response:
            assert response.status == 200
            return await response.text()


def serve(scenario, **options):
    async def guarded():
        async with asyncio.timeout(60), Served(**options) as it:
            return await scenario(it)

    return asyncio.run(guarded())


async def metric(it, name):
    lines = (await it.get("/metrics")).splitlines()
    return [float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)]


def test_a_chat_is_answered():
    async def scenario(it):
        done = await it.openai.chat.completions.create(model="mock", messages=HELLO, max_tokens=3)
        assert done.id == "chatcmpl-gpu-0-1"
        assert done.created == 1234
        assert done.choices[0].message.role == "assistant"
        assert len(done.choices[0].message.content) == 3 * 4
        assert done.choices[0].finish_reason == "length"
        assert done.usage.model_dump(exclude_none=True) == {
            "prompt_tokens": 10,
            "completion_tokens": 3,
            "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    serve(scenario)


def test_a_streamed_chat_is_the_same_in_pieces():
    async def scenario(it):
        ask = {"model": "mock", "messages": HELLO, "max_tokens": 20}
        whole = await it.openai.chat.completions.create(**ask)
        stream = await it.openai.chat.completions.create(
            **ask, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        deltas = [chunk.choices[0] for chunk in chunks[:-1]]
        assert deltas[0].delta.role == "assistant"
        assert "".join(choice.delta.content for choice in deltas) == whole.choices[0].message.content
        assert [choice.finish_reason for choice in deltas if choice.finish_reason] == ["length"]
        assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 20)

    serve(scenario)


def test_a_completion_is_answered_and_streamed():
    async def scenario(it):
        ask = {"model": "mock", "prompt": "once upon a time", "max_tokens": 5}
        whole = await it.openai.completions.create(**ask)
        chunks = [chunk async for chunk in await it.openai.completions.create(**ask, stream=True)]
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        assert chunks[-1].choices[0].finish_reason == "length"
        assert whole.usage.prompt_tokens == 4

    serve(scenario)


def test_a_prompt_may_be_tokens():
    async def scenario(it):
        text, tokens = "once upon a time", ByteTokenizer().encode("once upon a time").tolist()
        one = await it.openai.completions.create(model="mock", prompt=text)
        other = await it.openai.completions.create(model="mock", prompt=tokens)
        assert one.choices[0].text == other.choices[0].text

    serve(scenario)


def test_a_response_is_answered_and_streamed():
    async def scenario(it):
        ask = {"model": "mock", "input": "Hello", "instructions": "Be brief", "max_output_tokens": 4}
        whole = await it.openai.responses.create(**ask)
        events = [event async for event in await it.openai.responses.create(**ask, stream=True)]
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
        assert "".join(deltas) == whole.output_text == events[-1].response.output_text
        assert whole.usage.output_tokens == 4

    serve(scenario)


def test_embeddings_are_vectors_of_length_one():
    async def scenario(it):
        done = await it.openai.embeddings.create(model="mock", input=["one", "two", "one"])
        one, two, again = (each.embedding for each in done.data)
        assert one == again != two
        assert sum(x * x for x in one) == pytest.approx(1)
        status, plain = await it.post("/v1/embeddings", input="one")
        assert (status, plain["data"][0]["embedding"]) == (200, pytest.approx(one))

    serve(scenario)


def test_a_follow_up_finds_its_conversation_cached():
    async def scenario(it):
        ask = {"model": "mock", "max_tokens": 9}
        first = await it.openai.chat.completions.create(**ask, messages=HELLO)
        answer = {"role": "assistant", "content": first.choices[0].message.content}
        follow_up = [*HELLO, answer, {"role": "user", "content": "And now?"}]
        second = await it.openai.chat.completions.create(**ask, messages=follow_up)
        # of the 19 tokens the last has no KV, and 16 of the others are whole blocks
        assert second.usage.prompt_tokens_details.cached_tokens == 16
        assert await metric(it, "vllm:prefix_cache_hits_total") == [16]

    serve(scenario)


@pytest.mark.parametrize(
    ("options", "tokens", "reason"),
    [
        ({}, 10, "stop"),
        ({"max_tokens": 5}, 5, "length"),
        ({"max_completion_tokens": 5, "max_tokens": 7}, 5, "length"),
        ({"max_tokens": 20}, 10, "stop"),
        ({"max_tokens": 20, "min_tokens": 15}, 15, "stop"),
        ({"max_tokens": 20, "ignore_eos": True}, 20, "length"),
    ],
)
def test_the_length_of_an_answer(options, tokens, reason):
    async def scenario(it):
        _, done = await it.post("/v1/chat/completions", messages=HELLO, **options)
        assert done["usage"]["completion_tokens"] == tokens
        assert done["choices"][0]["finish_reason"] == reason

    serve(scenario, answer_tokens=10)


@pytest.mark.parametrize(
    ("path", "body", "field", "message"),
    [
        ("chat/completions", {}, "messages", "messages must be a list of at least one message"),
        ("chat/completions", {"messages": [{"role": "king"}]}, "messages", "got 'king'"),
        ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, "messages", "parts with text"),
        ("chat/completions", {"messages": HELLO, "max_tokens": 0}, "max_tokens", "at least 1, got 0"),
        ("chat/completions", {"messages": HELLO, "max_tokens": True}, "max_tokens", "got True"),
        ("chat/completions", {"messages": HELLO, "n": 2}, "n", "n must be 1, got 2"),
        ("chat/completions", {"messages": HELLO, "cache_salt": ""}, "cache_salt", "not empty, got ''"),
        ("completions", {}, "prompt", "one text or one list of token ids"),
        ("completions", {"prompt": ""}, "prompt", "must not be empty"),
        ("completions", {"prompt": ["a", "b"]}, "prompt", "one text or one list of token ids"),
        ("completions", {"prompt": [-1]}, "prompt", "one text or one list of token ids"),
        ("completions", {"prompt": "a", "max_tokens": 2, "min_tokens": 3}, "min_tokens", "at most 2, got 3"),
        ("completions", {"prompt": "a", "max_tokens": 4000}, "max_tokens", "maximum context length is 4000"),
        ("completions", {"prompt": "a" * 16_000}, "max_tokens", "your prompt contains 4000 input tokens"),
        ("responses", {"input": []}, "input", "input must be a list"),
        ("embeddings", {"input": ""}, "input", "must not be empty"),
        ("embeddings", {"input": "a" * 16_000}, "input", "maximum context length is 4000"),
    ],
)
def test_a_bad_request_is_answered_with_an_error(path, body, field, message):
    async def scenario(it):
        status, answer = await it.post(f"/v1/{path}", **body)
        error = answer["error"]
        assert (status, error["code"], error["type"], error["param"]) == (400, 400, "BadRequestError", field)
        assert message in error["message"]

    serve(scenario)


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"prompt": "\\ud800"}', b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(data):
    async def scenario(it):
        async with it.http.post("/v1/completions", data=data) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (400, 400)

    serve(scenario)


def test_another_model_is_not_found():
    async def scenario(it):
        with pytest.raises(openai.NotFoundError, match="The model `gpt` does not exist"):
            await it.openai.chat.completions.create(model="gpt", messages=HELLO)

    serve(scenario)


def test_the_model_is_listed():
    async def scenario(it):
        (model,) = (await it.openai.models.list()).data
        assert (model.id, model.max_model_len) == ("mock", 4000)
        assert await it.get("/health") == ""

    serve(scenario)


def test_text_and_messages_are_tokenized():
    async def scenario(it):
        _, text = await it.post("/tokenize", prompt="abcdef")
        assert (text["count"], text["tokens"]) == (2, [0x64636261, 0xFFFF6665])
        assert await it.post("/detokenize", tokens=text["tokens"]) == (200, {"prompt": "abcdef"})
        _, chat = await it.post("/tokenize", messages=HELLO)
        assert chat["tokens"] == ByteTokenizer().chat([("user", HELLO[0]["content"])]).tolist()
        assert (await it.post("/tokenize"))[0] == (await it.post("/detokenize", tokens="a"))[0] == 400

    serve(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_aborts_its_request(stream):
    async def scenario(it):
        ask = {"prompt": "once upon a time", "max_tokens": 3990, "ignore_eos": True, "stream": stream}
        request = asyncio.ensure_future(it.http.post("/v1/completions", json=ask))
        while it.engine.running == 0:
            await asyncio.sleep(0)
        if stream:
            response = await request
            await response.content.readline()
            response.close()
        else:
            request.cancel()
        while it.engine.running:
            await asyncio.sleep(0)
        assert it.engine.kv_usage_ratio == 0
        assert await metric(it, 'vllm:request_success_total{engine="0",finished_reason="abort"') == [1]
        assert await metric(it, 'vllm:request_success_total{engine="0",finished_reason="length"') == []

    # a tenth of a second a step: 400 s in all, so only an abort ends it in time
    serve(scenario, profile=dataclasses.replace(PROFILE, step_time=lambda *load: 0.1))


def test_metrics_have_the_names_of_vllm():
    async def scenario(it):
        await it.openai.chat.completions.create(model="mock", messages=HELLO, max_tokens=3)
        page = await it.get("/metrics")
        for line in (
            'vllm:num_requests_running{engine="0",model_name="mock"} 0.0',
            'vllm:num_requests_waiting{engine="0",model_name="mock"} 0.0',
            'vllm:kv_cache_usage_perc{engine="0",model_name="mock"} 0.0',
            'vllm:prefix_cache_queries_total{engine="0",model_name="mock"} 10.0',
            'vllm:prefix_cache_hits_total{engine="0",model_name="mock"} 0.0',
            'vllm:generation_tokens_total{engine="0",model_name="mock"} 3.0',
            'vllm:time_to_first_token_seconds_count{engine="0",model_name="mock"} 1.0',
            'vllm:request_time_per_output_token_seconds_count{engine="0",model_name="mock"} 1.0',
            'vllm:e2e_request_latency_seconds_count{engine="0",model_name="mock"} 1.0',
            'vllm:request_success_total{engine="0",finished_reason="length",model_name="mock"} 1.0',
        ):
            assert line in page.splitlines()
        (config,) = (line for line in page.splitlines() if line.startswith("vllm:cache_config_info{"))
        assert 'block_size="4"' in config
        assert 'num_gpu_blocks="1000"' in config

    serve(scenario)


def test_events_come_from_where_the_server_says():
    async def scenario(it):
        await it.openai.chat.completions.create(model="mock", messages=HELLO, max_tokens=3)
        assert await it.post("/reset_prefix_cache") == (200, {"success": True})
        sources = json.loads(await it.get("/kv_event_sources"))
        assert list(sources) == ["0"]  # by data-parallel rank
        source = sources["0"]
        assert source["endpoint"].startswith("tcp://127.0.0.1:")
        assert (source["publisher"], source["topic"]) == ("zmq", "")
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as replay:
            replay.setsockopt(zmq.LINGER, 0)
            replay.connect(source["replay_endpoint"])
            await replay.send_multipart([b"", bytes(8)])
            events, numbers = [], []
            while (message := await replay.recv_multipart())[3]:
                numbers.append(int.from_bytes(message[2], "big"))
                events += msgspec.msgpack.decode(message[3])[1]
        prompt = ByteTokenizer().chat([("user", HELLO[0]["content"])]).tolist()
        assert numbers == list(range(len(numbers)))
        assert (events[0]["type"], events[0]["token_ids"]) == ("BlockStored", prompt[:8])
        assert events[-1] == {"type": "AllBlocksCleared"}

    serve(scenario, events=True)


def test_without_events_there_is_no_source():
    async def scenario(it):
        assert json.loads(await it.get("/kv_event_sources")) == {}

    serve(scenario)


def test_a_reset_while_a_request_is_under_way_has_no_success():
    async def scenario(it):
        ask = {"prompt": "once upon a time", "max_tokens": 3990, "ignore_eos": True}
        request = asyncio.ensure_future(it.http.post("/v1/completions", json=ask))
        while it.engine.running == 0:
            await asyncio.sleep(0)
        assert await it.post("/reset_prefix_cache") == (200, {"success": False})
        request.cancel()

    serve(scenario, profile=dataclasses.replace(PROFILE, step_time=lambda *load: 0.1))


def test_many_requests_at_once_are_all_answered_and_leave_nothing():
    async def scenario(it):
        async def ask(i):
            _, done = await it.post("/v1/completions", prompt=f"request {i}", max_tokens=1 + i % 5)
            return done["usage"]["completion_tokens"]

        assert await asyncio.gather(*(ask(i) for i in range(200))) == [1 + i % 5 for i in range(200)]
        assert it.engine.kv_usage_ratio == 0
        it.engine.check()

    serve(scenario)


def test_an_engine_that_fails_says_so():
    async def scenario(it):
        request = asyncio.ensure_future(it.http.post("/v1/completions", json={"prompt": "a"}))
        with pytest.raises(ZeroDivisionError):
            await it.server.failed()
        request.cancel()

    serve(scenario, profile=dataclasses.replace(PROFILE, step_time=lambda *load: 1 / 0))


@pytest.mark.parametrize(("option", "value"), [("speed", 0.0), ("speed", float("nan")), ("answer_tokens", 0)])
def test_a_bad_option_is_refused(option, value):
    async def scenario():
        with pytest.raises(InvalidArgument, match=f"{option} must be"):
            MockServer(
                MockEngine("gpu-0", PROFILE), ByteTokenizer(), model="m", clock=lambda: 0.0, **{option: value}
            )

    asyncio.run(scenario())

"""The conversation with a proxy, played message by message: what is answered, and what is booked."""

import asyncio
import json
import threading

import pytest
from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as messages
from hypothesis import given
from hypothesis import strategies as st
from made_tokenizer import MadeTokenizer

from mulsched import Lifecycle, Router
from mulsched.adapters.envoy import EndpointPicker, Exchange
from mulsched.errors import InvalidArgument
from mulsched.prompt_reader import PromptReader

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "[fd00::3]:8000"
DESTINATION = "x-gateway-destination-endpoint"
CHAT = json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "Tell me of the sea. " * 20}]}
).encode()
OTHER = json.dumps({"model": "m", "prompt": "Something else altogether. " * 20}).encode()
PROMPTS = PromptReader(4)
FULL, BUFFERED, STREAMED, NONE = (
    ProcessingMode.FULL_DUPLEX_STREAMED,
    ProcessingMode.BUFFERED,
    ProcessingMode.STREAMED,
    ProcessingMode.NONE,
)


def new_picker(*endpoints, prompts=PROMPTS, **options):
    router = Router(block_size=prompts.router_block_size)
    for endpoint in endpoints or (A, B, C):
        router.add_instance(endpoint, cache_blocks=1000)
    times = iter(range(10**6))
    return EndpointPicker(Lifecycle(router), prompts=prompts, clock=lambda: float(next(times)), **options)


def at_once(answer):
    """Return the result of a coroutine that waits for nothing."""
    try:
        answer.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


class Proxy:
    """Plays the data plane of one request."""

    def __init__(self, picker, request=FULL, response=FULL, max_body_bytes=10_000):
        self.exchange = Exchange(picker, max_body_bytes=max_body_bytes)
        self.modes = {"request_body_mode": request, "response_body_mode": response}

    def send(self, kind, value, **more):
        message = messages.ProcessingRequest(**{kind: value}, **more)
        if kind == "request_headers":
            for name, mode in self.modes.items():
                setattr(message.protocol_config, name, mode)
        sent = messages.ProcessingRequest.FromString(message.SerializeToString())
        return at_once(self.exchange.answer(sent))

    def headers(self, end_of_stream=False, subset=None):
        metadata = base_pb2.Metadata()
        if subset is not None:
            metadata.filter_metadata["envoy.lb.subset_hint"].update({f"{DESTINATION}-subset": subset})
        return self.send("request_headers", headers(end_of_stream), metadata_context=metadata)

    def body(self, body, end_of_stream=True):
        return self.send("request_body", messages.HttpBody(body=body, end_of_stream=end_of_stream))

    def ask(self, body=CHAT, **more):
        """Send a request whole; return the endpoints, or the status of the refusal."""
        answers = [*self.headers(**more), *self.body(body)]
        return destination(answers)

    def answered(self, status=b"200", end_of_stream=False, **more):
        return self.send("response_headers", headers(end_of_stream, (":status", status)), **more)

    def piece(self, body=b"data: ...", end_of_stream=False):
        return self.send("response_body", messages.HttpBody(body=body, end_of_stream=end_of_stream))

    def whole(self, body=CHAT):
        """Play a request from its start to its end."""
        endpoint = self.ask(body)
        self.answered()
        self.piece()
        self.piece(end_of_stream=True)
        self.exchange.close()
        return endpoint


def headers(end_of_stream, *pairs):
    values = [base_pb2.HeaderValue(key=key, raw_value=value) for key, value in pairs]
    return messages.HttpHeaders(headers=base_pb2.HeaderMap(headers=values), end_of_stream=end_of_stream)


def destination(answers):
    """Return the endpoint that the answers name, in both places alike, or the status of a refusal."""
    found = set()
    for answer in answers:
        kind = answer.WhichOneof("response")
        if kind == "immediate_response":
            return answer.immediate_response.status.code
        if kind not in ("request_headers", "request_body"):
            continue
        for option in getattr(answer, kind).response.header_mutation.set_headers:
            assert option.header.key == DESTINATION
            assert option.append_action == base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
            found.add(option.header.raw_value.decode())
            found.add(answer.dynamic_metadata["envoy.lb"][DESTINATION])
    assert len(found) == 1
    return found.pop()


def kinds(answers):
    return [answer.WhichOneof("response") for answer in answers]


def streamed(answers, kind="request_body"):
    """Return what a full-duplex stream gives back, and whether it ends."""
    mutations = [getattr(a, kind).response.body_mutation for a in answers if a.WhichOneof("response") == kind]
    pieces = [mutation.streamed_response for mutation in mutations]
    return b"".join(piece.body for piece in pieces), [piece.end_of_stream for piece in pieces]


def load(picker, endpoint):
    found = picker.lifecycle.router.load(endpoint)
    return found["waiting"], found["running"]


def test_a_full_duplex_request_is_held_until_it_is_whole_and_given_back_as_it_came():
    proxy = Proxy(new_picker())
    assert proxy.headers() == []
    assert proxy.body(CHAT[:100], end_of_stream=False) == []
    answers = proxy.body(CHAT[100:])
    assert kinds(answers) == ["request_headers", "request_body", "request_body"]
    assert streamed(answers) == (CHAT, [False, True])
    assert destination(answers) in (A, B, C)


def test_a_buffered_request_is_answered_message_by_message():
    proxy = Proxy(new_picker(), BUFFERED, STREAMED)
    assert kinds(proxy.headers()) == ["request_headers"]
    answers = proxy.body(CHAT)
    assert kinds(answers) == ["request_body"]
    assert destination(answers) in (A, B, C)
    assert kinds(proxy.answered()) == ["response_headers"]
    assert kinds(proxy.piece()) == ["response_body"]
    assert not proxy.piece()[0].response_body.response.HasField("body_mutation")


def test_a_request_with_trailers_is_whole_when_they_come():
    proxy = Proxy(new_picker())
    proxy.headers()
    proxy.body(CHAT, end_of_stream=False)
    answers = proxy.send("request_trailers", messages.HttpTrailers())
    assert kinds(answers) == ["request_headers", "request_body", "request_trailers"]
    assert streamed(answers) == (CHAT, [False])


def test_a_response_is_given_back_as_it_came():
    proxy = Proxy(new_picker())
    proxy.ask()
    proxy.answered()
    assert streamed(proxy.piece(b"one"), "response_body") == (b"one", [False])
    assert streamed(proxy.piece(b"", end_of_stream=True), "response_body") == (b"", [True])
    assert kinds(proxy.send("response_trailers", messages.HttpTrailers())) == ["response_trailers"]


@pytest.mark.parametrize(
    "modes", [(FULL, FULL), (BUFFERED, STREAMED), (BUFFERED, BUFFERED), (BUFFERED, NONE)]
)
def test_a_prompt_goes_where_it_was(modes):
    picker = new_picker()
    first = Proxy(picker, *modes).whole(CHAT)
    elsewhere = Proxy(picker, *modes).whole(OTHER)
    assert elsewhere != first
    assert {Proxy(picker, *modes).whole(CHAT) for _ in range(5)} == {first}
    assert {Proxy(picker, *modes).whole(OTHER) for _ in range(5)} == {elsewhere}


def test_a_burst_does_not_herd():
    picker = new_picker()
    assert {Proxy(picker).ask(CHAT) for _ in range(3)} == {A, B, C}


def test_a_request_waits_then_runs_then_ends():
    picker = new_picker(A)
    proxy = Proxy(picker)
    proxy.ask()
    assert load(picker, A) == (1, 0)
    proxy.answered()
    assert load(picker, A) == (1, 0)
    proxy.piece(b"")
    assert load(picker, A) == (1, 0)
    proxy.piece()
    assert load(picker, A) == (0, 1)
    proxy.piece()
    proxy.piece(b"", end_of_stream=True)
    assert load(picker, A) == (0, 0)
    proxy.exchange.close()
    assert dict(picker.counts) == {"picked": 1, "finished": 1}
    assert picker.lifecycle.counts.repeated == 0


def test_trailers_end_a_response():
    picker = new_picker(A)
    proxy = Proxy(picker)
    proxy.ask()
    proxy.answered()
    proxy.piece()
    proxy.send("response_trailers", messages.HttpTrailers())
    assert picker.counts["finished"] == 1


def test_without_response_bodies_the_headers_are_the_first_token_and_the_stream_the_end():
    picker = new_picker(A)
    proxy = Proxy(picker, BUFFERED, NONE)
    proxy.ask()
    proxy.answered()
    assert load(picker, A) == (0, 1)
    proxy.exchange.close()
    assert picker.counts["finished"] == 1


@pytest.mark.parametrize("stage", ["asked", "answered", "streaming"])
def test_a_stream_that_dies_cancels(stage):
    picker = new_picker(A)
    proxy = Proxy(picker)
    proxy.ask()
    if stage != "asked":
        proxy.answered()
    if stage == "streaming":
        proxy.piece()
    proxy.exchange.close()
    assert load(picker, A) == (0, 0)
    assert picker.counts["cancelled"] == 1
    assert len(picker.lifecycle) == 0


def test_a_stream_that_dies_before_the_choice_books_nothing():
    picker = new_picker(A)
    proxy = Proxy(picker)
    proxy.headers()
    proxy.exchange.close()
    assert not picker.counts


def test_an_error_of_the_engine_leaves_nothing_cached():
    picker = new_picker(A)
    proxy = Proxy(picker)
    proxy.ask()
    proxy.answered(b"400")
    proxy.piece(end_of_stream=True)
    proxy.exchange.close()
    assert dict(picker.counts) == {"picked": 1, "cancelled": 1}
    assert len(picker.lifecycle) == 0
    assert picker.lifecycle.router.select_text("<user>\nTell me of the sea. Tell me").hit_tokens == 0


def test_only_the_subset_is_chosen_from():
    picker = new_picker()
    assert {Proxy(picker).ask(subset=[B]) for _ in range(3)} == {B}
    assert {Proxy(picker).ask(subset=[B, C]) for _ in range(4)} == {B, C}
    assert Proxy(picker).ask(subset=f"{A}, 10.9.9.9:1") == A


@pytest.mark.parametrize("subset", [[], ["10.9.9.9:1"], ""])
def test_a_subset_without_a_known_endpoint_is_refused(subset):
    assert Proxy(new_picker()).ask(subset=subset) == 503


def test_without_endpoints_there_is_503_that_clients_understand():
    picker = new_picker()
    for endpoint in (A, B, C):
        picker.lifecycle.remove_instance(endpoint)
    proxy = Proxy(picker)
    proxy.headers()
    refusal = proxy.body(CHAT)[0].immediate_response
    assert json.loads(refusal.body)["error"]["code"] == refusal.status.code == 503
    assert {h.header.key: h.header.raw_value for h in refusal.headers.set_headers} == {
        "content-type": b"application/json",
        "retry-after": b"1",
    }


def test_a_full_fleet_refuses_with_429_until_one_ends():
    picker = new_picker(A, B, max_in_flight=2)
    proxies = [Proxy(picker) for _ in range(5)]
    assert [proxy.ask() for proxy in proxies][-1] == 429
    assert picker.counts["refused_429"] == 1
    proxies[0].exchange.close()
    assert Proxy(picker).ask() in (A, B)


@pytest.mark.parametrize("mode", [FULL, BUFFERED])
def test_a_body_that_is_too_long_is_refused(mode):
    picker = new_picker()
    proxy = Proxy(picker, mode, max_body_bytes=100)
    assert proxy.ask(b"x" * 101) == 413
    assert len(picker.lifecycle) == 0


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"\xff", b'{"query": "?"}', b"[" * 5_000, b'{"prompt": ""}']
)
def test_a_body_without_a_prompt_goes_where_the_load_is_least(body):
    picker = new_picker(A, B)
    busy = Proxy(picker).ask(CHAT)
    assert Proxy(picker).ask(body) in {A, B} - {busy}
    assert picker.counts["without_prompt"] == 1


def test_a_request_without_a_body_is_not_booked():
    picker = new_picker(A, B)
    busy = Proxy(picker).ask(CHAT)
    proxy = Proxy(picker)
    assert {destination(proxy.headers(end_of_stream=True))} == {A, B} - {busy}
    proxy.answered()
    proxy.piece(end_of_stream=True)
    proxy.exchange.close()
    assert dict(picker.counts) == {"picked": 1}


@pytest.mark.parametrize("mode", [NONE, STREAMED])
def test_where_headers_cannot_wait_for_the_body_the_load_decides(mode):
    picker = new_picker(A, B)
    first, second = (Proxy(picker, mode) for _ in range(2))
    assert {destination(first.headers()), destination(second.headers())} == {A, B}
    assert kinds(first.body(CHAT)) == ["request_body"]
    assert picker.counts["without_prompt"] == 2


def test_fallbacks_are_the_next_best():
    picker = new_picker(fallbacks=1)
    first, second = Proxy(picker).whole(CHAT).split(",")
    Proxy(picker).ask(CHAT)
    chosen = Proxy(picker).ask(OTHER, subset=[first, second])
    assert chosen == f"{second},{first}"
    assert Proxy(picker).ask(CHAT, subset=[first]) == first


@pytest.mark.parametrize("how", ["metadata", "attribute"])
def test_a_request_that_another_endpoint_served_is_booked_there(how):
    picker = new_picker(A, B)
    proxy = Proxy(picker)
    other = {A: B, B: A}[proxy.ask()]
    told = messages.ProcessingRequest()
    if how == "metadata":
        told.metadata_context.filter_metadata["envoy.lb"].update({f"{DESTINATION}-served": other})
        proxy.answered(metadata_context=told.metadata_context)
    else:
        told.attributes["envoy.filters.http.ext_proc"].update({"upstream.address": other})
        proxy.answered(attributes=told.attributes)
    assert load(picker, other) == (1, 0)
    proxy.piece(end_of_stream=True)
    assert dict(picker.counts) == {"picked": 1, "moved": 1, "finished": 1}
    assert Proxy(picker).ask() == other


def test_an_unknown_server_moves_nothing():
    picker = new_picker(A)
    proxy = Proxy(picker)
    proxy.ask()
    told = messages.ProcessingRequest()
    told.metadata_context.filter_metadata["envoy.lb"].update({f"{DESTINATION}-served": "10.9.9.9:1"})
    proxy.answered(metadata_context=told.metadata_context)
    assert load(picker, A) == (1, 0)


def test_an_endpoint_that_goes_takes_its_requests_along():
    picker = new_picker(A, B)
    proxy = Proxy(picker)
    gone = proxy.ask()
    picker.lifecycle.remove_instance(gone)
    proxy.answered()
    proxy.piece(end_of_stream=True)
    proxy.exchange.close()
    assert len(picker.lifecycle) == 0


def test_token_ids_are_routed_as_they_are():
    picker = new_picker()
    first = Proxy(picker).whole(json.dumps({"prompt": list(range(100))}).encode())
    Proxy(picker).whole(OTHER)
    assert Proxy(picker).ask(json.dumps({"prompt": [*range(100), 7, 8]}).encode()) == first


LETTERS = MadeTokenizer(lambda text, *, whole: list(text.encode()))


def test_with_a_tokenizer_a_text_and_its_tokens_are_one_prompt():
    picker = new_picker(prompts=PromptReader(16, LETTERS))
    first = Proxy(picker).whole(json.dumps({"prompt": "sea" * 40}).encode())
    Proxy(picker).whole(OTHER)
    assert Proxy(picker).ask(json.dumps({"prompt": list(b"sea" * 50)}).encode()) == first


def test_with_blocks_of_a_token_a_request_without_a_prompt_goes_where_the_load_is_least():
    picker = new_picker(A, B, prompts=PromptReader(1, LETTERS))
    busy = Proxy(picker).ask(OTHER)
    assert {destination(Proxy(picker).headers(end_of_stream=True))} == {A, B} - {busy}
    assert Proxy(picker).ask(b"{}") in {A, B} - {busy}
    assert picker.counts["without_prompt"] == 1


def test_a_chat_is_the_tokens_of_what_the_models_template_makes_of_it():
    picker = new_picker(prompts=PromptReader(16, LETTERS, lambda body: f"[{body['messages'][0]['content']}]"))
    chat = {"messages": [{"role": "user", "content": "sea" * 40}]}
    first = Proxy(picker).whole(json.dumps(chat).encode())
    Proxy(picker).whole(OTHER)
    assert Proxy(picker).ask(json.dumps({"prompt": list(b"[" + b"sea" * 40 + b"]")}).encode()) == first
    assert picker.lifecycle.router.load(first)["queued_prefill_tokens"] == 122 - 112


def test_a_long_text_is_tokenized_without_holding_up_others():
    async def scenario():
        picker = new_picker(prompts=PromptReader(16, tokenizer))
        long = asyncio.ensure_future(picker.pick(json.dumps({"prompt": "sea" * 4000}).encode(), None))
        while not asked:
            await asyncio.sleep(0)
        assert (await picker.pick(OTHER, None)).decision.columns.request.prompt_tokens == 540
        assert not long.done()
        may_end.set()
        assert (await long).decision.columns.request.prompt_tokens == 12_000

    def encode(text, *, whole):
        if len(text) > 10_000:
            asked.append(text)
            assert may_end.wait(60)
        return list(text.encode())

    asked, may_end, tokenizer = [], threading.Event(), MadeTokenizer(encode)
    asyncio.run(scenario())


def test_tenants_with_different_salts_share_nothing():
    picker = new_picker(A)
    body = json.loads(CHAT)
    Proxy(picker).whole(json.dumps(body | {"cache_salt": "one"}).encode())
    queued = []
    for salt in ("one", "two"):
        proxy = Proxy(picker)
        proxy.ask(json.dumps(body | {"cache_salt": salt}).encode())
        queued.append(picker.lifecycle.router.load(A)["queued_prefill_tokens"])
        proxy.exchange.close()
    assert queued[0] < 16 < queued[1]


STEPS = st.sampled_from(["headers", "body", "end", "trailers", "answered", "error", "piece", "last", "done"])


@given(
    st.lists(STEPS, max_size=12),
    st.sampled_from([FULL, BUFFERED, STREAMED, NONE]),
    st.sampled_from([FULL, NONE]),
)
def test_whatever_a_proxy_sends_nothing_stays_booked(steps, request_mode, response_mode):
    picker = new_picker()
    proxy = Proxy(picker, request_mode, response_mode)
    play = {
        "headers": proxy.headers,
        "body": lambda: proxy.body(CHAT, end_of_stream=False),
        "end": lambda: proxy.body(b""),
        "trailers": lambda: proxy.send("request_trailers", messages.HttpTrailers()),
        "answered": proxy.answered,
        "error": lambda: proxy.answered(b"500"),
        "piece": proxy.piece,
        "last": lambda: proxy.piece(end_of_stream=True),
        "done": lambda: proxy.send("response_trailers", messages.HttpTrailers()),
    }
    for step in ["headers", *steps]:
        play[step]()
    proxy.exchange.close()
    assert len(picker.lifecycle) == 0
    assert [load(picker, endpoint) for endpoint in (A, B, C)] == [(0, 0)] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fallbacks": -1}, "fallbacks must be at least 0, got -1"),
        ({"max_in_flight": 0}, "max_in_flight must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InvalidArgument, match=message):
        new_picker(**options)


def test_router_and_prompts_have_one_block_size():
    with pytest.raises(InvalidArgument, match="block_size must be that of prompts, 16, got 6"):
        EndpointPicker(Lifecycle(Router(block_size=6)), prompts=PROMPTS, clock=lambda: 0.0)


def test_without_a_tokenizer_a_token_id_counts_as_four_characters():
    picker = new_picker(A)
    Proxy(picker).ask(json.dumps({"prompt": list(range(100))}).encode())
    assert picker.lifecycle.router.load(A)["queued_prefill_tokens"] == 400

"""A request's way through the gateway: decided, relayed, tried again, and never ended as if it were whole."""

import asyncio
import json

import pytest
from fake_engine import answers, dies, streams, waits_for_the_end, write_chunk, write_stream_head, write_whole
from gateway_harness import ASK, CHAT, run

STREAM = {**ASK, "stream": True}
FIRST, SECOND, DONE = b'data: {"a":1}\n\n', b'data: {"b":2}\n\n', b"data: [DONE]\n\n"
USAGE = b'data: {"usage":{"prompt_tokens":40,"prompt_tokens_details":{"cached_tokens":32}}}\n\n'


def booked(front):
    """Requests that wait for their first token, and those that have it, over all instances."""
    columns = front.gateway.lifecycle.router.select_text("x").columns
    return int(columns.waiting.sum()), int(columns.running.sum())


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/embeddings"])
def test_an_answer_comes_back_as_the_engine_gave_it(path):
    async def scenario(front):
        status, body, headers = await front.post(path)
        assert (status, body) == (200, {"ok": True})
        assert headers["Content-Type"] == "application/json"
        assert front.engines[0].asked[0].line == f"POST {path} HTTP/1.1"
        assert json.loads(front.engines[0].asked[0].body) == ASK
        assert front.router_is_empty()

    run(scenario, answers())


def test_a_piece_of_a_stream_reaches_the_client_before_the_next_is_there():
    async def scenario(front):
        async with front.http.post(CHAT, json=STREAM) as response:
            assert await response.content.readany() == FIRST  # the engine holds the second back until now
            gate.set()
            assert await response.content.read() == SECOND + DONE
        await front.idle()
        assert front.requests_logged()[0]["outcome"] == "finished"

    gate = asyncio.Event()
    run(scenario, streams(FIRST, gate, SECOND, DONE))


def test_the_first_token_and_the_end_of_a_stream_release_the_booking():
    async def scenario(front):
        sending = asyncio.create_task(front.http.post(CHAT, json=STREAM))
        await front.engines[0].arrived.wait()
        before = booked(front)
        head.set()
        async with await sending as response:
            await response.content.readany()
            during = booked(front)
            gate.set()
            await response.read()
        await front.idle()
        assert (before, during, booked(front)) == ((1, 0), (0, 1), (0, 0))

    head, gate = asyncio.Event(), asyncio.Event()
    run(scenario, streams(head, FIRST, gate, DONE))


def test_a_response_announces_itself_before_its_first_token():
    async def scenario(front):
        async with front.http.post("/v1/responses", json={"input": "hello", "stream": True}) as response:
            await response.content.readany()
            announced = booked(front)
            gate.set()
            await response.content.readany()
            assert (announced, booked(front)) == ((1, 0), (0, 1))
            end.set()
            await response.read()

    gate, end = asyncio.Event(), asyncio.Event()
    created = b'event: response.created\ndata: {"type":"response.created"}\n\n'
    delta = b'data: {"type":"response.output_text.delta","delta":"a"}\n\n'
    run(scenario, streams(created, gate, delta, end, DONE))


def test_a_client_that_goes_away_ends_the_request_at_the_engine():
    async def scenario(front):
        response = await front.http.post(CHAT, json=STREAM)
        await response.content.readany()
        response.close()
        await front.engines[0].asked[0].gone.wait()
        await front.idle()
        assert front.router_is_empty()
        assert front.requests_logged()[0]["outcome"] == "client_gone"

    run(scenario, waits_for_the_end(FIRST))


def test_a_client_that_goes_away_before_the_first_byte_does_too():
    async def scenario(front):
        sending = asyncio.create_task(front.http.post(CHAT, json=STREAM))
        await front.engines[0].arrived.wait()
        sending.cancel()
        await front.engines[0].asked[0].gone.wait()
        await front.idle()
        assert front.router_is_empty()

    run(scenario, waits_for_the_end())


async def _head_only(asked, reader, writer):
    write_stream_head(writer)


async def _half_a_head(asked, reader, writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Ty")


async def _no_http(asked, reader, writer):
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")


@pytest.mark.parametrize("failing", [dies, _head_only, _half_a_head, _no_http, answers(status=503)])
def test_an_instance_that_fails_before_the_first_byte_is_made_up_for_by_another(failing):
    async def scenario(front):
        # both engines are equal, so the first gets it
        status, body, _ = await front.post()
        assert (status, body) == (200, {"ok": True})
        assert [len(engine.asked) for engine in front.engines] == [1, 1]
        assert front.requests_logged()[0]["attempts"] == 2
        assert front.gateway.fleet.engines[front.engines[1].name].counts["retries"] == 1
        assert front.router_is_empty()

    run(scenario, failing, answers())


def test_an_instance_that_takes_no_connection_is_made_up_for_too():
    async def scenario(front):
        await front.engines[0].__aexit__()
        assert (await front.post())[:2] == (200, {"ok": True})

    run(scenario, answers(), answers())


def test_when_all_attempts_fail_the_client_hears_of_it_in_openais_shape():
    async def scenario(front):
        status, body, _ = await front.post()
        assert (status, body["error"]["code"], body["error"]["type"]) == (
            502,
            "engine_failed",
            "server_error",
        )
        assert sum(len(engine.asked) for engine in front.engines) == 2
        assert front.router_is_empty()

    run(scenario, dies, dies, dies, max_attempts=2)


def test_an_engine_that_stays_silent_is_not_made_up_for():
    async def scenario(front):
        status, body, _ = await front.post()
        assert (status, body["error"]["type"]) == (504, "timeout_error")
        assert [len(engine.asked) for engine in front.engines] == [1, 0]
        await front.engines[0].asked[0].gone.wait()

    run(scenario, waits_for_the_end(), answers(), read_timeout_s=0.05)


def test_a_request_has_its_limit_as_a_whole():
    async def scenario(front):
        status, body, _ = await front.post()
        assert (status, body["error"]["code"]) == (504, "request_timeout")
        assert front.router_is_empty()

    run(scenario, waits_for_the_end(), request_timeout_s=0.05)


def test_a_stream_past_that_limit_is_cut_off():
    async def scenario(front):
        answer = await front.raw(request(STREAM))
        assert FIRST in answer
        assert not answer.endswith(b"0\r\n\r\n")
        assert front.requests_logged()[0]["outcome"] == "request_timeout"

    run(scenario, waits_for_the_end(FIRST), request_timeout_s=0.2)


def test_a_stream_that_breaks_off_ends_with_an_error_and_without_its_end():
    async def scenario(front):
        answer = await front.raw(request(STREAM))
        assert FIRST in answer
        assert b'data: {"error":{"message":"the engine broke off"' in answer
        assert not answer.endswith(b"0\r\n\r\n")
        assert b"[DONE]" not in answer
        assert len(front.engines[1].asked) == 0
        assert front.requests_logged()[0]["outcome"] == "engine_broke_off"
        assert front.router_is_empty()

    run(scenario, streams(FIRST, ends=False), answers())


def test_a_whole_answer_that_breaks_off_is_no_whole_answer():
    async def short(asked, reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")

    async def scenario(front):
        head, _, body = (await front.raw(request(ASK))).partition(b"\r\n\r\n")
        assert b"Content-Length: 100" in head
        assert body == b"{"

    run(scenario, short)


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500])
def test_what_an_engine_says_of_a_request_goes_back_and_is_not_tried_again(status):
    async def scenario(front):
        assert (await front.post())[:2] == (status, {"error": "so"})
        assert [len(engine.asked) for engine in front.engines] == [1, 0]
        assert front.router_is_empty()

    run(scenario, answers(b'{"error": "so"}', status=status), answers())


def test_the_only_engines_503_goes_back():
    async def scenario(front):
        assert (await front.post())[:2] == (503, {"error": "so"})

    run(scenario, answers(b'{"error": "so"}', status=503))


def test_no_redirect_is_followed_or_passed_on():
    async def scenario(front):
        status, body, headers = await front.post()
        assert (status, body["error"]["code"]) == (502, "engine_failed")
        assert "Location" not in headers

    run(scenario, answers(status=307, extra=["Location: http://127.0.0.1:1/"]))


def test_equal_prompts_go_where_they_are_cached():
    async def scenario(front):
        ask = {"prompt": "x" * 4000}
        await front.post("/v1/completions", {"prompt": "y" * 4000})
        for _ in range(3):
            await front.post("/v1/completions", ask)
        assert [len(engine.asked) for engine in front.engines] == [1, 3]
        hits = [line["hit"] for line in front.requests_logged()]
        assert hits == [0, 0, 4000 // 64 * 64, 4000 // 64 * 64]

    run(scenario, answers(), answers())


def test_the_engines_own_count_of_cached_tokens_is_kept():
    async def scenario(front):
        async with front.http.post(CHAT, json=STREAM) as response:
            await response.read()
        await front.idle()
        counts = front.gateway.fleet.engines[front.engines[0].name].counts
        assert (counts["reported_prompt_tokens"], counts["reported_cached_tokens"]) == (40, 32)

    run(scenario, streams(FIRST, USAGE, DONE))


def test_a_prompt_that_cannot_be_read_is_the_engines_to_refuse():
    async def scenario(front):
        assert (await front.post(body={"messages": 7}))[:2] == (400, {"error": "so"})

    run(scenario, answers(b'{"error": "so"}', status=400))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b'{"a": \xff}', b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(body):
    async def scenario(front):
        status, answer, _ = await front.post(body=body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert front.engines[0].asked == []

    run(scenario, answers())


def test_requests_beyond_the_limit_are_asked_to_come_again():
    async def scenario(front):
        sending = asyncio.create_task(front.http.post(CHAT, json=STREAM))
        await front.engines[0].arrived.wait()
        status, body, headers = await front.post()
        assert (status, body["error"]["code"], headers["Retry-After"]) == (429, "too_many_requests", "1")
        gate.set()
        await (await sending).read()
        assert (await front.post())[0] == 200

    gate = asyncio.Event()
    run(scenario, streams(gate, b"{}"), max_in_flight=1)


def test_a_slow_reader_holds_the_engine_back_and_not_the_gateways_memory():
    async def endless(asked, reader, writer):
        write_stream_head(writer)
        while True:
            write_chunk(writer, b"data: " + b"x" * 65_536 + b"\n\n")
            await writer.drain()
            sent.append(1)

    async def scenario(front):
        _, writer = await asyncio.open_connection("127.0.0.1", front.port, limit=1)
        writer.write(request(STREAM))
        await front.engines[0].arrived.wait()
        before = -1
        while before != len(sent):  # until nothing moves any more
            before = len(sent)
            for _ in range(200):
                await asyncio.sleep(0)
        assert len(sent) < 1000  # what sockets hold
        writer.close()
        await front.idle()

    sent = []
    run(scenario, endless)


def test_a_gateway_that_stops_lets_requests_end():
    async def scenario(front):
        sending = asyncio.create_task(front.http.post(CHAT, json=STREAM))
        response = await sending
        await response.content.readany()
        stopping = asyncio.create_task(front.gateway.stop())
        await asyncio.sleep(0)
        gate.set()
        assert await response.content.read() == DONE
        await stopping

    gate = asyncio.Event()
    run(scenario, streams(FIRST, gate, DONE))


def request(body, *extra, path=CHAT):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: h", f"Content-Length: {len(data)}", "Connection: close", *extra]
    return "\r\n".join([*lines, "", ""]).encode() + data


def test_the_log_says_where_a_request_went_and_nothing_of_what_it_said():
    async def scenario(front):
        await front.post()
        line = front.requests_logged()[0]
        assert line["instance"] == front.engines[0].name
        assert (line["status"], line["outcome"], line["path"]) == (200, "finished", CHAT)
        assert "secret" not in json.dumps(front.logged)
        for path in ("/metrics", "/instances"):
            assert "secret" not in (await front.get(path))[1]

    run(scenario, answers(b'{"text": "secret"}'))


def test_an_answer_is_sent_in_parts_of_any_size():
    async def scenario(front):
        assert (await front.post())[:2] == (200, body)

    async def bytewise(asked, reader, writer):
        data = json.dumps(body).encode()
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode())
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()

    body = {"a": "b" * 50}
    run(scenario, bytewise)


def test_an_empty_answer_is_an_answer():
    async def nothing(asked, reader, writer):
        write_whole(writer, b"", status=204)

    async def scenario(front):
        async with front.http.post(CHAT, json=ASK) as response:
            assert (response.status, await response.read()) == (204, b"")

    run(scenario, nothing)

"""What clients may and may not: keys, headers, bodies, and bytes that two readers could take differently."""

import asyncio
import json

import pytest
from fake_engine import answers
from gateway_harness import ASK, CHAT, run

BODY = json.dumps(ASK).encode()


def message(*lines, body=BODY, line=f"POST {CHAT} HTTP/1.1"):
    return "\r\n".join([line, "Host: h", *lines, "", ""]).encode("latin-1") + body


LENGTH = f"Content-Length: {len(BODY)}"


def test_without_keys_everyone_may():
    async def scenario(front):
        assert (await front.post())[0] == 200

    run(scenario, answers())


def test_with_keys_each_of_them_may():
    async def scenario(front):
        for key in ("one", "two"):
            assert (await front.post(Authorization=f"Bearer {key}"))[0] == 200

    run(scenario, answers(), api_keys=("one", "two"))


@pytest.mark.parametrize(
    "given", [None, "", "one", "Bearer", "Bearer on", "Bearer onee", "Basic one", "Bearer ö"]
)
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/instances", "/metrics", "/instances/x"])
def test_nobody_else_may(given, path):
    async def scenario(front):
        extra = [] if given is None else [f"Authorization: {given}"]
        line = f"POST {path} HTTP/1.1"
        answer = await front.raw(message(LENGTH, "Connection: close", *extra, line=line))
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b'"type":"authentication_error"' in answer
        assert front.engines[0].asked == []

    run(scenario, answers(), api_keys=("one",))


def test_health_and_the_page_need_no_key():
    async def scenario(front):
        assert (await front.get("/healthz"))[0] == 200
        assert (await front.get("/"))[0] == 200

    run(scenario, answers(), api_keys=("one",))


def test_the_engines_key_replaces_the_clients():
    async def scenario(front):
        await front.post(Authorization="Bearer of-the-client")
        assert front.engines[0].asked[0].header("Authorization") == ["Bearer of-the-engine"]

    run(scenario, answers(), engine_api_key="of-the-engine")


def test_keys_are_in_no_repr():
    async def scenario(front):
        assert "hidden" not in repr(front.gateway.config)

    run(scenario, answers(), api_keys=("hidden",), engine_api_key="hidden-too")


def test_only_named_headers_go_on():
    async def scenario(front):
        sent = {
            "Authorization": "Bearer x",
            "Cookie": "a=b",
            "X_Tenant": "t",
            "X-Other": "o",
            "Accept-Encoding": "gzip",
            "Proxy-Authorization": "p",
            "TE": "trailers",
            "Upgrade": "h2c",
            "traceparent": "00-1-1-01",
            "User-Agent": "me",
        }
        await front.post(**sent)
        names = {name.lower() for name, _ in front.engines[0].asked[0].headers}
        assert names == {
            "host", "accept", "user-agent", "traceparent", "x-tenant", "content-type", "accept-encoding",
            "x-request-id", "content-length",
        }  # fmt: skip
        assert front.engines[0].asked[0].header("Accept-Encoding") == ["identity"]
        assert front.engines[0].asked[0].header("Host") == [front.engines[0].name]

    run(scenario, answers(), forward_headers=("X-Tenant",))


def test_headers_of_a_connection_do_not_come_back():
    async def scenario(front):
        _, _, headers = await front.post()
        assert headers["X-Kept"] == "1"
        assert headers["Server"] != "evil"
        for name in ("X-Named", "Keep-Alive", "Set-Cookie", "Upgrade", "Trailer"):
            assert name not in headers

    extra = ["X-Kept: 1", "Server: evil", "Connection: close, X-Named", "X-Named: 1", "Keep-Alive: 5"]
    run(scenario, answers(extra=[*extra, "Set-Cookie: a=b", "Upgrade: h2c", "Trailer: X"]))


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("mine-1", "mine-1"),
        ("a b", "id-1"),
        ("x" * 129, "id-1"),
        ("", "id-1"),
        ("é", "id-1"),
        ("a/b", "id-1"),
    ],
)
def test_a_clients_request_id_is_kept_if_it_is_harmless(given, shown):
    async def scenario(front):
        answer = await front.raw(message(LENGTH, "Connection: close", f"X-Request-Id: {given}"))
        assert f"X-Request-Id: {shown}\r\n".encode() in answer
        assert front.engines[0].asked[0].header("X-Request-Id") == [shown]
        assert front.requests_logged()[0]["request_id"] == shown

    run(scenario, answers())


def test_two_requests_of_one_id_do_not_touch_each_other():
    async def scenario(front):
        both = await asyncio.gather(*(front.post(X_Request_Id="same") for _ in range(2)))
        assert [status for status, _, _ in both] == [200, 200]
        assert front.gateway.lifecycle.counts.retried == 0

    run(scenario, answers())


@pytest.mark.parametrize(
    "lines",
    [
        [LENGTH, "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", LENGTH],
        [LENGTH, f"Content-Length: {len(BODY) + 1}"],
        [LENGTH, LENGTH],
        [f"Content-Length: +{len(BODY)}"],
        [f"Content-Length: {len(BODY)}, {len(BODY)}"],
        ["Content-Length: -1"],
        ["Content-Length: 0x10"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding : chunked"],
        [LENGTH, " folded: yes"],
        [LENGTH, "X: a\nY: b\x00"],
        [LENGTH, "No colon"],
        [LENGTH, "B\xe4d: name"],
        [LENGTH, "X: " + "a" * 20_000],
    ],
    ids=range(16),
)
def test_a_message_that_can_be_read_two_ways_is_refused_and_its_connection_closed(lines):
    async def scenario(front):
        answer = await front.raw(message(*lines) + b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
        assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
        assert b"200 OK" not in answer
        assert front.engines[0].asked == []
        assert front.requests_logged() == []

    run(scenario, answers())


@pytest.mark.parametrize("line", ["POST / HTTP/1.1 x", "\x16\x03\x01", "POST / HTTP/9.9"])
def test_a_request_line_that_is_none_is_refused(line):
    async def scenario(front):
        assert b" 400 " in (await front.raw(message(line=line, body=b"")))[:20]

    run(scenario, answers())


def test_bad_chunks_are_refused():
    async def scenario(front):
        answer = await front.raw(message("Transfer-Encoding: chunked", body=b"zz\r\n{}\r\n0\r\n\r\n"))
        assert b" 400 " in answer[:20]
        assert front.engines[0].asked == []

    run(scenario, answers())


def test_a_chunked_body_goes_on_with_its_length():
    async def scenario(front):
        chunks = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in BODY) + b"0\r\n\r\n"
        answer = await front.raw(message("Transfer-Encoding: chunked", "Connection: close", body=chunks))
        assert answer.startswith(b"HTTP/1.1 200 ")
        asked = front.engines[0].asked[0]
        assert (asked.body, asked.header("Content-Length")) == (BODY, [str(len(BODY))])

    run(scenario, answers())


def test_a_second_request_in_a_body_stays_a_body():
    async def scenario(front):
        inner = b'{"prompt":"a"}POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}'
        answer = await front.raw(message(f"Content-Length: {len(inner)}", "Connection: close", body=inner))
        assert answer.count(b"HTTP/1.1 400 ") == answer.count(b"HTTP/1.") == 1
        assert front.engines[0].asked == []

    run(scenario, answers())


@pytest.mark.parametrize("lines", [["Content-Length: 1001"], ["Transfer-Encoding: chunked"]])
def test_a_body_beyond_the_limit_is_refused(lines):
    async def scenario(front):
        body = b"3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n" if "chunked" in lines[0] else b"x" * 1001
        answer = await front.raw(message(*lines, "Connection: close", body=body))
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b'"code":"body_too_large"' in answer

    run(scenario, answers(), max_body_bytes=1000)


def test_a_body_of_exactly_the_limit_is_taken():
    async def scenario(front):
        assert (await front.post(body=BODY))[0] == 200

    run(scenario, answers(), max_body_bytes=len(BODY))


def test_a_compressed_body_is_refused():
    async def scenario(front):
        answer = await front.raw(message(LENGTH, "Content-Encoding: gzip", "Connection: close"))
        assert answer.startswith(b"HTTP/1.1 415 ")

    run(scenario, answers())


def test_a_body_that_does_not_come_has_a_limit():
    async def scenario(front):
        answer = await front.raw(message("Content-Length: 99", body=b"{"))
        assert answer.startswith(b"HTTP/1.1 408 ")

    run(scenario, answers(), body_timeout_s=0.05)


def test_a_head_that_does_not_come_has_a_limit():
    async def scenario(front):
        assert await front.raw(b"POST / HTTP/1.1\r\nHo") == b""

    run(scenario, answers(), idle_timeout_s=0.05)


@pytest.mark.parametrize(
    "data", [message("Content-Length: 99", body=b"{"), b"POST / HTTP/1.1\r\nHo", message(LENGTH)]
)
def test_a_client_that_closes_its_half_is_gone(data):
    async def scenario(front):
        await front.raw(data, half_close=True)
        await front.idle()
        assert front.router_is_empty()

    run(scenario, answers())


def test_a_client_may_wait_for_leave_to_send_its_body():
    async def scenario(front):
        answer = await front.raw(message(LENGTH, "Expect: 100-continue", "Connection: close"))
        assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")

    run(scenario, answers())


@pytest.mark.parametrize(
    ("lines", "status"),
    [([LENGTH, "Expect: x"], 417), (["Expect: 100-continue", "Content-Length: 9999"], 413)],
)
def test_a_client_that_may_not_send_its_body_is_told_at_once(lines, status):
    async def scenario(front):
        answer = await front.raw(message(*lines, "Connection: close", body=b""))
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())

    run(scenario, answers(), max_body_bytes=1000)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("GET /v1/chat/completions HTTP/1.1", 405),
        ("POST /v1/models HTTP/1.1", 405),
        ("POST /v1/chat/completions/ HTTP/1.1", 404),
        ("POST /v1/../v1/chat/completions HTTP/1.1", 404),
        ("POST /v1/%63hat/completions HTTP/1.1", 404),
        ("POST //v1/chat/completions HTTP/1.1", 404),
        ("POST /tokenize HTTP/1.1", 404),
        ("POST /reset_prefix_cache HTTP/1.1", 404),
        ("DELETE /instances/x HTTP/1.1", 403),
        ("DELETE /instances HTTP/1.1", 405),
    ],
)
def test_only_known_paths_and_methods_are_served(line, status):
    async def scenario(front):
        answer = await front.raw(message(LENGTH, "Connection: close", line=line))
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert front.engines[0].asked == []

    run(scenario, answers())


def test_an_http_1_0_client_is_served():
    async def scenario(front):
        answer = await front.raw(message(LENGTH, line=f"POST {CHAT} HTTP/1.0"))
        assert b" 200 " in answer[:20]
        assert answer.endswith(b'{"ok": true}')

    run(scenario, answers())


def test_pipelined_requests_are_answered_in_order():
    async def scenario(front):
        answer = await front.raw(message(LENGTH) + message(LENGTH, "Connection: close"))
        assert answer.count(b"HTTP/1.1 200 OK") == 2

    run(scenario, answers())


def test_a_failure_of_the_gateways_own_is_told_and_logged_without_the_request(capfd):
    async def scenario(front):
        def broken(*arguments):
            raise ValueError("the secret of the prompt")

        front.gateway.proxy._choose = broken
        status, body, _ = await front.post()
        assert (status, body["error"]["code"]) == (500, "internal_error")
        await front.raw(message("Content-Length: x"))
        line = next(line for line in front.logged if line["event"] == "internal_error")
        assert line["error"] == "ValueError"
        assert "secret" not in json.dumps(front.logged)

    run(scenario, answers())
    assert "secret" not in "".join(capfd.readouterr())


def test_metric_labels_are_not_for_clients_to_choose():
    async def scenario(front):
        await front.raw(message(LENGTH, "Connection: close", line="POST /chosen HTTP/1.1"))
        assert "chosen" not in (await front.get("/metrics", Authorization="Bearer one"))[1]

    run(scenario, answers(), api_keys=("one",))

"""The picker's gRPC server and its fleet, with a gRPC client in the place of Envoy."""

import asyncio
import socket

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_envoy_exchange import CHAT, A, B, destination, headers, messages, new_picker

from mulsched.adapters.envoy import Fleet, PickerServer, check_endpoint
from mulsched.errors import InvalidArgument


def serve(scenario, picker, **options):
    """Run a scenario with a channel to a server."""

    async def run():
        server = PickerServer(picker, **options)
        port = await server.start("127.0.0.1:0")
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                await scenario(channel)
        finally:
            await asyncio.wait_for(server.stop(), 10)  # the bound below ends only what is above

    asyncio.run(asyncio.wait_for(run(), 30))


def process(channel):
    return external_processor_pb2_grpc.ExternalProcessorStub(channel).Process()


async def ask(stream, body=CHAT):
    await stream.write(messages.ProcessingRequest(request_headers=headers(False)))
    await stream.write(
        messages.ProcessingRequest(request_body=messages.HttpBody(body=body, end_of_stream=True))
    )
    return destination([await stream.read()])


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


def test_a_request_is_picked_and_finished_over_grpc():
    picker = new_picker(A)

    async def scenario(channel):
        stream = process(channel)
        assert await ask(stream) == A
        assert (await stream.read()).WhichOneof("response") == "request_body"
        await stream.write(messages.ProcessingRequest(response_headers=headers(False, (":status", b"200"))))
        assert (await stream.read()).WhichOneof("response") == "response_headers"
        last = messages.HttpBody(body=b"...", end_of_stream=True)
        await stream.write(messages.ProcessingRequest(response_body=last))
        assert (await stream.read()).WhichOneof("response") == "response_body"
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF

    serve(scenario, picker)
    assert dict(picker.counts) == {"picked": 1, "finished": 1}


@pytest.mark.parametrize("how", ["cancelled", "closed", "disconnected"])
def test_a_stream_that_ends_early_cancels(how):
    picker = new_picker(A)

    async def scenario(channel):
        stream = process(channel)
        await ask(stream)
        if how == "cancelled":
            stream.cancel()
        elif how == "closed":
            await stream.done_writing()
        else:
            await channel.close()
        await until(lambda: picker.counts["cancelled"])

    serve(scenario, picker)
    assert len(picker.lifecycle) == 0


def test_a_message_above_the_limit_ends_its_stream_alone():
    picker = new_picker(A)

    async def scenario(channel):
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await ask(process(channel), b"x" * 2**21)
        assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await ask(process(channel)) == A

    serve(scenario, picker, max_body_bytes=10_000)


def test_readiness_needs_an_endpoint_and_liveness_does_not():
    picker = new_picker(A)

    async def scenario(channel):
        health = health_pb2_grpc.HealthStub(channel)

        async def check(service):
            status = (await health.Check(health_pb2.HealthCheckRequest(service=service))).status
            return health_pb2.HealthCheckResponse.ServingStatus.Name(status)

        services = ["", "liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"]
        assert [await check(service) for service in services] == ["SERVING"] * 4
        picker.lifecycle.remove_instance(A)
        ready = [await check(service) for service in services]
        assert ready == ["NOT_SERVING", "SERVING", "NOT_SERVING", "NOT_SERVING"]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await check("another")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND

    serve(scenario, picker)


def test_two_pickers_cannot_share_a_port():
    async def run():
        first = PickerServer(new_picker())
        port = await first.start("127.0.0.1:0")
        try:
            with pytest.raises(OSError, match="cannot listen at"):
                await PickerServer(new_picker()).start(f"127.0.0.1:{port}")
        finally:
            await first.stop()

    asyncio.run(run())


def test_a_port_that_is_taken_is_an_os_error():
    async def run():
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            taken.listen()
            with pytest.raises(OSError, match="cannot listen at"):
                await PickerServer(new_picker()).start(f"127.0.0.1:{port}")

    asyncio.run(run())


@pytest.mark.parametrize("endpoint", ["10.0.0.7:8000", "[fd00::1]:65535"])
def test_an_endpoint_is_an_address_with_a_port(endpoint):
    assert check_endpoint(endpoint) == endpoint


@pytest.mark.parametrize(
    "endpoint",
    ["", "10.0.0.7", "host:80", "http://10.0.0.7:80", "10.0.0.7:0", "10.0.0.7:65536", "fd00::1:80", "[10.0.0.7]:80",
     "10.0.0.7:8O", "10.0.0.7:+80", "10.0.0.7:٨٠", "10.0.0.7:", "10.0.0.7 :80"],
)  # fmt: skip
def test_anything_else_is_none(endpoint):
    with pytest.raises(InvalidArgument, match="must be ip:port"):
        check_endpoint(endpoint)


def test_a_fleet_becomes_what_it_is_set_to_and_watches_what_is_there():
    lifecycle = new_picker(A, B).lifecycle
    for endpoint in (A, B):
        lifecycle.remove_instance(endpoint)
    watched, ended = [], []

    async def watch(endpoint):
        watched.append(endpoint)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(endpoint)

    async def run():
        fleet = Fleet(lifecycle, cache_blocks=10, watches=[watch])
        fleet.set([A])
        fleet.set([A, B, B])
        await until(lambda: watched == [A, B])
        fleet.set([B])
        await until(lambda: ended == [A])
        assert lifecycle.router.instances == (B,)
        fleet.close()
        await until(lambda: ended == [A, B])

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_fleet_follows_a_name_and_outlives_its_dns():
    lifecycle = new_picker(A).lifecycle
    lifecycle.remove_instance(A)

    async def run():
        fleet = Fleet(lifecycle)
        loop = asyncio.get_running_loop()
        answers = [["10.0.0.1", "10.0.0.2"], OSError("no DNS"), ["10.0.0.2", "fd00::3"]]
        seen = []

        async def resolve(name, port, *, type):
            assert (name, port) == ("engines", 8000)
            seen.append(set(lifecycle.router.instances))
            answer = answers[min(len(seen), len(answers)) - 1]
            if isinstance(answer, OSError):
                raise answer
            return [(None, type, 6, "", (host, port)) for host in answer]

        loop.getaddrinfo = resolve
        following = asyncio.ensure_future(fleet.follow("engines", 8000, period_s=0))
        await until(lambda: len(seen) > 3)
        following.cancel()
        return seen[:4]

    assert asyncio.run(asyncio.wait_for(run(), 10)) == [set(), {A, B}, {A, B}, {B, "[fd00::3]:8000"}]

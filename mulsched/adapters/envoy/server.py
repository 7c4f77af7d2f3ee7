"""The endpoint picker as a gRPC server, with health checks."""

from collections.abc import AsyncIterator
from typing import Any

from mulsched.adapters.envoy.exchange import Exchange, messages
from mulsched.adapters.envoy.picker import EndpointPicker
from mulsched.errors import MissingExtra

try:
    import grpc.aio
    from envoy.service.ext_proc.v3 import external_processor_pb2_grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc
except ImportError as error:
    raise MissingExtra("the endpoint picker needs grpcio: pip install 'mulsched[envoy]'") from error

__all__ = ["PickerServer"]

_SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
_MESSAGE_ROOM_BYTES = 2**20  # around a body: headers, metadata


class _Processor:
    def __init__(self, picker: EndpointPicker, max_body_bytes: int) -> None:
        self._picker = picker
        self._max_body_bytes = max_body_bytes

    async def Process(  # noqa: N802
        self, request_iterator: AsyncIterator[messages.ProcessingRequest], context: Any
    ) -> AsyncIterator[messages.ProcessingResponse]:
        exchange = Exchange(self._picker, max_body_bytes=self._max_body_bytes)
        try:
            async for message in request_iterator:
                for answer in await exchange.answer(message):
                    yield answer
        finally:
            exchange.close()


class _Health:
    """Alive always; ready when there is an endpoint."""

    def __init__(self, picker: EndpointPicker) -> None:
        self._picker = picker

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:  # noqa: N802
        if request.service not in ("", "liveness", "readiness", _SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        ready = request.service == "liveness" or bool(self._picker.lifecycle.router.instances)
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if ready else status.NOT_SERVING)

    async def List(self, request: health_pb2.HealthListRequest, context: Any) -> Any:  # noqa: N802
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask with Check")

    Watch = List


class PickerServer:
    """Serves :class:`EndpointPicker` by gRPC, without TLS.

    ``max_body_bytes``: of a request; the default is arbitrary. All streams run on the event loop.
    """

    def __init__(self, picker: EndpointPicker, *, max_body_bytes: int = 16 * 2**20) -> None:
        self.picker = picker
        largest = max_body_bytes + _MESSAGE_ROOM_BYTES
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", largest),
                ("grpc.max_send_message_length", largest),
                # else a second picker may take the same port, and each books half of the requests
                ("grpc.so_reuseport", 0),
            ]
        )
        external_processor_pb2_grpc.add_ExternalProcessorServicer_to_server(
            _Processor(picker, max_body_bytes), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(_Health(picker), self._server)

    async def start(self, address: str) -> int:
        """Listen at ``host:port``, port 0 for a free one; return the port. Raises OSError."""
        try:
            port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen at {address}: {error}") from None
        await self._server.start()
        return port

    async def stop(self, grace_s: float = 0.0) -> None:
        """Stop; streams that are open get ``grace_s`` to end."""
        await self._server.stop(grace_s)

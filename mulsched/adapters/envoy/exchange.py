"""One HTTP request as Envoy's external processing tells it: messages in, messages out, no sockets.

Sources: the messages of ``envoy.service.ext_proc.v3`` (Envoy's API), and the endpoint picker protocol 1.0 of
Kubernetes' Gateway API Inference Extension (its proposal 004), which says where the choice is put, where the
candidates come from, and how a refusal looks.
"""

import json
from collections.abc import Iterable, Mapping
from enum import Enum

from mulsched.adapters.envoy.picker import EndpointPicker, Pick, Refusal
from mulsched.errors import MissingExtra

try:
    from envoy.config.core.v3 import base_pb2
    from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
    from envoy.service.ext_proc.v3 import external_processor_pb2 as messages
    from google.protobuf import struct_pb2
except ImportError as error:
    raise MissingExtra("the endpoint picker needs xds-protos: pip install 'mulsched[envoy]'") from error

__all__ = ["DESTINATION", "Exchange", "messages"]

DESTINATION = "x-gateway-destination-endpoint"
"""The header, and the key in the metadata, that names the chosen endpoint."""

_NAMESPACE, _SUBSET_NAMESPACE = "envoy.lb", "envoy.lb.subset_hint"
_SUBSET, _SERVED = f"{DESTINATION}-subset", f"{DESTINATION}-served"
_ATTRIBUTES, _UPSTREAM = "envoy.filters.http.ext_proc", "upstream.address"
_MODE = processing_mode_pb2.ProcessingMode
_OVERWRITE = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD  # a client may have sent the header
_RETRY_AFTER = {429: b"1", 503: b"1"}


class _Stage(Enum):
    """How far a request is known to be."""

    ASKED = 0
    BEGUN = 1  # its first token came
    ENDED = 2


class Exchange:
    """The conversation about one HTTP request.

    :meth:`answer` takes each message of the proxy and returns what to send back; :meth:`close` is called once
    when the stream is over, however it ended.

    The endpoint is chosen when the whole body is there. In the mode ``FULL_DUPLEX_STREAMED`` the headers are
    answered only then, and the body is given back piece by piece as it came; in ``BUFFERED`` and
    ``BUFFERED_PARTIAL`` the choice goes into the answer to the body. In ``NONE`` and ``STREAMED`` the headers
    leave before there is a body, so that the choice is by load alone. A proxy that does not say its mode is
    taken to be in the first, as the endpoint picker protocol wants it.

    The first piece of a response's body is the first token; its end, the end. Who answered is told by the
    metadata that the protocol wants or by the response attribute ``upstream.address``.

    ``max_body_bytes``: a longer request is refused with 413.
    """

    def __init__(self, picker: EndpointPicker, *, max_body_bytes: int) -> None:
        self._picker = picker
        self._max_body_bytes = max_body_bytes
        self._request_mode = self._response_mode = _MODE.FULL_DUPLEX_STREAMED
        self._subset: list[str] | None = None
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._pick: Pick | None = None
        self._stage = _Stage.ASKED

    async def answer(self, message: messages.ProcessingRequest) -> list[messages.ProcessingResponse]:
        """Return the answers to a message, often one, in their order."""
        if message.HasField("protocol_config"):
            self._request_mode = message.protocol_config.request_body_mode
            self._response_mode = message.protocol_config.response_body_mode
        match message.WhichOneof("request"):
            case "request_headers":
                return await self._request_headers(message)
            case "request_body":
                return await self._request_body(message.request_body)
            case "request_trailers":
                trailers = messages.ProcessingResponse(request_trailers=messages.TrailersResponse())
                held = self._pick is None and self._request_mode == _MODE.FULL_DUPLEX_STREAMED
                return await self._choose_for_body([trailers], end_of_stream=False) if held else [trailers]
            case "response_headers":
                self._response_headers(message)
                return [messages.ProcessingResponse(response_headers=messages.HeadersResponse())]
            case "response_body":
                return [self._response_body(message.response_body)]
            case "response_trailers":
                self._finish()
                return [messages.ProcessingResponse(response_trailers=messages.TrailersResponse())]
        return []

    def close(self) -> None:
        """Take note that nothing more comes: what has not ended was given up."""
        if self._stage is _Stage.BEGUN and self._response_mode == _MODE.NONE:
            self._finish()
        else:
            self._cancel()

    # -- request -----------------------------------------------------------------------------------

    async def _request_headers(
        self, message: messages.ProcessingRequest
    ) -> list[messages.ProcessingResponse]:
        self._subset = _texts(message.metadata_context.filter_metadata, _SUBSET_NAMESPACE, _SUBSET)
        empty = message.request_headers.end_of_stream
        if empty or self._request_mode in (_MODE.NONE, _MODE.STREAMED, _MODE.GRPC):
            # an unread body is worth a booking
            return await self._choose(None if empty else b"", "request_headers")
        if self._request_mode == _MODE.FULL_DUPLEX_STREAMED:
            return []
        return [messages.ProcessingResponse(request_headers=messages.HeadersResponse())]

    async def _request_body(self, body: messages.HttpBody) -> list[messages.ProcessingResponse]:
        if self._request_mode in (_MODE.BUFFERED, _MODE.BUFFERED_PARTIAL):
            return await self._choose(body.body, "request_body")
        if self._request_mode != _MODE.FULL_DUPLEX_STREAMED:
            return [messages.ProcessingResponse(request_body=messages.BodyResponse())]
        self._body.append(body.body)
        self._body_bytes += len(body.body)
        if self._body_bytes > self._max_body_bytes:
            self._body.clear()
            return [_immediate(self._picker.refuse(413, f"the body exceeds {self._max_body_bytes} bytes"))]
        return await self._choose_for_body([], end_of_stream=True) if body.end_of_stream else []

    async def _choose_for_body(
        self, more: list[messages.ProcessingResponse], *, end_of_stream: bool
    ) -> list[messages.ProcessingResponse]:
        """Choose now that the body is whole; give it back after the headers."""
        answers = await self._choose(b"".join(self._body), "request_headers")
        if self._pick is None:
            return answers
        last = len(self._body) - 1
        for i, piece in enumerate(self._body):
            streamed = _streamed(piece, end_of_stream and i == last)
            answers.append(messages.ProcessingResponse(request_body=streamed))
        self._body.clear()
        return answers + more

    async def _choose(self, body: bytes | None, phase: str) -> list[messages.ProcessingResponse]:
        if body is not None and len(body) > self._max_body_bytes:
            return [_immediate(self._picker.refuse(413, f"the body exceeds {self._max_body_bytes} bytes"))]
        if self._pick is None:  # a proxy out of step must not book twice
            chosen = await self._picker.pick(body, self._subset)
            if isinstance(chosen, Refusal):
                return [_immediate(chosen)]
            self._pick = chosen
        endpoints = ",".join(self._pick.endpoints)
        answer = messages.ProcessingResponse()
        common = getattr(answer, phase).response
        common.header_mutation.CopyFrom(_headers([(DESTINATION, endpoints.encode())]))
        common.clear_route_cache = True  # a route may depend on the header
        answer.dynamic_metadata.update({_NAMESPACE: {DESTINATION: endpoints}})
        return [answer]

    # -- response ----------------------------------------------------------------------------------

    def _response_headers(self, message: messages.ProcessingRequest) -> None:
        if self._pick is None:
            return
        served = _served(message)
        if served is not None:
            self._picker.served_by(self._pick, served)
        if not _status(message.response_headers).startswith(b"2"):
            self._cancel()
        elif message.response_headers.end_of_stream:
            self._finish()
        elif self._response_mode == _MODE.NONE:
            self._begin()

    def _response_body(self, body: messages.HttpBody) -> messages.ProcessingResponse:
        if body.body:
            self._begin()
        if body.end_of_stream:
            self._finish()
        if self._response_mode == _MODE.FULL_DUPLEX_STREAMED:
            return messages.ProcessingResponse(response_body=_streamed(body.body, body.end_of_stream))
        return messages.ProcessingResponse(response_body=messages.BodyResponse())

    def _begin(self) -> None:
        if self._pick is not None and self._stage is _Stage.ASKED:
            self._stage = _Stage.BEGUN
            self._picker.first_token(self._pick)

    def _finish(self) -> None:
        if self._pick is not None and self._stage is not _Stage.ENDED:
            self._stage = _Stage.ENDED
            self._picker.finish(self._pick)

    def _cancel(self) -> None:
        if self._pick is not None and self._stage is not _Stage.ENDED:
            self._stage = _Stage.ENDED
            self._picker.cancel(self._pick)


def _served(message: messages.ProcessingRequest) -> str | None:
    """Return the endpoint that answered, as the protocol says it, or as Envoy itself can."""
    told = _texts(message.metadata_context.filter_metadata, _NAMESPACE, _SERVED) or _texts(
        message.attributes, _ATTRIBUTES, _UPSTREAM
    )
    return told[0] if told else None


def _texts(structs: Mapping[str, struct_pb2.Struct], namespace: str, name: str) -> list[str] | None:
    """Return the texts of a field, a list or a text with commas; None if it is not there."""
    # a look-up of what is not there would add it
    if namespace not in structs or name not in structs[namespace].fields:
        return None
    value = structs[namespace].fields[name]
    values = [value] if value.WhichOneof("kind") == "string_value" else value.list_value.values
    texts = (text.strip() for each in values for text in each.string_value.split(","))
    return [text for text in texts if text]


def _status(headers: messages.HttpHeaders) -> bytes:
    for header in headers.headers.headers:
        if header.key == ":status":
            return bytes(header.raw_value) or header.value.encode()
    return b""


def _streamed(body: bytes, end_of_stream: bool) -> messages.BodyResponse:
    answer = messages.BodyResponse()
    streamed = answer.response.body_mutation.streamed_response
    streamed.body = body
    streamed.end_of_stream = end_of_stream
    return answer


def _headers(headers: Iterable[tuple[str, bytes]]) -> messages.HeaderMutation:
    return messages.HeaderMutation(
        set_headers=[
            base_pb2.HeaderValueOption(
                header=base_pb2.HeaderValue(key=key, raw_value=value), append_action=_OVERWRITE
            )
            for key, value in headers
        ]
    )


def _immediate(refusal: Refusal) -> messages.ProcessingResponse:
    """Return a refusal with a body in OpenAI's shape."""
    error = {"message": refusal.message, "type": "endpoint_picker", "param": None, "code": refusal.status}
    headers = [("content-type", b"application/json")]
    if refusal.status in _RETRY_AFTER:
        headers.append(("retry-after", _RETRY_AFTER[refusal.status]))
    answer = messages.ProcessingResponse()
    answer.immediate_response.status.code = refusal.status
    answer.immediate_response.headers.CopyFrom(_headers(headers))
    answer.immediate_response.body = json.dumps({"error": error}).encode()
    answer.immediate_response.details = "mulsched_endpoint_picker"
    return answer

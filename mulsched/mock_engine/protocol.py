"""What clients of OpenAI's API ask for, as far as an engine cares, and what they are answered. No sockets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mulsched.errors import MissingExtra
from mulsched.mock_engine.engine import Tokens
from mulsched.mock_engine.tokenizer import ROLES, Message, Tokenizer

try:
    import msgspec
except ImportError as error:
    raise MissingExtra("the mock engine needs msgspec: pip install 'mulsched[gateway]'") from error

__all__ = [
    "CHAT",
    "COMPLETION",
    "RESPONSES",
    "Api",
    "Ask",
    "Done",
    "Limits",
    "Refused",
    "body_of",
    "embedding_inputs",
    "encode",
    "error_body",
    "messages_of",
    "usage_of",
]

_KINDS = {400: "BadRequestError", 404: "NotFoundError"}
encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class Refused(Exception):
    """A request that is answered with an error. ``parameter``: the field at fault."""

    def __init__(self, message: str, *, parameter: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.status = status


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model allows. ``answer_tokens``: the length of an answer that nothing else decides."""

    model: str
    max_model_len: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for text: ``n_tokens`` of it, which ends for ``finish_reason``, ``stop`` or ``length``."""

    prompt: Tokens
    n_tokens: int
    finish_reason: str
    stream: bool
    include_usage: bool
    cache_salt: str | None


@dataclass(frozen=True, slots=True)
class Done:
    """What is known when an answer ends."""

    text: str
    prompt_tokens: int
    answer_tokens: int
    cached_tokens: int
    finish_reason: str


def error_body(message: str, parameter: str | None, status: int) -> bytes:
    """Return an error in OpenAI's shape, as vLLM fills it in."""
    return encode({"error": {"message": message, "type": _KINDS[status], "param": parameter, "code": status}})


def body_of(data: bytes, limits: Limits) -> Mapping[str, Any]:
    """Return the JSON object of a request for this model. Raises Refused."""
    try:
        body = _decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused(f"the body must be a JSON object, got {type(body).__name__}")
    model = body.get("model")
    if model is not None and model != limits.model:
        raise Refused(f"The model `{model}` does not exist.", parameter="model", status=404)
    return body


def usage_of(done: Done) -> dict[str, Any]:
    """Return the usage of a chat or a completion."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "total_tokens": done.prompt_tokens + done.answer_tokens,
        "completion_tokens": done.answer_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }


def messages_of(body: Mapping[str, Any], field: str = "messages") -> list[Message]:
    """Return a chat's messages; tools come first, as templates put them. Raises Refused."""
    given = body.get(field)
    if not isinstance(given, list) or not given:
        raise Refused(f"{field} must be a list of at least one message", parameter=field)
    tools = body.get("tools")
    messages: list[Message] = [("system", encode(tools).decode())] if tools else []
    for message in given:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise Refused(
                f"a message's role must be one of {', '.join(ROLES)}, got {role!r}", parameter=field
            )
        text = _content(message.get("content"), field)
        calls = message.get("tool_calls")
        messages.append((role, text + encode(calls).decode() if calls else text))
    return messages


def _content(content: Any, field: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise Refused("a message's content must be text or parts with text", parameter=field)
        texts.append(text)
    return "".join(texts)


def _tokens(given: Any, tokenizer: Tokenizer, field: str) -> Tokens:
    """Return the tokens of a prompt: a text, token ids, or a list of one of these."""
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str | list):
        given = given[0]
    if isinstance(given, str):
        return tokenizer.encode(given)
    if not isinstance(given, list) or not all(type(token) is int and 0 <= token < 2**32 for token in given):
        raise Refused(f"{field} must be one text or one list of token ids in 0..2**32-1", parameter=field)
    return np.array(given, dtype=np.uint32)


def embedding_inputs(body: Mapping[str, Any], tokenizer: Tokenizer) -> list[Tokens]:
    """Return the tokens of each input: one or several texts or lists of tokens. Raises Refused."""
    given = body.get("input")
    several = given if isinstance(given, list) and given and isinstance(given[0], str | list) else [given]
    inputs = [_tokens(each, tokenizer, "input") for each in several]
    if any(len(tokens) == 0 for tokens in inputs):
        raise Refused("input must not be empty", parameter="input")
    return inputs


def _whole(body: Mapping[str, Any], field: str, least: int) -> int | None:
    value = body.get(field)
    if value is not None and (type(value) is not int or value < least):
        raise Refused(f"{field} must be a whole number of at least {least}, got {value!r}", parameter=field)
    return value


def _ask(
    body: Mapping[str, Any], prompt: Tokens, limits: Limits, fields: Sequence[str], default: int | None
) -> Ask:
    if body.get("n") not in (None, 1):
        raise Refused(f"n must be 1, got {body['n']!r}", parameter="n")
    if len(prompt) == 0:
        raise Refused("the prompt must not be empty", parameter="prompt")
    given = [value for field in fields if (value := _whole(body, field, 1)) is not None]
    room = limits.max_model_len - len(prompt)
    wanted = given[0] if given else default
    if room < (1 if wanted is None else wanted):
        raise Refused(
            f"This model's maximum context length is {limits.max_model_len} tokens. However, you requested "
            f"{wanted or 1} output tokens and your prompt contains {len(prompt)} input tokens.",
            parameter=fields[0] if wanted else "prompt",
        )
    most = room if wanted is None else wanted
    least = _whole(body, "min_tokens", 0) or 0
    if least > most:
        raise Refused(f"min_tokens must be at most {most}, got {least}", parameter="min_tokens")
    n_tokens = most if body.get("ignore_eos") is True else min(most, max(least, limits.answer_tokens))
    stream = body.get("stream") is True
    options = body.get("stream_options")
    salt = body.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise Refused(f"cache_salt must be a text that is not empty, got {salt!r}", parameter="cache_salt")
    return Ask(
        prompt,
        n_tokens,
        "length" if n_tokens == most else "stop",
        stream,
        isinstance(options, dict) and options.get("include_usage") is True,
        salt,
    )


class Api(Protocol):
    """One way to ask for text. The parts of a stream come with their ends of line."""

    prefix: str

    def read(self, body: Mapping[str, Any], tokenizer: Tokenizer, limits: Limits) -> Ask:
        """Return what is asked for. Raises Refused."""

    def whole(self, name: str, created: int, model: str, done: Done) -> bytes:
        """Return the answer in one piece."""

    def stream(self, name: str, created: int, model: str, include_usage: bool) -> "Stream":
        """Return what writes the answer in pieces."""


class Stream(Protocol):
    """Writes one streamed answer."""

    def first(self) -> bytes:
        """Return what comes before the first text, with it."""

    def text(self, text: str, finish_reason: str | None) -> bytes:
        """Return a piece of text; the last has a ``finish_reason``."""

    def end(self, done: Done) -> bytes:
        """Return what comes after the last text."""


def _event(value: object) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


_DONE = b"data: [DONE]\n\n"


class _ChunkStream:
    """A stream of chunks that differ by their text alone."""

    def __init__(
        self, head: dict[str, Any], first: bytes, before: bytes, after: bytes, include_usage: bool
    ) -> None:
        self._head = head
        self._first = first
        self._include_usage = include_usage
        # '{...}' of the head, without its end, then the choice
        self._before = b"data: " + encode(head)[:-1] + b',"choices":[{"index":0,' + before
        self._after = after

    def first(self) -> bytes:
        return self._first

    def text(self, text: str, finish_reason: str | None) -> bytes:
        end = b"null" if finish_reason is None else encode(finish_reason)
        return (
            self._before
            + encode(text)
            + self._after
            + b',"logprobs":null,"finish_reason":'
            + end
            + b"}]}\n\n"
        )

    def end(self, done: Done) -> bytes:
        if not self._include_usage:
            return _DONE
        return _event({**self._head, "choices": [], "usage": usage_of(done)}) + _DONE


class _Chat:
    prefix = "chatcmpl-"

    def read(self, body: Mapping[str, Any], tokenizer: Tokenizer, limits: Limits) -> Ask:
        prompt = tokenizer.chat(messages_of(body))
        return _ask(body, prompt, limits, ("max_completion_tokens", "max_tokens"), None)

    def whole(self, name: str, created: int, model: str, done: Done) -> bytes:
        message = {"role": "assistant", "content": done.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": done.finish_reason}
        head = {"id": name, "object": "chat.completion", "created": created, "model": model}
        return encode({**head, "choices": [choice], "usage": usage_of(done)})

    def stream(self, name: str, created: int, model: str, include_usage: bool) -> Stream:
        head = {"id": name, "object": "chat.completion.chunk", "created": created, "model": model}
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        first = _event({**head, "choices": [choice]})
        return _ChunkStream(head, first, b'"delta":{"content":', b"}", include_usage)


class _Completion:
    prefix = "cmpl-"

    def read(self, body: Mapping[str, Any], tokenizer: Tokenizer, limits: Limits) -> Ask:
        # 16: what OpenAI and vLLM take where none is given
        return _ask(body, _tokens(body.get("prompt"), tokenizer, "prompt"), limits, ("max_tokens",), 16)

    def whole(self, name: str, created: int, model: str, done: Done) -> bytes:
        choice = {"index": 0, "text": done.text, "logprobs": None, "finish_reason": done.finish_reason}
        head = {"id": name, "object": "text_completion", "created": created, "model": model}
        return encode({**head, "choices": [choice], "usage": usage_of(done)})

    def stream(self, name: str, created: int, model: str, include_usage: bool) -> Stream:
        head = {"id": name, "object": "text_completion", "created": created, "model": model}
        return _ChunkStream(head, b"", b'"text":', b"", include_usage)


class _ResponsesStream:
    """The events that carry the text; those that open and close items and parts are left out."""

    def __init__(self, response: dict[str, Any]) -> None:
        self._response = response
        self._item = {"item_id": f"msg-{response['id']}", "output_index": 0, "content_index": 0}
        self._number = 0

    def first(self) -> bytes:
        return self._named("response.created", response=self._response)

    def text(self, text: str, finish_reason: str | None) -> bytes:
        return self._named("response.output_text.delta", **self._item, delta=text, logprobs=[])

    def end(self, done: Done) -> bytes:
        text = self._named("response.output_text.done", **self._item, text=done.text, logprobs=[])
        return text + self._named("response.completed", response=_finished(self._response, done))

    def _named(self, name: str, **fields: Any) -> bytes:
        event = {"type": name, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + name.encode() + b"\n" + _event(event)


class _Responses:
    prefix = "resp_"

    def read(self, body: Mapping[str, Any], tokenizer: Tokenizer, limits: Limits) -> Ask:
        given = body.get("input")
        messages = [("user", given)] if isinstance(given, str) else messages_of(body, "input")
        if isinstance(body.get("instructions"), str):
            messages.insert(0, ("system", body["instructions"]))
        return _ask(body, tokenizer.chat(messages), limits, ("max_output_tokens",), None)

    def whole(self, name: str, created: int, model: str, done: Done) -> bytes:
        return encode(_finished(_response(name, created, model), done))

    def stream(self, name: str, created: int, model: str, include_usage: bool) -> Stream:
        return _ResponsesStream(_response(name, created, model))


def _response(name: str, created: int, model: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "response",
        "created_at": created,
        "model": model,
        "status": "in_progress",
        "output": [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }


def _finished(response: dict[str, Any], done: Done) -> dict[str, Any]:
    text = {"type": "output_text", "text": done.text, "annotations": []}
    message = {"type": "message", "id": f"msg-{response['id']}", "role": "assistant", "status": "completed"}
    usage = {
        "input_tokens": done.prompt_tokens,
        "input_tokens_details": {"cached_tokens": done.cached_tokens},
        "output_tokens": done.answer_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": done.prompt_tokens + done.answer_tokens,
    }
    return {**response, "status": "completed", "output": [{**message, "content": [text]}], "usage": usage}


CHAT, COMPLETION, RESPONSES = _Chat(), _Completion(), _Responses()

"""What the body of an OpenAI-style request says to the model, for routing by prefix.

A prompt is given as one text, or as token ids where the request has those. The text is not the model's own,
since no chat template is applied: it is a rendering in which equal beginnings stay equal, and which a turn of
a conversation only appends to. Tools come first, where templates put them, then the messages in their order,
each as ``<role>``, its text and its tool calls; ids that a server makes up are left out. What is not text,
such as an image, is replaced by a digest of it.

Nothing here quotes a prompt: neither an error nor the repr of a :class:`Prompt`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mulsched.errors import InvalidArgument, InvalidType

__all__ = ["Prompt", "StandIn", "conversation", "encodable", "parse_prompt", "render", "text_of"]

StandIn = Callable[[str], str]
"""Takes the JSON of content that is not text; returns what stands for it in the text."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as routing needs it: one of ``text`` and ``token_ids`` is None.

    ``continued``: the server puts earlier turns in front that the request does not show.
    """

    text: str | None = field(repr=False)
    token_ids: list[int] | None = field(repr=False)
    model: str | None
    cache_salt: str | None = field(repr=False)
    stream: bool
    continued: bool


def parse_prompt(body: Mapping[str, Any]) -> Prompt:
    """Return the prompt of a chat, completions, responses or embeddings request.

    Several prompts in one request are joined: one engine gets them all. Lone surrogates, which JSON may hold
    and UTF-8 may not, are replaced. O(body).

    Raises InvalidType, InvalidArgument (no prompt, an empty one, token ids outside 0..2**32-1, content nested
    too deeply).
    """
    if not isinstance(body, Mapping):
        raise InvalidType(f"the body must be a JSON object, got {type(body).__name__}")
    text, token_ids = None, None
    try:
        turns = conversation(body, _digest)
        if turns is None:
            text, token_ids = _given(body)
        else:
            text = render(turns)
    except RecursionError:
        raise InvalidArgument("the body is nested too deeply") from None
    if not text and not token_ids:
        raise InvalidArgument("the prompt is empty")
    return Prompt(
        text=None if text is None else encodable(text),
        token_ids=token_ids,
        model=_text_field(body, "model"),
        cache_salt=_text_field(body, "cache_salt"),
        stream=body.get("stream") is True,
        continued=bool(body.get("previous_response_id") or body.get("conversation")),
    )


def conversation(body: Mapping[str, Any], stand_in: StandIn) -> list[tuple[str, str]] | None:
    """Return role and text of each message of a chat or responses request, tools first; None for others.

    Raises InvalidArgument (a message that is not an object).
    """
    messages = body.get("messages")
    if messages is None and "prompt" not in body:
        messages = _items(body)
    if not isinstance(messages, list):
        return None
    tools = body.get("tools")
    turns = [("tools", _json(tools))] if tools else []
    for message in messages:
        if not isinstance(message, dict):
            raise InvalidArgument(f"a message must be an object, got {type(message).__name__}")
        turns.append(_turn(message, stand_in))
    return turns


def render(turns: Iterable[tuple[str, str]]) -> str:
    """Return the turns as one text: the one that a conversation's next request begins with."""
    return "".join(f"<{role}>\n{text}\n" for role, text in turns)


def text_of(content: Any, stand_in: StandIn) -> str:
    """Return a message's content as text: a string, or its parts one after another."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return stand_in(_json(content))
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        parts.append(text if isinstance(text, str) else stand_in(_json(part)))
    return "".join(parts)


def _items(body: Mapping[str, Any]) -> list[Any] | None:
    """Return the messages of a responses request; None if the input is a list of texts or tokens."""
    given, instructions = body.get("input"), body.get("instructions")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not any(isinstance(item, dict) for item in given):
        return None
    return [{"role": "system", "content": instructions}, *given] if instructions else given


def _turn(message: dict[str, Any], stand_in: StandIn) -> tuple[str, str]:
    """Return role and text of a chat message, or of an item of a responses request."""
    if message.get("type") == "function_call_output":
        return "tool", text_of(message.get("output"), stand_in)
    if "role" not in message:
        # reasoning and calls: the model made them, and their ids are not part of the prompt
        return "assistant", _json({k: v for k, v in message.items() if k not in ("id", "call_id", "status")})
    text = text_of(message.get("content"), stand_in)
    calls = message.get("tool_calls")
    calls = calls if isinstance(calls, list) else []
    functions = [call.get("function") for call in calls if isinstance(call, dict)]
    if message.get("function_call"):
        functions.append(message["function_call"])
    return str(message["role"]), text + "".join(f"\n{_json(function)}" for function in functions)


def _given(body: Mapping[str, Any]) -> tuple[str | None, list[int] | None]:
    """Return the text or the token ids of a prompt that is not a conversation."""
    given = body.get("prompt", body.get("input"))
    several = given if isinstance(given, list) and given and isinstance(given[0], str | list) else [given]
    if all(isinstance(each, str) for each in several):
        return "\n".join(several), None
    if all(isinstance(each, list) for each in several):
        tokens = [token for each in several for token in each]
        if all(type(token) is int and 0 <= token < 2**32 for token in tokens):
            return None, tokens
    raise InvalidArgument("a prompt must be texts, a list of messages, or token ids in 0..2**32-1")


def _text_field(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    return encodable(value) if isinstance(value, str) else None


def encodable(text: str) -> str:
    """Return a text without lone surrogates, which UTF-8 has not and tokenizers refuse: they are replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _digest(content: str) -> str:
    return f"<{hashlib.blake2b(content.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

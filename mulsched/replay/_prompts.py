"""What the body of an OpenAI-style request says to the model, as one text."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mulsched.replay._lines import BadLineError

REDACTED = "redacted-by-litellm"  # what LiteLLM writes in place of every message when it does not log them


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt.

    ``content``: the text, or token ids where the request gave those. ``answers``: where in the text a message
    of the assistant begins, and what it says. ``conversation``: the prompt is a list of messages.
    ``continued``: the server puts earlier messages in front, which the log does not show.
    """

    namespace: str
    content: str | list[int]
    answers: tuple[tuple[int, str], ...] = ()
    conversation: bool = False
    continued: bool = False


def render(body: dict[str, Any], model: str | None, stand_in: Callable[[str], str]) -> Prompt:
    """Return the prompt of a chat, completions or responses request.

    Tools come first, then the messages in their order, each as ``<role>``, its text and its tool calls. What
    is not text, such as an image, is ``stand_in`` of its JSON. The template of the model is not applied: what
    matters is that equal beginnings stay equal. Raises BadLineError. O(text).
    """
    namespace = json.dumps([model, body.get("cache_salt")])
    messages = body.get("messages")
    if isinstance(messages, list):
        return _conversation(namespace, body, messages, stand_in)
    given = messages if isinstance(messages, str) else body.get("prompt", body.get("input"))
    if "input" in body and "messages" not in body and "prompt" not in body:
        instructions = body.get("instructions")
        head = [{"role": "system", "content": instructions}] if instructions else []
        items = [{"role": "user", "content": given}] if isinstance(given, str) else given
        if isinstance(items, list):
            return _conversation(namespace, body, [*head, *items], stand_in)
    if isinstance(given, list) and len(given) == 1:
        given = given[0] if isinstance(given[0], str | list) else given
    if isinstance(given, str):
        _check_redacted(given)
        return Prompt(namespace, given)
    if isinstance(given, list) and given and all(type(t) is int and 0 <= t < 2**32 for t in given):
        return Prompt(namespace, given)
    raise BadLineError("a prompt must be one text, a list of messages, or a list of token ids below 2**32")


def _conversation(
    namespace: str, body: dict[str, Any], messages: list[Any], stand_in: Callable[[str], str]
) -> Prompt:
    parts = [f"<tools>\n{_json(body['tools'])}\n"] if body.get("tools") else []
    length = sum(map(len, parts))
    answers = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadLineError(f"a message must be an object, got {type(message).__name__}")
        role, text = _message(message, stand_in)
        _check_redacted(text)
        if role == "assistant":
            answers.append((length, text))
        parts.append(f"<{role}>\n{text}\n")
        length += len(parts[-1])
    continued = bool(body.get("previous_response_id") or body.get("conversation"))
    return Prompt(namespace, "".join(parts), tuple(answers), conversation=True, continued=continued)


def _message(message: dict[str, Any], stand_in: Callable[[str], str]) -> tuple[str, str]:
    """Return role and text of a chat message, or of an item of a responses request."""
    kind = message.get("type", "message")
    if kind == "function_call_output":
        return "tool", text_of(message.get("output"), stand_in)
    if "role" not in message:
        # reasoning and calls: the model made them, and their ids are not part of the prompt
        return "assistant", _json({k: v for k, v in message.items() if k not in ("id", "call_id", "status")})
    text = text_of(message.get("content"), stand_in)
    calls = message.get("tool_calls") or ()
    functions = [call.get("function") for call in calls if isinstance(call, dict)]
    if message.get("function_call"):
        functions.append(message["function_call"])
    return str(message["role"]), text + "".join(f"\n{_json(function)}" for function in functions)


def text_of(content: Any, stand_in: Callable[[str], str]) -> str:
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


def _check_redacted(text: str) -> None:
    # every prompt would be the same, and the whole trace one hit
    if text == REDACTED:
        raise BadLineError(f"the text is {REDACTED!r}: the log does not hold it")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

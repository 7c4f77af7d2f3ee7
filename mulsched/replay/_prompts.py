"""What the body of an OpenAI-style request says to the model, as one text."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mulsched.errors import InvalidArgument
from mulsched.openai_prompt import conversation
from mulsched.openai_prompt import render as rendered
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
    """Return the prompt of a chat, completions or responses request, rendered as for routing.

    What is not text, such as an image, is ``stand_in`` of its JSON. Raises BadLineError. O(text).
    """
    namespace = json.dumps([model, body.get("cache_salt")])
    try:
        turns = conversation(body, stand_in)
    except InvalidArgument as error:
        raise BadLineError(str(error)) from None
    if turns is not None:
        return _conversation(namespace, body, turns)
    messages = body.get("messages")
    given = messages if isinstance(messages, str) else body.get("prompt", body.get("input"))
    if isinstance(given, list) and len(given) == 1:
        given = given[0] if isinstance(given[0], str | list) else given
    if isinstance(given, str):
        _check_redacted(given)
        return Prompt(namespace, given)
    if isinstance(given, list) and given and all(type(t) is int and 0 <= t < 2**32 for t in given):
        return Prompt(namespace, given)
    raise BadLineError("a prompt must be one text, a list of messages, or a list of token ids below 2**32")


def _conversation(namespace: str, body: dict[str, Any], turns: list[tuple[str, str]]) -> Prompt:
    parts, length, answers = [], 0, []
    for role, text in turns:
        _check_redacted(text)
        if role == "assistant":
            answers.append((length, text))
        parts.append(rendered([(role, text)]))
        length += len(parts[-1])
    continued = bool(body.get("previous_response_id") or body.get("conversation"))
    return Prompt(namespace, "".join(parts), tuple(answers), conversation=True, continued=continued)


def _check_redacted(text: str) -> None:
    # every prompt would be the same, and the whole trace one hit
    if text == REDACTED:
        raise BadLineError(f"the text is {REDACTED!r}: the log does not hold it")

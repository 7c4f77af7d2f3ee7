"""One line of a log of OpenAI-style requests, in the shapes that gateways write."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mulsched.openai_prompt import text_of
from mulsched.replay._lines import LIMIT, BadLineError, number
from mulsched.replay._prompts import Prompt, render

# where a line may have them, first match; "" is the line itself
BODIES = ("", "request", "request.body", "body", "request_body", "proxy_server_request.body", "input")
RESPONSES = ("response", "response.body", "response_body", "output", "")
STARTS = ("startTime", "start_time", "request_time", "arrival_time", "timestamp", "time", "ts")
STARTS_OF_RESPONSES = ("created", "created_at")  # whole seconds, so only without the others
ENDS = ("endTime", "end_time")
_UNITS = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))  # from there on a number since 1970 is ns, us, ms


@dataclass(frozen=True, slots=True)
class Logged:
    """A request as it was logged; None where the line does not tell."""

    arrival_s: float
    end_s: float | None
    prompt: Prompt
    prompt_tokens: int | None
    output_tokens: int | None
    answer: str | None
    session: str | None


def parse(
    fields: dict[str, Any],
    stand_in: Callable[[str], str],
    session_field: str | None,
    time_field: str | None,
) -> Logged | None:
    """Return a line's request, or None if no engine answered it with tokens. Raises BadLineError.

    No message quotes the text of a prompt or an answer.
    """
    if _unanswered(fields):
        return None
    body = next(_objects(fields, BODIES, _has_prompt), None)
    if body is None:
        raise BadLineError(
            f"no messages, prompt or input, neither in the line nor in {', '.join(BODIES[1:])}"
        )
    responses = [found for found in _objects(fields, RESPONSES, bool) if found is not body or body is fields]
    model = body.get("model", fields.get("model"))
    session = _field(fields, session_field) if session_field is not None else None
    prompt_tokens, output_tokens = _usage(fields, responses)
    return Logged(
        arrival_s=_arrival(fields, body, responses, time_field),
        end_s=next((_time(fields[end], end) for end in ENDS if fields.get(end) is not None), None),
        prompt=render(body, model if isinstance(model, str) else None, stand_in),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        answer=_answer(fields, responses, stand_in),
        session=None if session in (None, "") else json.dumps(session),
    )


def _unanswered(fields: dict[str, Any]) -> bool:
    """Whether the request failed, was answered from a gateway's cache, or asked for embeddings."""
    response = _object(fields.get("response")) or {}
    for record in (fields, response):
        status = record.get("status_code", record.get("status"))
        if status in ("failure", "failed", "error") or (_whole(status) or 0) >= 400 or record.get("error"):
            return True
    call = f"{fields.get('call_type')} {fields.get('url')} {fields.get('endpoint')} {fields.get('path')}"
    return fields.get("cache_hit") in (True, "True") or "embedding" in call


def _whole(value: Any) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 9:
        return int(value)
    return value if type(value) is int else None


def _object(value: Any) -> dict[str, Any] | None:
    """Return an object, also from its JSON as a string."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _field(fields: dict[str, Any], path: str) -> Any:
    """Return what lies at a path with dots, None if nothing does."""
    value: Any = fields
    for name in path.split(".") if path else ():
        value = (_object(value) or {}).get(name)
    return value


def _objects(
    fields: dict[str, Any], paths: tuple[str, ...], wanted: Callable[[dict[str, Any]], bool]
) -> Iterator[dict[str, Any]]:
    for path in paths:
        found = _object(_field(fields, path))
        if found is not None and wanted(found):
            yield found


def _has_prompt(body: dict[str, Any]) -> bool:
    return any(isinstance(body.get(field), str | list) for field in ("messages", "prompt", "input"))


def _usage(fields: dict[str, Any], responses: list[dict[str, Any]]) -> tuple[int | None, int | None]:
    usages = [usage for record in (*responses, fields) if isinstance(usage := record.get("usage"), dict)]
    usage = usages[0] if usages else fields
    counts = []
    for names, least in ((("prompt_tokens", "input_tokens"), 1), (("completion_tokens", "output_tokens"), 0)):
        found = next((name for name in names if usage.get(name) is not None), None)
        counts.append(None if found is None else number(usage, found, int, least))
    return counts[0], counts[1]


def _answer(
    fields: dict[str, Any], responses: list[dict[str, Any]], stand_in: Callable[[str], str]
) -> str | None:
    """Return what the assistant said, None if the line does not hold it."""
    for response in responses:
        choices = response.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            message = choices[0].get("message")
            return text_of(
                message.get("content") if isinstance(message, dict) else choices[0].get("text"), stand_in
            )
        items = response.get("output")
        if isinstance(items, list):
            messages = [item for item in items if isinstance(item, dict) and "content" in item]
            return "".join(text_of(item["content"], stand_in) for item in messages)
    text = fields.get("response")
    return text if isinstance(text, str) else None


def _arrival(
    fields: dict[str, Any], body: dict[str, Any], responses: list[dict[str, Any]], time_field: str | None
) -> float:
    if time_field is not None:
        return _time(_field(fields, time_field), time_field)
    for names, records in ((STARTS, [fields, body]), (STARTS_OF_RESPONSES, [fields, *responses])):
        for record in records:
            for name in names:
                if record.get(name) is not None:
                    return _time(record[name], name)
    raise BadLineError(f"no time of arrival: none of {', '.join(STARTS + STARTS_OF_RESPONSES)}")


def _time(value: Any, name: str) -> float:
    """Return seconds since 1970. A text without a time zone is taken as UTC."""
    seconds: float | None = None
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            seconds = _float(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = _float(value)
    if seconds is None or not abs(seconds) <= LIMIT:
        raise BadLineError(f"{name} must be a time, a number since 1970 or ISO 8601, got {value!r}")
    return seconds


def _float(value: str | float) -> float | None:
    try:
        ticks = float(value)
    except (ValueError, OverflowError):
        return None
    return next((ticks / unit for least, unit in _UNITS if math.isfinite(ticks) and ticks >= least), ticks)

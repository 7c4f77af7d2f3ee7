"""Answers of the gateway's own: JSON, and errors in the shape that OpenAI's clients read."""

from typing import Any

from mulsched.errors import MissingExtra

try:
    import msgspec
    from aiohttp import web
except ImportError as error:
    raise MissingExtra("the gateway needs aiohttp and msgspec: pip install 'mulsched[gateway]'") from error

__all__ = ["Refused", "error_body", "json_reply", "refusal"]

_TYPES = {
    401: "authentication_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
# Seconds; long enough for a burst to pass, short enough to be waited for. Arbitrary.
_RETRY_AFTER = {429: "1", 503: "2"}


class Refused(Exception):
    """A request that the gateway answers itself, with an error. The message quotes no prompt."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def error_body(status: int, code: str, message: str) -> bytes:
    """Return the JSON of an error."""
    kind = _TYPES.get(status, "invalid_request_error")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": code}})


def refusal(refused: Refused) -> web.Response:
    """Return the answer to a request that is refused."""
    headers = dict(refused.headers)
    if refused.status in _RETRY_AFTER:
        headers["Retry-After"] = _RETRY_AFTER[refused.status]
    body = error_body(refused.status, refused.code, str(refused))
    return web.Response(body=body, status=refused.status, headers=headers, content_type="application/json")


def json_reply(value: Any, *, status: int = 200) -> web.Response:
    """Return a value as JSON, not to be kept."""
    headers = {"Cache-Control": "no-store"}
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")

"""A file that names engines, one a line: ``URL [KV_EVENTS [KV_REPLAY]]``; ``#`` begins a comment."""

from pathlib import Path

from mulsched.errors import InvalidArgument
from mulsched.gateway.config import EngineConfig

__all__ = ["read_engines_file"]


def read_engines_file(path: str) -> dict[str, EngineConfig]:
    """Return the engines by address. Raises OSError, InvalidArgument: names file and line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path} must be text in UTF-8: {error}") from None
    named: dict[str, EngineConfig] = {}
    for number, line in enumerate(lines, 1):
        url, *endpoints = line.partition("#")[0].split() or [""]
        if not url:
            continue
        try:
            if len(endpoints) > 2:
                raise InvalidArgument(f"a URL and up to two endpoints expected, got {line!r}")
            kv_events, kv_replay, *_ = (*endpoints, None, None)
            engine = EngineConfig(url, kv_events, kv_replay)
            if engine.address in named:
                raise InvalidArgument(f"each engine may be given once, got {engine.address} again")
        except InvalidArgument as error:
            raise InvalidArgument(f"{path}, line {number}: {error}") from None
        named[engine.address] = engine
    return named

"""GET with limits, by aiohttp."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mulsched.errors import InvalidEvents, MissingExtra

try:
    import aiohttp
except ImportError as error:
    raise MissingExtra("asking engines needs aiohttp: pip install 'mulsched[events]'") from error

__all__ = ["FAILURES", "Session", "get", "session_or_new"]

Session = aiohttp.ClientSession
FAILURES = (aiohttp.ClientError, TimeoutError, InvalidEvents, OSError)
"""What may become of a request."""

_MAX_PAGE_BYTES = 16 * 2**20


@asynccontextmanager
async def session_or_new(session: Session | None) -> AsyncIterator[Session]:
    """Give the caller's session, or one that is closed at the end."""
    if session is not None:
        yield session
        return
    async with aiohttp.ClientSession() as own:
        yield own


async def get(session: Session, url: str, timeout_s: float) -> bytes | None:
    """Return the body of a page; None if there is no such page. Raises what is in ``FAILURES``.

    A redirect counts as a failure: an engine is not to choose whom else its router asks.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with session.get(url, timeout=timeout, allow_redirects=False) as response:
        if response.status == 404:
            return None
        response.raise_for_status()
        if response.status != 200:
            raise InvalidEvents(f"{url} answers with status {response.status}")
        parts, size = [], 0
        async for part in response.content.iter_any():
            size += len(part)
            if size > _MAX_PAGE_BYTES:
                raise InvalidEvents(f"{url} sends more than {_MAX_PAGE_BYTES} bytes")
            parts.append(part)
        return b"".join(parts)

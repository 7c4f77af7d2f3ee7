"""Keys that a request may bear."""

import hmac
from collections.abc import Iterable

from mulsched.errors import MissingExtra

try:
    from aiohttp import web
except ImportError as error:
    raise MissingExtra("the gateway needs aiohttp: pip install 'mulsched[gateway]'") from error

__all__ = ["Keys"]


class Keys:
    """Some keys, any of which does."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self._keys)

    def opened_by(self, request: web.BaseRequest) -> bool:
        """Return whether the request has one of the keys, in a time that tells nothing of them."""
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        sent = key.strip().encode("utf-8", "surrogateescape")
        known = False
        for own in self._keys:
            known |= hmac.compare_digest(sent, own)
        return known and scheme.lower() == "bearer"

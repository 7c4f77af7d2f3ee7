"""The models that an engine serves, as it lists them."""

from typing import Any

from mulsched.errors import MissingExtra

try:
    import aiohttp
    import msgspec
    from yarl import URL
except ImportError as error:
    raise MissingExtra("the gateway needs aiohttp and msgspec: pip install 'mulsched[gateway]'") from error

__all__ = ["Models", "fetch_models"]

Models = dict[str, dict[str, Any]]
"""By name, as the engine describes them; one that has a ``parent`` is an adapter of that model."""

_MAX_BYTES = 2**20


async def fetch_models(
    session: aiohttp.ClientSession, url: URL, *, key: str | None, timeout: aiohttp.ClientTimeout
) -> Models:
    """Return the models of ``/v1/models``; empty if the engine does not tell."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        async with session.get(url, headers=headers, timeout=timeout, allow_redirects=False) as response:
            if response.status != 200:
                return {}
            data = b""
            async for piece in response.content.iter_any():
                data += piece
                if len(data) > _MAX_BYTES:
                    return {}
        models = msgspec.json.decode(data, type=dict[str, Any]).get("data")
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError, RecursionError):
        return {}
    return {
        model["id"]: model
        for model in (models if isinstance(models, list) else ())
        if isinstance(model, dict) and isinstance(model.get("id"), str)
    }

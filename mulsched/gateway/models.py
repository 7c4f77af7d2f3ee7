"""The models of all engines in one list."""

import asyncio
from typing import Any

from mulsched.errors import MissingExtra
from mulsched.gateway.config import GatewayConfig
from mulsched.gateway.fleet import Engine, Fleet
from mulsched.gateway.replies import Refused

try:
    import aiohttp
    import msgspec
except ImportError as error:
    raise MissingExtra("the gateway needs aiohttp and msgspec: pip install 'mulsched[gateway]'") from error

__all__ = ["list_models"]

_MAX_BYTES = 2**20


async def list_models(config: GatewayConfig, fleet: Fleet, session: aiohttp.ClientSession) -> dict[str, Any]:
    """Return OpenAI's list: each model once, as the first engine that has it describes it. Raises Refused."""
    names = fleet.eligible()
    if not names:
        raise Refused(503, "no_engine", "no engine is ready")
    lists = await asyncio.gather(*(_models_of(config, fleet.engines[name], session) for name in names))
    if all(models is None for models in lists):
        raise Refused(502, "engine_failed", "no engine told its models")
    found: dict[str, Any] = {}
    for model in (model for models in lists for model in models or ()):
        if isinstance(model, dict) and isinstance(model.get("id"), str):
            found.setdefault(model["id"], model)
    return {"object": "list", "data": list(found.values())}


async def _models_of(
    config: GatewayConfig, engine: Engine, session: aiohttp.ClientSession
) -> list[Any] | None:
    key = config.engine_api_key
    try:
        async with session.get(
            engine.url("/v1/models"),
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=aiohttp.ClientTimeout(total=config.health_timeout_s),
            allow_redirects=False,
        ) as response:
            if response.status != 200:
                return None
            data = b""
            async for piece in response.content.iter_any():
                data += piece
                if len(data) > _MAX_BYTES:
                    return None
        models = msgspec.json.decode(data, type=dict[str, Any]).get("data")
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError, RecursionError):
        return None
    return models if isinstance(models, list) else None

"""An operator of a gateway: adds engines and removes them, and waits for what becomes of it."""

import asyncio
import json

from gateway_harness import Front
from kv_publisher import until

ADMIN = {"Authorization": "Bearer admin"}


async def add(front, url, headers=ADMIN, **endpoints):
    async with front.http.post("/instances", json={"url": url, **endpoints}, headers=headers) as response:
        return response.status, json.loads(await response.read())


async def remove(front, name, headers=ADMIN):
    async with front.http.delete(f"/instances/{name}", headers=headers) as response:
        return response.status, json.loads(await response.read())


async def gone(front, name):
    await until(lambda: name not in front.gateway.fleet.engines)


async def ready(front, name):
    await until(lambda: name in front.gateway.fleet.eligible())


def guarded(scenario):
    async def within_a_minute():
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(within_a_minute())


def front(*answers, **options):
    return Front(answers, admin_keys=("admin",), **options)


def names(front):
    return sorted(front.gateway.fleet.engines)


def encode(text, *, whole):
    return list(text.encode())

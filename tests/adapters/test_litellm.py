"""The LiteLLM adapter in LiteLLM's own router, before HTTP servers. Opt in with ``-m litellm``."""

import asyncio
import os
from collections import Counter
from contextlib import asynccontextmanager

import pytest

pytestmark = [pytest.mark.litellm, pytest.mark.filterwarnings("default")]
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks the network

ANSWER = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


class Engines:
    """Three servers: who was asked, who fails, and a gate before the answers."""

    def __init__(self):
        self.asked = []
        self.failing = set()
        self.gate = asyncio.Event()
        self.gate.set()

    def handler(self, name):
        from aiohttp import web

        async def answer(request):
            self.asked.append(name)
            await self.gate.wait()
            if name in self.failing:
                return web.json_response({"error": "broken"}, status=500)
            return web.json_response(ANSWER)

        return answer


@asynccontextmanager
async def engines_behind_litellm(**options):
    import litellm
    from aiohttp import web

    from mulsched.adapters.litellm import install

    engines, runners, models = Engines(), [], []
    for name in ("d0", "d1", "d2"):
        app = web.Application()
        app.router.add_post("/v1/chat/completions", engines.handler(name))
        runners.append(web.AppRunner(app))
        await runners[-1].setup()
        site = web.TCPSite(runners[-1], "127.0.0.1", 0)
        await site.start()
        host, port = runners[-1].addresses[0]
        parameters = {"model": "openai/m", "api_base": f"http://{host}:{port}/v1", "api_key": "none"}
        models.append({"model_name": "m", "litellm_params": parameters, "model_info": {"id": name}})
    router = litellm.Router(model_list=models, allowed_fails=0, cooldown_time=60, retry_after=0, **options)
    strategy = install(router, prefill_tokens_per_s=1.0)
    try:
        yield engines, router, strategy.bodies.lifecycle
    finally:
        for runner in runners:
            await runner.cleanup()


def chat(text):
    return {"model": "m", "messages": [{"role": "user", "content": text}]}


async def until(condition):
    """Let the loop run: LiteLLM logs an end after the answer, and gives nothing to wait for."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_conversation_stays_with_the_deployment_that_holds_its_prefix():
    async def run():
        async with engines_behind_litellm() as (engines, router, lifecycle):
            for topic in "abc":
                for turn in range(4):
                    await router.acompletion(**chat(topic * 1000 + "!" * turn))
                    await until(lambda: len(lifecycle) == 0)
            return engines.asked

    asked = asyncio.run(run())
    assert [len(set(asked[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1]
    assert len(set(asked)) == 3


def test_by_default_a_prompt_stays_queued_until_its_request_ends():
    import litellm

    from mulsched.adapters.litellm import install

    model = {"model_name": "m", "litellm_params": {"model": "openai/m"}, "model_info": {"id": "d0"}}
    router = litellm.Router(model_list=[model])
    strategy = install(router, clock=iter((0.0, 3000.0)).__next__)
    for text in ("a" * 1000, "b" * 1000):
        strategy.get_available_deployment(**chat(text))
    assert strategy.bodies.lifecycle.router.load("d0")["waiting"] == 2


def test_concurrent_requests_do_not_herd():
    async def run():
        async with engines_behind_litellm() as (engines, router, _):
            engines.gate.clear()
            calls = [asyncio.ensure_future(router.acompletion(**chat(f"{i} " * 300))) for i in range(12)]
            await until(lambda: len(engines.asked) == 12)
            engines.gate.set()
            await asyncio.gather(*calls)
            return engines.asked

    assert sorted(Counter(asyncio.run(run())).values()) == [4, 4, 4]


def test_a_failed_deployment_cools_down_and_its_request_is_tried_elsewhere():
    async def run():
        async with engines_behind_litellm(num_retries=2) as (engines, router, lifecycle):
            await router.acompletion(**chat("a" * 1000))
            await until(lambda: len(lifecycle) == 0)
            engines.failing = {engines.asked[0]}
            for _ in range(3):
                await router.acompletion(**chat("a" * 1000))
                await until(lambda: len(lifecycle) == 0)
            return engines.asked

    first, again, *elsewhere = asyncio.run(run())
    assert again == first
    assert first not in elsewhere
    assert len(set(elsewhere)) == 1


def test_synchronous_calls_respect_cooldowns_too():
    async def run():
        async with engines_behind_litellm(num_retries=2) as (engines, router, lifecycle):
            await router.acompletion(**chat("a" * 1000))
            await until(lambda: len(lifecycle) == 0)
            engines.failing = {engines.asked[0]}
            await router.acompletion(**chat("a" * 1000))
            await until(lambda: len(lifecycle) == 0)
            await asyncio.to_thread(router.completion, **chat("a" * 1000))
            await until(lambda: len(lifecycle) == 0)
            return engines.asked

    first, _, elsewhere, last = asyncio.run(run())
    assert first != elsewhere == last


def test_a_request_that_fails_everywhere_leaves_nothing_booked():
    async def run():
        async with engines_behind_litellm(num_retries=0) as (engines, router, lifecycle):
            engines.failing = {"d0", "d1", "d2"}
            with pytest.raises(Exception, match="500"):
                await router.acompletion(**chat("a"))
            await until(lambda: len(lifecycle) == 0)
            return lifecycle.router.instances, [lifecycle.router.index.blocks(d) for d in ("d0", "d1", "d2")]

    assert asyncio.run(run()) == (("d0", "d1", "d2"), [0, 0, 0])


def test_two_routers_in_one_process_each_hear_of_their_own_requests():
    async def run():
        async with (
            engines_behind_litellm() as (_, router, lifecycle),
            engines_behind_litellm() as (_, other, others),
        ):
            await router.acompletion(**chat("a"))
            await other.acompletion(**chat("b"))
            await until(lambda: len(lifecycle) == len(others) == 0)

    asyncio.run(run())

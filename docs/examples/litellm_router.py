"""LiteLLM before three mock engines: prints which of them answers each turn of three conversations.

Start them first: ``mulsched mock-engine --count 3 --port 8000``.
"""

import asyncio

import litellm

from mulsched.adapters.litellm import install


async def main() -> None:
    """Run three conversations of three turns."""
    models = [
        {
            "model_name": "mock",
            "litellm_params": {
                "model": "openai/mock",
                "api_base": f"http://127.0.0.1:{port}/v1",
                "api_key": "-",
            },
            "model_info": {"id": str(port)},
        }
        for port in (8000, 8001, 8002)
    ]
    router = litellm.Router(model_list=models)
    install(router, cache_tokens=100_000)
    for turn in range(3):
        for topic in "abc":
            messages = [{"role": "user", "content": topic * 2000 + "!" * turn}]
            answer = await router.acompletion(model="mock", messages=messages, max_tokens=4)
            print(topic, turn, answer._hidden_params["model_id"])


if __name__ == "__main__":
    asyncio.run(main())

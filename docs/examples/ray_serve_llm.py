"""Ray Serve LLM behind the router: prints how much of each turn of three conversations was cached.

``python ray_serve_llm.py MODEL``, a directory or a name on Hugging Face's hub; ``--cpu`` for vLLM on CPUs.
"""

import argparse
import json
import urllib.request
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig, build_openai_app


def ask(body: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a chat request."""
    request = urllib.request.Request(
        "http://127.0.0.1:8000/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    llm = LLMConfig(
        model_loading_config={"model_id": "llm", "model_source": given.model},
        accelerator_config={"kind": "cpu" if given.cpu else "gpu"},
        engine_kwargs={
            "enable_prompt_tokens_details": True,
            "max_model_len": 512,
            "enforce_eager": given.cpu,  # spares the compilation
        },
        deployment_config={
            "num_replicas": 2,
            "request_router_config": RequestRouterConfig(
                request_router_class="mulsched.adapters.ray_serve:LMetricRequestRouter",
                request_router_kwargs={"cache_tokens": 100_000},
            ),
        },
    )
    ray.init(num_cpus=8, include_dashboard=False)  # two for each replica, whether there are so many or not
    serve.run(build_openai_app({"llm_configs": [llm]}))
    for turn in range(3):
        for topic in ("red", "green", "blue"):
            messages = [{"role": "user", "content": f"{topic} " * 60 + "!" * turn}]
            usage = ask({"model": "llm", "messages": messages, "max_tokens": 8})["usage"]
            cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
            print(f"{topic} {turn}: {cached} of {usage['prompt_tokens']} tokens cached")
    serve.shutdown()

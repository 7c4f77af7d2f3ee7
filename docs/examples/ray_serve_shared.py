"""Four replicas and two processes that send at once: prints how many requests each replica got."""

import asyncio
import os
from collections import Counter

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig


@serve.deployment(
    num_replicas=4,
    ray_actor_options={"num_cpus": 0},
    request_router_config=RequestRouterConfig(
        request_router_class="mulsched.adapters.ray_serve:LMetricRequestRouter",
        request_router_kwargs={"shared": True, "shared_timeout_s": 5},
    ),
)
class Engine:
    """Stands for an engine that takes a second."""

    async def __call__(self, body: dict) -> int:
        """Return which replica this is."""
        await asyncio.sleep(1)
        return os.getpid()


@ray.remote(num_cpus=0)
class Front:
    """Stands for a proxy: a process with a handle of its own."""

    def __init__(self) -> None:
        self.engines = serve.get_deployment_handle("Engine", "default")

    def send(self, prompts: list[str]) -> list[int]:
        """Return which replicas answered."""
        answers = [self.engines.remote({"prompt": prompt}) for prompt in prompts]
        return [answer.result() for answer in answers]


if __name__ == "__main__":
    ray.init(num_cpus=1, include_dashboard=False)
    serve.start(proxy_location="Disabled")
    serve.run(Engine.bind(), route_prefix=None)
    fronts = [Front.remote() for _ in range(2)]
    for turn in range(3):
        prompts = [f"{turn} {number} " * 500 for number in range(2)]
        answers = ray.get([front.send.remote(prompts) for front in fronts])
        print(turn, Counter(pid for pids in answers for pid in pids))
    serve.shutdown()

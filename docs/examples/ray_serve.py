"""Three replicas behind the router: prints which of them answers each turn of three conversations."""

import os

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig


@serve.deployment(
    num_replicas=3,
    ray_actor_options={"num_cpus": 0},
    request_router_config=RequestRouterConfig(
        request_router_class="mulsched.adapters.ray_serve:LMetricRequestRouter",
        request_router_kwargs={"cache_tokens": 100_000},
    ),
)
class Engine:
    """Stands for an engine."""

    async def __call__(self, body: dict) -> int:
        """Return which replica this is."""
        return os.getpid()


if __name__ == "__main__":
    ray.init(num_cpus=1, include_dashboard=False)
    serve.start(proxy_location="Disabled")
    engines = serve.run(Engine.bind(), route_prefix=None)
    for turn in range(3):
        for topic in "abc":
            messages = [{"role": "user", "content": topic * 2000 + "!" * turn}]
            print(topic, turn, engines.remote({"messages": messages}).result())
    serve.shutdown()

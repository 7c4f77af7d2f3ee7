"""Routers of several processes that share one actor, in a real Ray cluster of three nodes on this machine.

Opt in with ``-m ray``, where ray[serve] is installed.
"""

import asyncio
import os
import time
from collections import Counter

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]

REPLICAS = 4
RATE = 1e9  # first tokens at once: the engine below has no prefill


@pytest.fixture(scope="module")
def cluster():
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False},
    )
    for name in ("a", "b"):
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, resources={name: 1})
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}},
    )
    serve.start(proxy_location="Disabled")
    yield cluster
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def deploy(name, **options):
    """Return processes on two nodes, each with a handle of its own to an application's replicas."""
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    @serve.deployment(
        num_replicas=REPLICAS,
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1,
        request_router_config=RequestRouterConfig(
            request_router_class="mulsched.adapters.ray_serve:LMetricRequestRouter",
            request_router_kwargs={"cache_tokens": 100_000, "prefill_tokens_per_s": RATE, **options},
        ),
    )
    class Engine:
        def __init__(self):
            self.open = asyncio.Event()

        async def __call__(self, body):
            return os.getpid()

        async def wait(self, body):
            await asyncio.wait_for(self.open.wait(), timeout=60)
            return os.getpid()

        async def release(self):
            self.open.set()

        async def die(self, body):
            os._exit(1)

    @ray.remote(num_cpus=0)
    class Front:
        def __init__(self):
            from ray import serve

            self.handle = serve.get_deployment_handle("Engine", name)
            self.handle.remote({"prompt": "here I am"}).result(timeout_s=60)

        def node(self):
            import ray

            return ray.get_runtime_context().get_node_id()

        def ask(self, body):
            return self.handle.remote(body).result(timeout_s=60)

        def die(self, body):
            try:
                self.handle.die.remote(body).result(timeout_s=60)
            except Exception:
                return True

        def start(self, bodies):
            self.waiting = [self.handle.wait.remote(body) for body in bodies]

        def collect(self):
            return [response.result(timeout_s=60) for response in self.waiting]

        def release(self):
            self.handle.broadcast("release").results(timeout_s=60)

        def state(self):
            router = self.handle._router._asyncio_router._request_router
            return router.shared.local_decisions if router.shared else 0, len(router.bodies.lifecycle)

    serve.run(Engine.bind(), name=name, route_prefix=None)
    return [Front.options(resources={node: 0.01}).remote() for node in ("a", "b")]


@pytest.fixture(scope="module")
def fronts(cluster):
    return deploy("shared", shared=True, shared_timeout_s=20)


def get(reference):
    import ray

    return ray.get(reference, timeout=90)


def actor(name="shared"):
    import ray

    return ray.get_actor(f"{name}#Engine", namespace="mulsched")


def booked():
    """Return how many requests the actor has at each replica."""

    def loads(shared):
        router = shared.bodies.lifecycle.router
        return [sum(router.load(name)[key] for key in ("running", "waiting")) for name in router.instances]

    return get(actor().__ray_call__.remote(loads))


def until(condition, timeout_s=60):
    """Poll: Ray tells of ends and deaths from its own threads and processes, and gives nothing to wait for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def chat(text):
    return {"messages": [{"role": "user", "content": text}]}


def answers_to_bursts(fronts, prompts):
    """Send a burst from every process at once; return how many requests each replica got."""
    for front in fronts:
        front.start.remote(prompts)
    for front in fronts:
        get(front.state.remote())  # calls of a process are in order: all are sent
    get(fronts[0].release.remote())
    return Counter(pid for front in fronts for pid in get(front.collect.remote()))

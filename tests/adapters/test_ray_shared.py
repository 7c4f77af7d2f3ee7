"""Routers of several processes that share one actor, in a real Ray cluster of two nodes on this machine.

Opt in with ``-m ray``, where ray[serve] is installed.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections import Counter
from functools import partial

import pytest
from ray_calls import chat, until

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]

REPLICAS = 4

until_told = partial(until, timeout_s=60)


@pytest.fixture(scope="module")
def cluster():
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True, head_node_args={**node, "resources": {"a": 1}, "include_dashboard": False}
    )
    cluster.add_node(**node, resources={"b": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    yield cluster
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def deploy(name, replicas, **options):
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    @serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1,
        request_router_config=RequestRouterConfig(
            request_router_class="mulsched.adapters.ray_serve:LMetricRequestRouter",
            request_router_kwargs={"cache_tokens": 100_000, "prefill_tokens_per_s": 1, **options},
        ),
    )
    class Engine:
        def __init__(self):
            self.gates = {}

        def gate(self, burst):
            return self.gates.setdefault(burst, asyncio.Event())

        async def __call__(self, body):
            return os.getpid()

        async def wait(self, body, burst):
            await asyncio.wait_for(self.gate(burst).wait(), timeout=60)
            return os.getpid()

        async def release(self, burst):
            self.gate(burst).set()

        async def die(self, body):
            os._exit(1)

    serve.run(Engine.bind(), name=name, route_prefix=None)


def test_by_default_a_prompt_stays_queued_until_its_request_ends():
    from mulsched.adapters.ray_serve import LMetricRequestRouter

    router = object.__new__(LMetricRequestRouter)  # as Ray makes it, without Ray
    router.initialize_state()
    router.bodies.set_instances(["a"])
    for number, now in enumerate((0.0, 3000.0)):
        router.bodies.reserve({"prompt": f"{number}" * 1000}, request_id=number, now=now)
    assert router.bodies.lifecycle.router.load("a")["waiting"] == 2


class Front:
    """A process with a handle to the replicas of an application."""

    def use(self, application):
        from ray import serve

        self.handle = serve.get_deployment_handle("Engine", application)

    def ask(self, body):
        return self.handle.remote(body).result(timeout_s=60)

    def die(self, body):
        with contextlib.suppress(Exception):
            self.handle.die.remote(body).result(timeout_s=60)

    def start(self, bodies, burst):
        self.waiting = [self.handle.wait.remote(body, burst) for body in bodies]

    def release(self, burst):
        self.handle.broadcast("release", burst).results(timeout_s=60)

    def collect(self):
        return [response.result(timeout_s=60) for response in self.waiting]

    def local_decisions(self):
        return self.router().shared.local_decisions

    def booked(self):
        return len(self.router().bodies.lifecycle) if self.router() else 0  # made by the first request

    def router(self):
        return self.handle._router._asyncio_router._request_router


@pytest.fixture(scope="module")
def fronts(cluster):
    """Return two of them, a node each, and the application to use."""
    import ray

    deploy("shared", REPLICAS, shared=True, shared_timeout_s=2)
    front = ray.remote(num_cpus=0)(Front)
    fronts = [front.options(resources={node: 0.01}).remote() for node in ("a", "b")]
    use(fronts, "shared")
    until_told(lambda: the_actor_decides(fronts))
    return fronts


def use(fronts, application):
    for front in fronts:
        get(front.use.remote(application))


def get(reference):
    import ray

    return ray.get(reference, timeout=90)


def actor():
    import ray

    return ray.get_actor("shared#Engine", namespace="mulsched")


def in_actor(function):
    return get(actor().__ray_call__.remote(function))


def instances(shared):
    return list(shared.bodies.lifecycle.router.instances)


def loads(shared):
    router = shared.bodies.lifecycle.router
    return [sum(router.load(name)[key] for key in ("running", "waiting")) for name in router.instances]


def nothing_is_booked():
    return sum(in_actor(loads)) == 0


def local_decisions(fronts):
    return sum(get(front.local_decisions.remote()) for front in fronts)


def the_actor_decides(fronts):
    counts = []
    for _ in range(2):
        for front in fronts:
            get(front.ask.remote({"prompt": "here I am"}))
        counts.append(local_decisions(fronts))
    return counts[0] == counts[1]


def start_bursts(fronts, body, each, burst):
    """Send requests from every process at once; return when all are on their way to replicas."""
    for front in fronts:
        front.start.remote([body] * each, burst)
    until_told(lambda: sum(get(front.booked.remote()) for front in fronts) == each * len(fronts))


def finish_bursts(fronts, burst):
    """Return how many requests each replica answered."""
    get(fronts[0].release.remote(burst))
    return Counter(pid for front in fronts for pid in get(front.collect.remote()))


def test_processes_on_two_nodes_do_not_herd(fronts):
    until_told(nothing_is_booked)  # Ray tells of an end some time after its answer
    start_bursts(fronts, chat("new prefix " * 500), REPLICAS // 2, "shared")
    booked = in_actor(loads)
    answers = finish_bursts(fronts, "shared")
    assert booked == [1] * REPLICAS
    assert list(answers.values()) == [1] * REPLICAS


def test_processes_that_share_nothing_do_herd(fronts):
    deploy("alone", 2)
    use(fronts, "alone")
    try:
        start_bursts(fronts, chat("new prefix " * 500), 1, "alone")
        answers = finish_bursts(fronts, "alone")
    finally:
        use(fronts, "shared")
    assert list(answers.values()) == [2]


def test_a_prefix_that_one_process_placed_is_found_by_the_other(fronts):
    for topic in "xyz":
        first = get(fronts[0].ask.remote(chat(topic * 4000)))
        until_told(nothing_is_booked)
        assert get(fronts[1].ask.remote(chat(topic * 4000 + "more"))) == first


def test_finished_requests_leave_nothing_booked(fronts):
    for front in fronts:
        get(front.ask.remote(chat("hello" * 100)))
    until_told(nothing_is_booked)


def test_a_killed_replica_is_forgotten_for_both_processes(fronts):
    prompt = chat("w" * 4000)
    holder = get(fronts[0].ask.remote(prompt))
    until_told(nothing_is_booked)  # until then its prompt waits there, and the next goes elsewhere
    before = in_actor(instances)
    get(fronts[0].die.remote(prompt))
    elsewhere = [get(front.ask.remote(prompt)) for front in (*fronts, *fronts)]
    assert holder not in elsewhere
    until_told(lambda: len(set(before) - set(in_actor(instances))) == 1)


def test_while_the_actor_hangs_requests_go_on_and_it_hears_of_them_later(fronts):
    until_told(nothing_is_booked)
    before = local_decisions(fronts)
    pid = in_actor(lambda shared: os.getpid())
    os.kill(pid, signal.SIGSTOP)
    try:
        start_bursts(fronts, chat("v" * 400), 3, "hung")
        local = local_decisions(fronts) - before
    finally:
        os.kill(pid, signal.SIGCONT)
    assert local >= 6  # Ray may ask again for a request
    until_told(lambda: sum(in_actor(loads)) == 6)
    finish_bursts(fronts, "hung")
    until_told(nothing_is_booked)


@pytest.mark.parametrize("for_good", [False, True])
def test_when_the_actor_dies_requests_go_on_and_another_takes_its_place(fronts, for_good):
    import ray

    pid = in_actor(lambda shared: os.getpid())
    start_bursts(fronts, chat("u" * 400), 2, f"killed {for_good}")
    ray.kill(actor(), no_restart=for_good)
    assert all(get(front.ask.remote(chat("t" * 400))) for front in fronts)
    assert sum(finish_bursts(fronts, f"killed {for_good}").values()) == 4
    until_told(lambda: the_actor_decides(fronts))
    assert in_actor(lambda shared: os.getpid()) != pid
    until_told(nothing_is_booked)


def test_the_actor_goes_with_the_last_replica(fronts):
    from ray import serve

    serve.delete("shared")

    def gone():
        try:
            actor()
        except ValueError:
            return True
        return False

    until_told(gone)

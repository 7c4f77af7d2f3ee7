"""The Ray Serve adapter in a real local Ray. Opt in with ``-m ray``, where ray[serve] is installed."""

import asyncio
import contextvars
import os
from collections import Counter

import pytest
from ray_calls import chat, until

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]

REPLICAS = 3


@pytest.fixture(scope="module")
def handle():
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
            request_router_kwargs={"cache_tokens": 100_000, "prefill_tokens_per_s": 1e9},
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

        async def tokenize(self, body):
            return os.getpid()

        async def release(self):
            self.open.set()

        async def hold(self):
            self.open.clear()

        async def die(self, body):
            os._exit(1)

    ray.init(
        num_cpus=1,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}},
    )
    serve.start(proxy_location="Disabled")
    engines = serve.run(Engine.bind(), name="engines", route_prefix=None)
    engines.remote({}).result(timeout_s=60)  # a handle has a router from its first call on
    yield engines
    serve.shutdown()
    ray.shutdown()


def router_of(handle):
    return handle._router._asyncio_router._request_router


def answered(handle, body):
    """Return the answer, once Ray has told of its end too: until then its prompt waits where it was sent."""
    answer = handle.remote(body).result(timeout_s=60)
    until(lambda: len(router_of(handle).bodies.lifecycle) == 0)
    return answer


def test_a_conversation_stays_with_the_replica_that_holds_its_prefix(handle):
    for topic in "abc":
        first = answered(handle, chat(topic * 4000))
        later = [answered(handle, chat(topic * 4000 + str(turn))) for turn in range(5)]
        assert later == [first] * 5


def test_finished_requests_leave_nothing_booked(handle):
    answered(handle, chat("hello" * 100))
    assert len(router_of(handle).bodies.lifecycle) == 0


def test_concurrent_requests_do_not_herd(handle):
    waiting = [handle.wait.remote(chat(f"{i} " * 500)) for i in range(4 * REPLICAS)]
    lifecycle = router_of(handle).bodies.lifecycle
    until(lambda: len(lifecycle) == len(waiting))
    loads = [lifecycle.router.load(name) for name in lifecycle.router.instances]
    handle.broadcast("release").results(timeout_s=60)
    answers = Counter(response.result(timeout_s=60) for response in waiting)
    assert [load["running"] + load["waiting"] for load in loads] == [4] * REPLICAS
    assert sorted(answers.values()) == [4] * REPLICAS


def test_calls_made_for_one_request_are_booked_and_answered_each(handle):
    from ray.serve.context import _set_request_context

    calls = 2 * REPLICAS
    handle.broadcast("hold").results(timeout_s=60)

    def served():  # as in a deployment that serves a request
        _set_request_context(_internal_request_id="served")
        return [handle.wait.remote(chat(f"{i} " * 500)) for i in range(calls)]

    waiting = contextvars.copy_context().run(served)
    router = router_of(handle)
    lifecycle = router.bodies.lifecycle
    until(lambda: len(lifecycle) == calls)
    loads = [lifecycle.router.load(name) for name in lifecycle.router.instances]
    handle.broadcast("release").results(timeout_s=60)
    for response in waiting:
        response.result(timeout_s=60)
    assert [load["running"] + load["waiting"] for load in loads] == [2] * REPLICAS
    until(lambda: not len(lifecycle))
    assert not router._open


def blocks(router):
    known = router.bodies.lifecycle.router
    return {name: known.index.blocks(name) for name in known.instances}


def test_what_is_only_tokenized_is_not_taken_for_cached(handle):
    before = blocks(router_of(handle))
    handle.tokenize.remote(chat("tokenize" * 500)).result(timeout_s=60)
    until(lambda: len(router_of(handle).bodies.lifecycle) == 0)
    assert blocks(router_of(handle)) == before


async def pick_by(handle, body):
    async with handle.choose_replica(body, _reserve=False) as selection:
        return selection.replica_id


@pytest.fixture
def pick(handle):
    """Picks a replica by a handle of its own, for requests that are sent otherwise."""
    from ray import serve

    own = serve.get_deployment_handle("Engine", "engines")

    def pick(body):
        replica = asyncio.run(pick_by(own, body))
        assert len(router_of(own).bodies.lifecycle) == 0
        return replica

    return pick


def test_a_replica_that_is_only_picked_is_one_with_the_prefix_and_not_booked(pick):
    for topic in "de":
        assert len({pick(chat(topic * 4000 + str(turn))) for turn in range(5)}) == 1


def test_a_replica_that_is_only_picked_is_none_with_a_queue(handle, pick):
    handle.broadcast("hold").results(timeout_s=60)
    lifecycle = router_of(handle).bodies.lifecycle
    until(lambda: len(lifecycle) == 0)
    waiting = [handle.wait.remote(chat("f" * 4000)) for _ in range(3)]
    until(lambda: len(lifecycle) == len(waiting))
    loads = {name: lifecycle.router.load(name) for name in lifecycle.router.instances}
    [busy] = [name for name, load in loads.items() if load["running"] + load["waiting"]]
    picked = {pick(chat(topic * 4000)) for topic in "ghijkl"}
    handle.broadcast("release").results(timeout_s=60)
    for response in waiting:
        response.result(timeout_s=60)
    assert len(picked) == REPLICAS - 1
    assert not any(busy.endswith(replica) for replica in picked)


def test_a_pick_made_for_a_request_that_is_served_leaves_that_ones_calls_booked(handle):
    from ray.serve.context import _set_request_context

    handle.broadcast("hold").results(timeout_s=60)
    lifecycle = router_of(handle).bodies.lifecycle
    until(lambda: len(lifecycle) == 0)

    def served():
        _set_request_context(_internal_request_id="serves and picks")
        waiting = handle.wait.remote(chat("m" * 4000))
        until(lambda: len(lifecycle) == 1)
        asyncio.run(pick_by(handle, chat("m" * 4000)))
        return waiting

    waiting = contextvars.copy_context().run(served)
    booked = len(lifecycle)
    handle.broadcast("release").results(timeout_s=60)
    waiting.result(timeout_s=60)
    assert booked == 1


def test_a_killed_replica_is_forgotten_and_its_prefixes_go_elsewhere(handle):
    prompt = chat("z" * 4000)
    holder = answered(handle, prompt)
    before = set(router_of(handle).bodies.lifecycle.router.instances)
    with pytest.raises(Exception, match="died|crash|Error"):
        handle.die.remote(prompt).result(timeout_s=60)
    elsewhere = [answered(handle, prompt) for _ in range(5)]
    after = set(router_of(handle).bodies.lifecycle.router.instances)
    assert holder not in elsewhere
    assert len(set(elsewhere)) == 1
    assert len(before - after) == 1
    until(lambda: len(router_of(handle).bodies.lifecycle) == 0)

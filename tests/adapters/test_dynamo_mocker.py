"""The Dynamo adapter with a real ``KvRouter`` over three workers of ``dynamo.mocker``.

Opt in: pip install '.[dynamo]', pip install --no-deps ai-dynamo==1.6.1, then pytest -m dynamo_mocker.
"""

import asyncio
import random
from collections import Counter

import pytest
from dynamo_mocker import BLOCK_SIZE, ENDPOINT, Workers, another_frontend, until

from mulsched import Namespace, block_keys
from mulsched.adapters.dynamo import LMetricWorkers

pytestmark = pytest.mark.dynamo_mocker
COUNT = 3
WAIT_S = 60
BLOCKS = 64  # a worker's cache: less than what the prompts come to, so that it evicts


def prompts(seed=0, count=50):
    """Return prompts of 60 to 300 tokens, each with one of six prefixes."""
    rng = random.Random(seed)
    prefixes = [rng.choices(range(2, 500), k=rng.randint(40, 200)) for _ in range(6)]
    return [rng.choice(prefixes) + rng.choices(range(2, 500), k=rng.randint(20, 100)) for _ in range(count)]


class Spy:
    """A ``KvRouter`` whose direct routing is seen."""

    def __init__(self, kv_router):
        self._kv_router, self.asked = kv_router, {}

    def __getattr__(self, name):
        return getattr(self._kv_router, name)

    def generate(self, tokens, model, worker_id, dp_rank, **options):
        self.asked[tuple(tokens)] = worker_id
        return self._kv_router.generate(tokens, model, worker_id=worker_id, dp_rank=dp_rank, **options)


class Fleet:
    """Real workers, Dynamo's router over them, and ours over that."""

    def __init__(self, workers):
        self.workers = workers
        self.served = []

    async def start(self):
        from dynamo.llm import KvRouter, KvRouterConfig
        from dynamo.runtime import DistributedRuntime

        self.runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
        endpoint = self.runtime.endpoint(ENDPOINT)
        self.client = await endpoint.client()
        await until(self._all_there, WAIT_S, self.workers.logs)
        self.kv_router = Spy(KvRouter(endpoint, BLOCK_SIZE, KvRouterConfig(router_replica_sync=True)))
        await until(self._all_listed, WAIT_S, self.workers.logs)
        self.ours = LMetricWorkers(self.kv_router, block_size=BLOCK_SIZE)
        self.events = asyncio.create_task(self.ours.follow(*self.workers.channels().values()))

    async def _all_there(self):
        return len(self.client.instance_ids()) == COUNT and len(self.workers.channels()) == COUNT

    async def _all_listed(self):
        return len(await self.kv_router.get_potential_loads([1])) == COUNT

    async def ask(self, tokens, output_tokens=8):
        """Send a prompt; return where it was sent, where it was served, and how many tokens were cached."""
        stop = {"max_tokens": output_tokens, "ignore_eos": True}
        answer = [each async for each in self.ours.generate(tokens, "m", stop_conditions=stop)]
        assert sum(len(each["token_ids"]) for each in answer) == output_tokens
        where = answer[0]["routing_data"]["worker_id"]
        return where["decode_worker_id"], answer[0]["completion_usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]

    def matches(self, tokens):
        """Return the blocks that we believe cached, by worker."""
        matched = self.ours.lifecycle.router.index.match_by_instance(block_keys(tokens, BLOCK_SIZE))
        return {int(name.partition("/")[0]): blocks for name, blocks in matched.items()}

    async def overlaps(self, tokens):
        """Return the blocks that Dynamo's router believes cached, by worker."""
        scores = await self.kv_router.get_overlap_scores(tokens)
        return {row["worker_id"]: row["device_blocks"] for row in scores["workers"]}

    async def settled(self):
        """Wait until our index says of every prompt what Dynamo's says; events are on their way to both."""
        differ = []

        async def equal():
            differ[:] = [p for p in prompts() if self.matches(p) != await self.overlaps(p)]
            return not differ

        await until(equal, WAIT_S, lambda: f"{len(differ)} prompts' matches")


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def fleet(runner, tmp_path_factory):
    workers = Workers(tmp_path_factory.mktemp("mocker"), "--num-gpu-blocks-override", str(BLOCKS))
    with pytest.MonkeyPatch.context() as patch, workers.run(COUNT):
        for name, value in workers.environment.items():
            patch.setenv(name, value)
        fleet = Fleet(workers)
        runner.run(fleet.start())
        yield fleet
        fleet.events.cancel()
        fleet.runtime.shutdown()


@pytest.fixture(scope="module")
def served(fleet, runner):
    """Fifty prompts, five at a time: which worker served each."""

    sent = prompts()

    async def send():
        for start in range(0, len(sent), 5):
            fleet.served += await asyncio.gather(*(fleet.ask(prompt) for prompt in sent[start : start + 5]))

    runner.run(send())
    return [worker for worker, _ in fleet.served]


def test_the_worker_that_was_chosen_serves_the_request(fleet, served):
    assert served == [fleet.kv_router.asked[tuple(prompt)] for prompt in prompts()]
    assert len(Counter(served)) == COUNT


def test_our_index_comes_to_hold_what_dynamos_does(fleet, served, runner):
    runner.run(fleet.settled())
    assert any(any(fleet.matches(prompt).values()) for prompt in prompts())


def test_evictions_reach_our_index(fleet, served, runner):
    runner.run(fleet.settled())
    assert fleet.ours.counts["blocks_removed"] > 0


def test_events_alone_kept_our_index(fleet, served):
    assert fleet.ours.counts["index_loads"] == 1  # the empty one, before the first request


def test_an_index_taken_over_whole_is_the_one_kept_by_events(fleet, served, runner):
    async def late():
        await fleet.settled()
        workers = LMetricWorkers(fleet.kv_router, block_size=BLOCK_SIZE)
        await workers.load_index()
        return workers.lifecycle.router.index

    index = runner.run(late())
    for prompt in prompts():
        keys = block_keys(prompt, BLOCK_SIZE)
        assert {k: n for k, n in index.match_by_instance(keys).items() if n} == {
            f"{worker}/0": n for worker, n in fleet.matches(prompt).items() if n
        }


def test_tokens_to_prefill_are_those_that_dynamo_says(fleet, served, runner):
    async def told(prompt):
        loads = await fleet.kv_router.get_potential_loads(prompt)
        return {load["worker_id"]: load["potential_prefill_tokens"] for load in loads}

    runner.run(fleet.settled())
    for prompt in prompts():
        ours = {w: len(prompt) - n * BLOCK_SIZE for w, n in fleet.matches(prompt).items()}
        assert runner.run(told(prompt)) == ours


def test_the_engine_finds_cached_what_we_believed(fleet, served, runner):
    async def ask():
        believed = []
        for prompt in prompts(seed=1, count=12) + prompts()[-6:]:
            before = fleet.matches(prompt)
            worker, cached = await fleet.ask(prompt)
            most = (len(prompt) - 1) // BLOCK_SIZE  # the last token is always computed
            believed.append((min(before[worker], most) * BLOCK_SIZE, cached))
            await fleet.settled()
        return believed

    believed = runner.run(ask())
    assert [expected for expected, _ in believed] == [cached for _, cached in believed]
    assert any(cached for _, cached in believed)


def test_a_worker_busy_for_another_frontend_is_not_chosen(fleet, runner):
    busy = fleet.client.instance_ids()[0]

    async def ask():
        async def told():
            loads = await fleet.kv_router.get_potential_loads([2])
            return {load["worker_id"]: load["active_requests"] for load in loads}[busy]

        await until(told, WAIT_S, lambda: "the other frontend's request")
        return [(await fleet.ask([7 + turn] * 40, 2))[0] for turn in range(4)]

    with another_frontend(busy):
        assert busy not in runner.run(ask())


def test_blocks_of_a_lora_adapter_are_found_under_its_name_alone(fleet, served, runner):
    tokens = list(range(500, 500 + 4 * BLOCK_SIZE))

    async def publish():
        from dynamo.llm import KvEventPublisher

        publisher = KvEventPublisher(fleet.runtime.endpoint(ENDPOINT), 999, BLOCK_SIZE, 0)
        workers = LMetricWorkers(fleet.kv_router, block_size=BLOCK_SIZE)
        await until(has_channel, WAIT_S, lambda: "the channel")
        events = asyncio.create_task(workers.follow(fleet.workers.channels()[999]))

        async def heard():  # what is published before the socket is connected is not
            publisher.publish_stored(tokens, [BLOCK_SIZE] * 4, [1, 2, 3, 4], lora_name="adapter")
            return "999/0" in workers.lifecycle.router.instances

        await until(heard, WAIT_S, lambda: "the event")
        events.cancel()
        publisher.shutdown()
        return workers.lifecycle.router.index

    async def has_channel():
        return 999 in fleet.workers.channels()

    index = runner.run(publish())
    adapter = block_keys(tokens, BLOCK_SIZE, namespace=Namespace(lora="adapter"))
    assert index.match_by_instance(adapter)["999/0"] == 4
    assert index.match_by_instance(block_keys(tokens, BLOCK_SIZE))["999/0"] == 0


def test_while_a_killed_worker_is_listed_its_requests_go_elsewhere(fleet, served, runner):
    async def ask():
        fleet.workers.kill(0)
        answers = [await fleet.ask([50 + turn] * 40, 2) for turn in range(12)]
        listed = await fleet.kv_router.get_potential_loads([2])
        return {worker for worker, _ in answers}, len(listed)

    workers, listed = runner.run(ask())
    assert (len(workers), listed) == (COUNT - 1, COUNT)
    assert fleet.ours.counts["unreachable_workers"] > 0
    assert len(fleet.ours.lifecycle) == 0


def test_a_killed_worker_is_forgotten_when_its_lease_ends(fleet, served, runner):
    async def one_less():
        return len(await fleet.kv_router.get_potential_loads([2])) == COUNT - 1

    async def ask():
        await until(one_less, WAIT_S, fleet.workers.logs)
        await fleet.ask([5] * 40, 2)

    runner.run(ask())
    assert len(fleet.ours.lifecycle.router.instances) == COUNT - 1

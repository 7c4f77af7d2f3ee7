"""The engine model against what a real vLLM did with the same requests.

The recording and its versions: see benchmarks/vllm_reference. The naive engine is held against it too, so that it
may serve as an oracle where nothing was recorded.
"""

import gzip
import importlib
import json
import os
import subprocess
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from backends import BACKENDS
from naive_vllm import NaiveVllm
from vllm_reference.sequences import BLOCK_SIZE, prompt_tokens

import mulsched.replay.engine
from mulsched import PrefixIndex
from mulsched.replay import EngineModel, Profile
from mulsched.replay._engine_py import EnginePy

RECORDING = Path(__file__).parent / "data" / "vllm-0.32.0.json.gz"
RECORDER = Path(__file__).parents[2] / "benchmarks" / "vllm_reference" / "record.py"


def read(path):
    return json.loads(gzip.decompress(path.read_bytes()))


RECORDED = read(RECORDING)
every_sequence = pytest.mark.parametrize(
    "sequence", RECORDED["sequences"], ids=lambda s: f"{s['name']}-{s['server']}"
)


class Numbers(dict):
    """Things, and numbers for them in the order in which they are first seen."""

    def __missing__(self, thing):
        self[thing] = len(self)
        return self[thing]


def submissions(sequence):
    """Yield per wave the arguments of ``submit``; keys name the whole prefix, of prompt and output."""
    prefixes, outputs = Numbers(), {}
    for wave in sequence["waves"]:
        requests = []
        for request in wave["requests"]:
            prompt = prompt_tokens(request["prompt"], outputs)
            outputs[request["id"]] = request["output"]
            tokens = prompt + request["output"]
            keys = [prefixes[tuple(tokens[:end])] for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE)]
            requests.append(
                (request["id"], np.array(keys, dtype=np.uint64), len(prompt), request["output_tokens"])
            )
        yield requests


def by_block(events):
    """Return events block by block: ("stored", parent, block) and ("removed", block)."""
    blocks = []
    for kind, *rest in events:
        if kind == "removed":
            blocks += [("removed", block) for block in rest]
        else:
            blocks += [("stored", parent, block) for parent, block in pairwise(rest)]
    return blocks


def batches(wave):
    """Return the recorded steps as the model's step times see them: (prefill tokens, decoding requests)."""
    tokens = {request["id"]: request["prompt_tokens"] for request in wave["requests"]}
    decoding, result = set(), []
    for i, step in enumerate(wave["steps"]):
        decoding -= {request for at, request in wave["preempted"] if at == i}
        result.append(
            (
                sum(got for request, _, got in step if request not in decoding),
                sum(request in decoding for request, _, _ in step),
            )
        )
        for request, had, got in step:
            if had + got == tokens[request]:
                tokens[request] += 1
                decoding.add(request)
    return result


def limits(sequence):
    server = RECORDED["servers"][sequence["server"]]
    return {
        "block_size": BLOCK_SIZE,
        "kv_blocks": server["num_gpu_blocks_override"] - 1,  # vLLM keeps one to itself
        "max_batched_tokens": server["max_num_batched_tokens"],
        "max_num_seqs": server["max_num_seqs"],
    }


def replayed(sequence, engine_model):
    """Run the sequence on the engine model; yield per wave cached tokens, steps and cache changes."""
    steps = []

    def step_time(new_tokens, _prefix, batch, _context):
        steps.append((new_tokens, batch))
        return 1.0

    model = engine_model(Profile("recorded", step_time, **limits(sequence)))
    for requests in submissions(sequence):
        names = dict(enumerate(request_id for request_id, *_ in requests))
        cached, changes = {}, []
        steps.clear()
        for number, (_, *request) in enumerate(requests):
            model.submit(number, *request)
        while model.start_step(0.0) is not None:
            cached |= {names[number]: tokens for number, tokens in model.end_step().first_tokens}
            changes += [
                ("stored", change.parent, *change.keys.tolist())
                if change.stored
                else ("removed", *change.keys.tolist())
                for change in model.take_changes()
            ]
        yield cached, list(steps), changes


def replayed_naively(sequence, engine=NaiveVllm):
    """Run the sequence on the oracle; yield per wave cached tokens, steps, preemptions and cache changes."""
    model = engine(**limits(sequence))
    for requests in submissions(sequence):
        for request_id, keys, *tokens in requests:
            model.submit(request_id, keys.tolist(), *tokens)
        cached, steps, preempted, changes = {}, [], [], []
        while model.running or model.waiting:
            step = model.step()
            preempted += [[len(steps), request] for request in step.preempted]
            steps += [[list(part) for part in step.scheduled]] if step.scheduled else []
            cached |= dict(step.first_tokens)
            changes += step.changes
        yield cached, steps, preempted, changes


def numbered(waves):
    """Return the events of all waves block by block, blocks as numbers in the order of their appearance."""
    numbers = Numbers()
    return [
        (kind, *(None if block is None else numbers[block] for block in blocks))
        for events in waves
        for kind, *blocks in by_block(events)
    ]


def cached_tokens(sequence):
    return [
        {request["id"]: request["cached_tokens"] for request in wave["requests"]}
        for wave in sequence["waves"]
    ]


@pytest.fixture(params=BACKENDS)
def engine_model(request, monkeypatch):
    twin = EnginePy
    if request.param == "native":
        twin = importlib.import_module("mulsched.replay._native").EngineNative
    monkeypatch.setattr(mulsched.replay.engine, "_Engine", twin)
    return EngineModel


@every_sequence
def test_every_request_finds_as_many_cached_tokens_as_in_vllm(sequence, engine_model):
    assert cached_tokens(sequence) == [cached for cached, _, _ in replayed(sequence, engine_model)]


@every_sequence
def test_every_step_has_the_tokens_and_decodes_of_vllm(sequence, engine_model):
    assert [batches(wave) for wave in sequence["waves"]] == [
        steps for _, steps, _ in replayed(sequence, engine_model)
    ]


@every_sequence
def test_blocks_are_cached_and_evicted_in_the_order_of_vllm(sequence, engine_model):
    expected = numbered(wave["events"] for wave in sequence["waves"])
    assert expected == numbered(changes for _, _, changes in replayed(sequence, engine_model))


@every_sequence
def test_an_index_that_follows_the_events_holds_what_vllm_holds(sequence):
    index, copies = PrefixIndex(), Counter()
    index.add_instance("recorded", engine_hashes=True)
    for wave in sequence["waves"]:
        for kind, *blocks in wave["events"]:
            if kind == "stored":
                parent, *blocks = blocks
                # a recorded block is a prefix, so its number will do as its key
                index.store(
                    "recorded", np.array(blocks, dtype=np.uint64), parent=parent, engine_hashes=blocks
                )
                copies.update(blocks)
            else:
                index.remove("recorded", blocks)
                copies.subtract(blocks)
            assert len(+copies) == index.blocks("recorded")


def test_the_recording_has_evictions_copies_chunks_and_preemptions():
    waves = [wave for sequence in RECORDED["sequences"] for wave in sequence["waves"]]
    assert any(event[0] == "removed" for wave in waves for event in wave["events"])
    assert any(held_twice(sequence) for sequence in RECORDED["sequences"])
    assert any(len(wave["steps"]) > 2 and wave["steps"][1][0][2] > 1 for wave in waves)
    assert sum(len(wave["preempted"]) for wave in waves) > 50


def held_twice(sequence):
    copies = Counter()
    for wave in sequence["waves"]:
        for kind, *blocks in wave["events"]:
            if kind == "stored":
                copies.update(blocks[1:])
            else:
                copies.subtract(blocks)
            if 2 in copies.values():
                return True
    return False


def naive_agrees(sequence, engine=NaiveVllm):
    runs = list(replayed_naively(sequence, engine))
    return (
        cached_tokens(sequence) == [cached for cached, *_ in runs]
        and [wave["steps"] for wave in sequence["waves"]] == [steps for _, steps, *_ in runs]
        and [wave["preempted"] for wave in sequence["waves"]] == [preempted for *_, preempted, _ in runs]
        and numbered(wave["events"] for wave in sequence["waves"]) == numbered(run[-1] for run in runs)
    )


@every_sequence
def test_the_naive_engine_does_what_vllm_did(sequence):
    assert naive_agrees(sequence)


class WithoutCopies(NaiveVllm):
    def _register(self, request, full):
        if all(key in self.copies for key in request.keys[request.registered : full]):
            return
        super()._register(request, full)


class KeysOfPromptsOnly(NaiveVllm):
    def submit(self, request_id, keys, prompt_tokens, output_tokens):
        super().submit(request_id, keys[: prompt_tokens // BLOCK_SIZE], prompt_tokens, output_tokens)


class AdmitsByTheFirstChunk(NaiveVllm):
    def _admit(self, request, hits, tokens):
        generated, prompt_tokens = request.generated, request.prompt_tokens
        request.generated, request.prompt_tokens = 0, len(hits) * BLOCK_SIZE + tokens
        admitted = super()._admit(request, hits, tokens)
        request.generated, request.prompt_tokens = generated, prompt_tokens
        return admitted


class QueuesUnkeyedBlocks(NaiveVllm):
    def _release(self, request):
        free, self.free = self.free, []
        super()._release(request)
        self.free = free + self.free


class HeadBeforeTail(NaiveVllm):
    def _release(self, request):
        request.blocks.reverse()
        super()._release(request)


@pytest.mark.parametrize(
    "engine",
    [WithoutCopies, KeysOfPromptsOnly, AdmitsByTheFirstChunk, QueuesUnkeyedBlocks, HeadBeforeTail],
)
def test_an_engine_that_departs_from_vllm_is_caught(engine):
    assert not all(naive_agrees(sequence, engine) for sequence in RECORDED["sequences"])


@pytest.mark.vllm
def test_a_live_vllm_does_what_was_recorded(tmp_path):
    python = os.environ.get("MULSCHED_VLLM_PYTHON")
    assert python, "set MULSCHED_VLLM_PYTHON to a Python that has vllm"
    out = tmp_path / "live.json.gz"
    subprocess.run([python, RECORDER, out], check=True)
    live = read(out)
    # what the random weights answer depends on the machine's arithmetic
    for recording in (live, recorded := read(RECORDING)):
        for sequence in recording["sequences"]:
            for wave in sequence["waves"]:
                for request in wave["requests"]:
                    del request["output"]
    assert recorded["servers"] == live["servers"]
    for expected, actual in zip(recorded["sequences"], live["sequences"], strict=True):
        assert expected == actual, expected["name"]

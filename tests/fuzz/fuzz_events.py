"""Whatever bytes an engine sends: decoders, sequence tracker and router neither crash nor disagree.

What the core splits of a message must be what the decoder of single events reads.

Run ``python tests/fuzz/fuzz_events.py CORPUS -max_total_time=20``: a directory, in which it begins with a
message of each format, and libFuzzer's options. Needs atheris.
"""

import contextlib
import sys
from collections import Counter
from pathlib import Path

import atheris
import msgspec

with atheris.instrument_imports(include=["mulsched.events"]):
    from mulsched.events import (
        _msgpack,
        apply_batch,
        decode_dynamo,
        decode_sglang,
        decode_tensorrt_llm,
        decode_vllm,
        read_engine_load,
    )
    from mulsched.events.sequence import Clear, Deliver, Replay, SequenceTracker

from mulsched import CacheCleared, InvalidEvents, Router

sys.path.insert(0, str(Path(__file__).parents[1]))
from kv_wire import batch, cleared, removed, stored

DECODERS = (
    decode_vllm,
    decode_sglang,
    lambda payload, instance: decode_dynamo(payload, instance, block_size=4),
    lambda payload, instance: decode_tensorrt_llm(payload, instance, block_size=4),
)
WHOLE = [
    stored([1, b"2"], list(range(8)), extra_keys=[("salt", ("image", 1)), None], lora_name="l"),
    stored([2, 3], list(range(8)), 1, medium="CPU", group_idx=0),
    removed([1, 3]),
    cleared(),
    stored([1, 2], list(range(8)), extra_keys=[None, None], group_idx=0),
    removed([1]),
    stored([3], list(range(4)), 2, later={"a": [1]}),
    stored([4], list(range(4)), 9, lora_id=1),
]
DYNAMO = {"event": {"event_id": 1, "data": {"stored": {"parent_hash": None, "blocks": [
    {"block_hash": 1, "tokens_hash": 2}]}}}}  # fmt: skip
TENSORRT_LLM = [{"event_id": 1, "data": {"type": "stored", "parent_hash": None, "blocks": [
    {"block_hash": 1, "tokens": [{"token_id": n, "token_extra_id": 0} for n in range(4)]}]}}]  # fmt: skip
PAGE = b'vllm:num_requests_running{engine="0"} 1\nvllm:num_requests_waiting 2\n'
# An input is a byte that chooses the format, bytes that steer, and a message.
STEERING = 16
MESSAGES = [
    batch(*WHOLE),
    batch(*WHOLE, encoding="array"),
    msgspec.json.encode(DYNAMO),
    msgspec.json.encode(TENSORRT_LLM),
    PAGE,
]
SEEDS = [bytes([n]) + bytes(STEERING) + message for n, message in enumerate(MESSAGES)]


def said(decode, message):
    """What a router holds after a message, and what was counted."""
    router, counts = Router(block_size=4), Counter()
    router.add_instance("a")
    try:
        events = decode(message, "a")
    except InvalidEvents:
        return None
    apply_batch(router, events, counts)
    return (
        repr(events.timestamp),
        events.data_parallel_rank,
        events.removals_lost,
        +counts,
        router.index.dump(),
    )


def check_split(decode, message):
    """Compare with a decoder that is not helped by the core."""
    split, _msgpack.split_kv_events = _msgpack.split_kv_events, lambda data, group_idx, max_parts: None
    try:
        expected = said(decode, message)
    finally:
        _msgpack.split_kv_events = split
    assert said(decode, message) == expected


class Follower:
    """A tracker, a decoder and a router, as the subscriber puts them together."""

    def __init__(self, decode, can_replay):
        self.router = Router(block_size=4)
        self.router.add_instance("a")
        self.tracker = SequenceTracker(can_replay=can_replay, window=4)
        self.decode = decode
        self.next = None  # of the run

    def do(self, actions):
        for action in actions:
            if isinstance(action, Clear):
                self.next = None
                self.router.apply(CacheCleared("a"))
            elif isinstance(action, Deliver):
                assert self.next in (None, action.sequence)
                assert action is actions[-1]
                self.next = action.sequence + 1
                self.deliver(action.payload)
            else:
                assert isinstance(action, Replay)
                assert action is actions[-1]

    def deliver(self, payload):
        try:
            events = self.decode(payload, "a")
        except InvalidEvents:
            self.do(self.tracker.unreadable())
            return
        apply_batch(self.router, events, Counter())
        if events.removals_lost:
            self.do(self.tracker.unreadable())


def one_input(data):
    steering, message = data[1 : STEERING + 1], data[STEERING + 1 :]
    choice = data[0] % len(MESSAGES) if data else 0
    if choice == len(DECODERS):
        with contextlib.suppress(InvalidEvents):
            read_engine_load(message)
        return
    if choice < 2:
        check_split(DECODERS[choice], message)
    provider = atheris.FuzzedDataProvider(steering)
    follower = Follower(DECODERS[choice], provider.ConsumeBool())
    follower.deliver(message)
    follower.do(follower.tracker.connected())
    for _ in range(5):
        sequence = provider.ConsumeIntInRange(-1, 5)
        payload = message[: provider.ConsumeIntInRange(0, 200)]
        if follower.tracker.state != "replaying":
            follower.do(follower.tracker.live(sequence, payload))
            continue
        match provider.ConsumeIntInRange(0, 3):
            case 0:
                follower.do(follower.tracker.replay_ended())
            case 1:
                follower.do(follower.tracker.replay_failed())
            case _:
                follower.do(follower.tracker.replayed(sequence, payload))
    follower.router.index.check()
    follower.router.select([1, 2, 3, 4, 5])


if __name__ == "__main__":
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()

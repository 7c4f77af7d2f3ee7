"""Engine events in: wire formats to types, publishers to routers. Extra ``mulsched[events]``."""

from mulsched.events.apply import apply_batch
from mulsched.events.batch import EventBatch, KvEvent, content_key
from mulsched.events.dynamo import decode_dynamo
from mulsched.events.sequence import SequenceTracker
from mulsched.events.sglang import decode_sglang
from mulsched.events.subscriber import KvEventSubscriber
from mulsched.events.tensorrt_llm import decode_tensorrt_llm
from mulsched.events.vllm import decode_vllm

__all__ = [
    "EventBatch",
    "KvEvent",
    "KvEventSubscriber",
    "SequenceTracker",
    "apply_batch",
    "content_key",
    "decode_dynamo",
    "decode_sglang",
    "decode_tensorrt_llm",
    "decode_vllm",
]

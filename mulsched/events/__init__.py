"""Engine events in: wire formats to types, publishers to routers. Extra ``mulsched[events]``."""

from mulsched.events.apply import apply_batch
from mulsched.events.batch import EventBatch, KvEvent, content_key
from mulsched.events.discovery import KvEventSource, discover_kv_events
from mulsched.events.dynamo import decode_dynamo, decode_dynamo_message
from mulsched.events.load_header import HeaderLoad, read_load_header
from mulsched.events.load_poller import LoadPoller
from mulsched.events.prometheus_text import EngineLoad, read_engine_load
from mulsched.events.sequence import SequenceTracker
from mulsched.events.sglang import decode_sglang
from mulsched.events.subscriber import KvEventSubscriber
from mulsched.events.tensorrt_llm import decode_tensorrt_llm
from mulsched.events.vllm import decode_vllm

KV_DECODERS = {"vllm": decode_vllm, "sglang": decode_sglang}
"""What a subscriber may decode by, by engine."""

__all__ = [
    "KV_DECODERS",
    "EngineLoad",
    "EventBatch",
    "HeaderLoad",
    "KvEvent",
    "KvEventSource",
    "KvEventSubscriber",
    "LoadPoller",
    "SequenceTracker",
    "apply_batch",
    "content_key",
    "decode_dynamo",
    "decode_dynamo_message",
    "decode_sglang",
    "decode_tensorrt_llm",
    "decode_vllm",
    "discover_kv_events",
    "read_engine_load",
    "read_load_header",
]

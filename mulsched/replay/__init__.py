"""Replay: a trace through the same router that production uses, into a model of the engines."""

from mulsched.replay.engine import EngineModel
from mulsched.replay.openai_log import load_tokenizer, read_openai_log
from mulsched.replay.profile import Profile, Roofline, StepTable, StepTime, builtin_profile, load_profile
from mulsched.replay.readers import FORMATS, read_trace
from mulsched.replay.simulator import Disaggregation, ReplayResult, replay, replay_many
from mulsched.replay.step import CacheChange, StepLoad, StepResult
from mulsched.replay.synthetic import WORKLOADS, format_calibration, synthetic_trace, targets
from mulsched.replay.trace import Trace, TraceStats, lru_hit_ratio
from mulsched.replay.trace_file import write_trace
from mulsched.replay.validation import validate_trace

__all__ = [
    "FORMATS",
    "WORKLOADS",
    "CacheChange",
    "Disaggregation",
    "EngineModel",
    "Profile",
    "ReplayResult",
    "Roofline",
    "StepLoad",
    "StepResult",
    "StepTable",
    "StepTime",
    "Trace",
    "TraceStats",
    "builtin_profile",
    "format_calibration",
    "load_profile",
    "load_tokenizer",
    "lru_hit_ratio",
    "read_openai_log",
    "read_trace",
    "replay",
    "replay_many",
    "synthetic_trace",
    "targets",
    "validate_trace",
    "write_trace",
]

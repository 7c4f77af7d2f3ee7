"""Replay: a trace through the same router that production uses, into a model of the engines."""

from mulsched.replay.bursts import BURSTS, Burst, HotClass, burst_trace, steady_burst
from mulsched.replay.capacity import GPUS, MODELS, Gpu, ModelShape, kv_blocks
from mulsched.replay.engine import EngineModel
from mulsched.replay.fit import Fit, fit_profile
from mulsched.replay.openai_log import read_openai_log
from mulsched.replay.parallel import replay_many
from mulsched.replay.profile import BUILTIN_PROFILES, Profile, builtin_profile, load_profile, roofline
from mulsched.replay.readers import FORMATS, read_trace
from mulsched.replay.request_times import RequestTimes, read_request_times
from mulsched.replay.simulator import Disaggregation, ReplayResult, replay
from mulsched.replay.step import CacheChange, StepLoad, StepResult
from mulsched.replay.step_table import StepTable
from mulsched.replay.step_time import FittedStep, MoeRoofline, Roofline, StepTime
from mulsched.replay.synthetic import WORKLOADS, format_calibration, synthetic_trace, targets
from mulsched.replay.trace import Trace, TraceStats, lru_hit_ratio
from mulsched.replay.trace_file import write_trace
from mulsched.replay.validation import validate_trace
from mulsched.tokenizer import load_tokenizer

__all__ = [
    "BUILTIN_PROFILES",
    "BURSTS",
    "FORMATS",
    "GPUS",
    "MODELS",
    "WORKLOADS",
    "Burst",
    "CacheChange",
    "Disaggregation",
    "EngineModel",
    "Fit",
    "FittedStep",
    "Gpu",
    "HotClass",
    "ModelShape",
    "MoeRoofline",
    "Profile",
    "ReplayResult",
    "RequestTimes",
    "Roofline",
    "StepLoad",
    "StepResult",
    "StepTable",
    "StepTime",
    "Trace",
    "TraceStats",
    "builtin_profile",
    "burst_trace",
    "fit_profile",
    "format_calibration",
    "kv_blocks",
    "load_profile",
    "load_tokenizer",
    "lru_hit_ratio",
    "read_openai_log",
    "read_request_times",
    "read_trace",
    "replay",
    "replay_many",
    "roofline",
    "steady_burst",
    "synthetic_trace",
    "targets",
    "validate_trace",
    "write_trace",
]

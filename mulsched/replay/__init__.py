"""Replay: a trace through the same router that production uses, into a model of the engines."""

from mulsched.replay.trace import Trace, TraceStats, lru_hit_ratio

__all__ = ["Trace", "TraceStats", "lru_hit_ratio"]

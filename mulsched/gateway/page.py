"""The live page, and what it shows: instances, decisions with their scores, alarms."""

import math
from importlib.resources import files
from typing import Any

from mulsched.decision import Decision
from mulsched.gateway.config import GatewayConfig
from mulsched.gateway.engine import Engine
from mulsched.gateway.fleet import Fleet
from mulsched.gateway.records import Records
from mulsched.indicators import COLUMNS
from mulsched.lifecycle import Lifecycle

__all__ = ["PAGE", "PAGE_HEADERS", "overview"]

PAGE = files("mulsched.gateway").joinpath("page.html").read_bytes()
PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    # all of it is in the page, and it talks to its own origin only
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def overview(
    config: GatewayConfig, fleet: Fleet, lifecycle: Lifecycle, records: Records, now: float
) -> dict[str, Any]:
    """Return the state of the gateway for JSON."""
    eligible = fleet.eligible()
    return {
        "policy": lifecycle.router.policy.name,
        "block_size": lifecycle.router.block_size,
        "in_flight": sum(engine.in_flight for engine in fleet.engines.values()),
        "instances": [
            {**_instance(engine, engine.name in eligible), "kv_events": _kv_events(fleet, engine.name)}
            for engine in fleet.engines.values()
        ],
        "decisions": [
            _decision(request_id, decision, now - decided_s)
            for decided_s, request_id, decision in reversed(records.recent)
        ],
        "alarms": _alarms(config, fleet, lifecycle),
    }


def _instance(engine: Engine, eligible: bool) -> dict[str, Any]:
    counts = engine.counts
    return {
        "instance": engine.name,
        "state": engine.state,
        "draining": engine.draining,
        "leaving": engine.leaving,
        "eligible": eligible,
        "in_flight": engine.in_flight,
        "requests": counts["requests"],
        "failures": counts["failures"],
        "prompt": counts["prompt_tokens"],
        "hit": counts["hit_tokens"],
        "hit_ratio": _ratio(counts["hit_tokens"], counts["prompt_tokens"]),
        "reported_hit_ratio": _ratio(counts["reported_cached_tokens"], counts["reported_prompt_tokens"]),
    }


def _kv_events(fleet: Fleet, name: str) -> dict[str, Any] | None:
    """Return what is known of an engine's cache and the number of the message to apply next."""
    subscriber = fleet.listeners.subscribers.get(name)
    if subscriber is None:
        return None
    return {"state": subscriber.state, "next_sequence": subscriber.tracker.next_sequence}


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _decision(request_id: str, decision: Decision, age_s: float) -> dict[str, Any]:
    columns = decision.columns
    return {
        "request_id": request_id,
        "age_s": round(age_s, 3),
        "instance": decision.instance,
        "prompt": columns.request.prompt_tokens,
        "hit": decision.hit_tokens,
        "lower_tier": decision.lower_tier_tokens,
        "alarm": None if decision.alarm is None else str(decision.alarm),
        "candidates": [
            {
                "instance": name,
                "score": float(score) if math.isfinite(score) else None,
                **dict(zip(COLUMNS, values, strict=True)),
            }
            for name, score, values in zip(
                columns.instances, decision.scores.tolist(), columns.table.T.tolist(), strict=True
            )
        ],
    }


def _alarms(config: GatewayConfig, fleet: Fleet, lifecycle: Lifecycle) -> list[dict[str, str]]:
    alarms = [
        {"kind": engine.state, "instance": engine.name, "message": _WHY[engine.state]}
        for engine in fleet.engines.values()
        if engine.state in _WHY
    ]
    if not fleet.eligible():
        alarms.append({"kind": "no_engine", "instance": "", "message": "no engine is ready"})
    in_flight = sum(engine.in_flight for engine in fleet.engines.values())
    if in_flight >= config.max_in_flight:
        message = f"the limit of {config.max_in_flight} requests is reached"
        alarms.append({"kind": "full", "instance": "", "message": message})
    detector = lifecycle.router.detector
    if detector is not None:
        alarms += [{"kind": "prefix", "instance": "", "message": str(alarm)} for alarm in detector.alarms()]
    alarms += [
        {"kind": "kv_events", "instance": name, "message": f"what it has cached is {subscriber.state}"}
        for name, subscriber in fleet.listeners.subscribers.items()
        if subscriber.state != "known"
    ]
    return alarms


_WHY = {"starting": "has not answered a health check yet", "ejected": "failed, and gets no requests"}

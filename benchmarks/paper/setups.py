"""What is replayed where: traces cut to a size that replays in seconds, and the clusters they go to."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from mulsched.replay import Trace, read_trace, synthetic_trace
from mulsched.replay.profile import Profile, builtin_profile

PROFILES = {"qwen2": "qwen2-7b-h20", "qwen3": "qwen3-30b-a3b-h20"}
SMALL_KV_BLOCKS = 8_000  # a tenth of what qwen2-7b-h20 holds

# about 6,000 requests each; 2,400 of thinking, whose answers are ten times as long
DURATIONS_S = {"chat": 1000.0, "api": 260.0, "coder": 1000.0, "tool_agent": 900.0, "thinking": 1600.0}
MOONCAKE_S = 1500.0
MAX_PROMPT_TOKENS = 128_000
AGENTIC_SESSIONS, AGENTIC_TURNS, AGENTIC_PAUSE_S, AGENTIC_SPREAD_S = 200, 25, 600.0, 2000.0

FILES = {
    "mooncake": "mooncake/conversation_trace.jsonl",
    "agentic": "agentic_coding/coder_v6_clean.jsonl.gz",
}
TRACES = (*DURATIONS_S, *FILES)


@dataclass(frozen=True, slots=True)
class Source:
    """Where traces come from: the folder of the real ones, and files that replace synthetic ones by name.

    ``quick`` cuts every trace to a few hundred requests, to try the harness.
    """

    data: Path
    files: tuple[tuple[str, str], ...] = ()
    quick: bool = False


@dataclass(frozen=True, slots=True)
class Setup:
    """A trace and the cluster it goes to; ``kv_blocks`` replaces what the profile holds."""

    trace: str
    profile: str
    instances: int = 16
    kv_blocks: int | None = None

    @property
    def name(self) -> str:
        """Name of the setup, as in files and tables."""
        cluster = "" if self.instances == 16 else f"-{self.instances}i"
        return f"{self.trace}-{self.profile}{cluster}{'-small' if self.kv_blocks else ''}"

    @property
    def loop(self) -> str:
        """Coding agents wait for an answer before they ask again; the other traces go by their timestamps."""
        return "closed" if self.trace == "agentic" else "open"

    def engine(self) -> Profile:
        """Return the profile."""
        return builtin_profile(PROFILES[self.profile])

    def blocks(self) -> int:
        """Return the KV blocks of an instance."""
        return self.kv_blocks or self.engine().kv_blocks


def build_trace(setup: Setup, source: Source) -> Trace:
    """Return the setup's trace at its own rate, without requests that no engine of it can hold."""
    trace = _trace(setup.trace, source)
    room = setup.blocks() * setup.engine().block_size
    fits = trace.prompt_tokens + trace.output_tokens <= room
    if fits.all():
        return trace
    left_out = int((~fits).sum())
    return trace.take(
        fits, note=f"{left_out} requests left out that do not fit the {room} tokens of an engine"
    )


@lru_cache(maxsize=2)
def _trace(name: str, source: Source) -> Trace:
    given = dict(source.files).get(name)
    if name == "agentic":
        path = source.data / FILES[name] if given is None else given
        trace = first_turns(read_trace(path, max_prompt_tokens=MAX_PROMPT_TOKENS, spread_s=AGENTIC_SPREAD_S))
    elif name == "mooncake":
        trace = read_trace(source.data / FILES[name] if given is None else given).slice(0, MOONCAKE_S)
    elif given is not None:
        trace = read_trace(given).slice(0, DURATIONS_S[name])
    else:
        trace = synthetic_trace(name, duration_s=DURATIONS_S[name], seed=0)
    return trace.slice(0, float(trace.arrival_s[min(400, len(trace)) - 1])) if source.quick else trace


def first_turns(
    trace: Trace,
    *,
    sessions: int = AGENTIC_SESSIONS,
    turns: int = AGENTIC_TURNS,
    pause_s: float = AGENTIC_PAUSE_S,
) -> Trace:
    """Return the first turns of the first sessions, each up to its first long pause.

    The recorded sessions go on for days; a cut one has think times as recorded.
    """
    keep = np.zeros(len(trace), dtype=np.bool_)
    seen: dict[int, int] = {}
    ended: set[int] = set()
    for i, session in enumerate(trace.session.tolist()):
        turn = seen.get(session, 0)
        seen[session] = turn + 1
        if turn >= turns or trace.think_s[i] > pause_s or (turn == 0 and len(seen) > sessions):
            ended.add(session)
        keep[i] = session not in ended
    note = f"first {turns} turns of {sessions} sessions, each up to its first pause over {pause_s:g} s"
    return trace.take(keep, note=note)

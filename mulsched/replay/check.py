"""Would LMetric herd on this trace? The paper's condition, window by window, and what replays say of it.

A class is the requests of a window that share a prefix; its share x is its part of the window's requests
(the paper's, arXiv 2603.15202, section 5.2), or of their work: seconds from dispatch to finish, by Little's
law its part of the requests in the fleet. Its holders M are read from a replay under LMetric: at every
arrival, which instances have the prefix cached. The condition x <= |M| / N is ``failure_condition``'s.

It fails beyond chance where a class of weights w (1, or seconds) has

    sum w - |M| / N * W > c * sqrt(sum w^2)          W: of all requests in the window, c: the confidence

so no class of under c^2 requests can. Whether LMetric then loses is another question, which replays answer.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mulsched.errors import InvalidArgument
from mulsched.failure_condition import MAX_CLASSES, count_margin, worst_set
from mulsched.indicators import Columns
from mulsched.policies import get
from mulsched.replay.parallel import replay_many
from mulsched.replay.profile import Profile
from mulsched.replay.simulator import Loop, ReplayResult, replay
from mulsched.replay.trace import Floats, Ints, Trace

__all__ = ["TraceCheck", "Verdict", "Window", "WindowClass", "check_trace"]

Verdict = Literal["holds", "chance", "fails"]
"""Of the condition: it holds, it fails by no more than chance may bring, it fails."""

Progress = Callable[[str, int, int], None]

_REPEATS = 2  # of LMetric with random ties, for the noise; a third changes its estimate by little
_CANDIDATES = 64  # classes of a window whose holders are looked at: those with the largest shares
_LEAST_PREFIX_RATIO = 0.5


@dataclass(frozen=True, slots=True)
class WindowClass:
    """Requests of a window that share a prefix.

    ``request``: the trace's position of the first of them; its first ``prefix_tokens`` tokens are the
    prefix. ``share_ratio``, ``work_share_ratio``: its part of the window's requests and of their work.
    ``holders``: how many instances had the prefix, the lower median over the class's arrivals that found
    any; 0 if none did. ``margin``, ``work_margin``: ``holders / instances`` less either share; see
    :func:`~mulsched.failure_condition.count_margin` for 0. ``verdict``: the worse of both.
    """

    request: int
    prefix_tokens: int
    requests: int
    share_ratio: float
    work_share_ratio: float
    holders: int
    margin: float
    work_margin: float
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Window:
    """What the condition and the replays say of the requests that arrive in ``[start_s, end_s)``.

    ``classes``: the worst by margin first, none inside another. ``margin``, ``work_margin``: the smallest
    over these classes and all sets of them (``worst_set``); 1 without classes. ``ttft_ratio``,
    ``tpot_ratio``: the mean under LMetric over that under load-only (``least_loaded``), NaN where there is
    none; ``ttft_noise``, ``tpot_noise``: by how much ties alone move the former, as a ratio. ``lost``: the
    figures in which LMetric is worse by more than that.
    """

    start_s: float
    end_s: float
    requests: int
    classes: tuple[WindowClass, ...]
    margin: float
    work_margin: float
    verdict: Verdict
    ttft_ratio: float
    tpot_ratio: float
    ttft_noise: float
    tpot_noise: float
    lost: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TraceCheck:
    """The windows of a trace that have requests, in order, and what was asked."""

    trace: str
    synthetic: bool
    requests: int
    instances: int
    kv_blocks: int
    profile: str
    window_s: float
    confidence: float
    windows: tuple[Window, ...]

    @property
    def at_risk(self) -> bool:
        """Whether the condition fails beyond chance in some window."""
        return any(window.verdict == "fails" for window in self.windows)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON takes it; what is NaN is None."""
        fields: dict[str, Any] = _without_nan(dataclasses.asdict(self))
        return {"at_risk": self.at_risk} | fields


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def check_trace(
    trace: Trace,
    *,
    profile: Profile,
    instances: int = 16,
    kv_blocks: int | None = None,
    window_s: float = 60.0,
    confidence: float = 3.0,
    classes: int = MAX_CLASSES,
    loop: Loop = "open",
    seed: int = 0,
    processes: int = 1,
    progress: Progress | None = None,
) -> TraceCheck:
    """Check every window of a trace: four replays, then the prefixes of each window.

    ``window_s``: 60 as in the paper. ``confidence``: standard deviations, 3 as the failure detector's.
    ``classes``: of a window at most so many are kept, up to 16. Prefixes of under half of their requests'
    mean prompt are no classes: they save so little that LMetric keeps no batch above twice another's for
    them. Other arguments as :func:`~mulsched.replay.replay`; in a closed loop windows are by the arrivals
    under LMetric. Deterministic. O(blocks log blocks) beside the replays.
    Raises InvalidArgument, and as ``replay``.
    """
    for name, value in (("window_s", window_s), ("confidence", confidence)):
        if not 0 < value < math.inf:
            raise InvalidArgument(f"{name} must be finite and above 0, got {value}")
    if instances < 1:
        raise InvalidArgument(f"instances must be at least 1, got {instances}")
    if not 1 <= classes <= MAX_CLASSES:
        raise InvalidArgument(f"classes must lie in 1..{MAX_CLASSES}, got {classes}")
    options = {"profile": profile, "instances": instances, "kv_blocks": kv_blocks, "loop": loop}
    told = None if progress is None else _telling(progress)
    lmetric, matched = _watched(trace, options, seed, told)
    jobs: list[dict[str, Any]] = [{"policy": "least_loaded", "seed": seed}]
    jobs += [{"policy": "lmetric", "seed": seed + 1 + r, "ties": "random"} for r in range(_REPEATS)]
    load_only, *repeats = replay_many(
        trace, [job | options for job in jobs], processes=processes, progress=_telling_jobs(told)
    )
    work = lmetric.finish_s - lmetric.arrival_s
    comparison = _Comparison.of(lmetric, load_only, repeats)
    number = np.floor(lmetric.arrival_s / window_s)
    windows = []
    for w in np.unique(number).tolist():
        members = np.flatnonzero(number == w)
        search = _Search(trace, profile.block_size, members, matched[members], work[members], confidence)
        judged = search.judged(classes) | comparison.within(members)
        windows.append(Window(w * window_s, (w + 1) * window_s, len(members), **judged))
    return TraceCheck(
        trace=trace.name,
        synthetic=trace.synthetic,
        requests=len(trace),
        instances=instances,
        kv_blocks=lmetric.kv_blocks,
        profile=profile.name,
        window_s=window_s,
        confidence=confidence,
        windows=tuple(windows),
    )


def _telling(progress: Progress) -> Callable[[int, int, int], None]:
    return lambda job, done, total: progress(f"{job + 1} of {2 + _REPEATS} replays", done, total)


def _telling_jobs(told: Callable[[int, int, int], None] | None) -> Callable[[int, int, int], None] | None:
    return None if told is None else lambda job, done, total: told(job + 1, done, total)


def _watched(
    trace: Trace,
    options: Mapping[str, Any],
    seed: int,
    told: Callable[[int, int, int], None] | None,
) -> tuple[ReplayResult, NDArray[np.int32]]:
    """Replay under LMetric; also return the prompt's cached blocks per request and instance at its arrival.

    A policy that is told of its decisions chooses as the one that is not, and sees every candidate's column.
    """
    matched = np.zeros((len(trace), options["instances"]), dtype=np.int32)

    def watch(columns: Columns, position: int) -> None:
        request = columns.request.request_id
        assert isinstance(request, int), "a replay's requests are their positions in the trace"
        matched[request] = columns.matched_blocks

    policy = dataclasses.replace(get("lmetric"), on_dispatch=watch)
    progress = None if told is None else lambda done, total: told(0, done, total)
    return replay(trace, policy, seed=seed, progress=progress, **options), matched


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Per figure, each request's value under LMetric, under load-only and in the repeats; NaN for none."""

    figures: Mapping[str, tuple[Floats, Floats, list[Floats]]]
    noise: Mapping[str, float]  # over the whole trace

    @classmethod
    def of(
        cls, lmetric: ReplayResult, load_only: ReplayResult, repeats: Sequence[ReplayResult]
    ) -> "_Comparison":
        figures = {
            name: (value(lmetric), value(load_only), [value(repeat) for repeat in repeats])
            for name, value in (("ttft", _ttft), ("tpot", _tpot))
        }
        every = np.arange(len(lmetric.arrival_s))
        return cls(figures, {name: _noise(figures[name], every) for name in figures})

    def within(self, members: Ints) -> dict[str, Any]:
        """Return a window's ratios, noise and what was lost. Ties move no figure less than over all."""
        found: dict[str, Any] = {}
        lost = []
        for name, (lmetric, load_only, _) in self.figures.items():
            ratio = _mean(lmetric, members) / _mean(load_only, members)
            # few requests may see no tie by luck, so what ties do to the whole trace is the least
            noise = float(np.fmax(_noise(self.figures[name], members), self.noise[name]))
            found |= {f"{name}_ratio": ratio, f"{name}_noise": noise}
            if ratio > 1 + noise:
                lost.append(name)
        return found | {"lost": tuple(lost)}


def _ttft(result: ReplayResult) -> Floats:
    return result.ttft_s


def _tpot(result: ReplayResult) -> Floats:
    tpot = np.full(len(result.arrival_s), np.nan)
    tpot[result.output_tokens > 1] = result.tpot_s
    return tpot


def _mean(values: Floats, members: Ints) -> float:
    of_window = values[members]
    of_window = of_window[~np.isnan(of_window)]
    return float(of_window.mean()) if len(of_window) else math.nan


def _noise(figure: tuple[Floats, Floats, list[Floats]], members: Ints) -> float:
    lmetric, _, repeats = figure
    mean = _mean(lmetric, members)
    return max(abs(_mean(repeat, members) / mean - 1) for repeat in repeats)


class _Search:
    """The classes of one window of n requests, W instances, and their judgement."""

    def __init__(
        self,
        trace: Trace,
        engine_block: int,
        members: Ints,
        matched: NDArray[np.int32],
        work: Floats,
        confidence: float,
    ) -> None:
        self.trace = trace
        self.members = members
        self.matched = matched  # (n, W) engine blocks
        self.parts = trace.block_size // engine_block
        self.weights = np.stack([np.ones(len(members)), work])  # (2, n)
        self.totals = self.weights.sum(axis=1)
        self.instances = matched.shape[1]
        self.confidence = confidence

    def judged(self, most: int) -> dict[str, Any]:
        """Return the worst classes, margins and the verdict of the window."""
        chosen: list[tuple[WindowClass, Ints, frozenset[int]]] = []
        for found in sorted(self.classes(), key=lambda found: min(found[0].margin, found[0].work_margin)):
            # of prefixes inside each other only the worst: they share requests
            if len(chosen) < most and all(not np.isin(found[1], other[1]).any() for other in chosen):
                chosen.append(found)
        classes = tuple(found[0] for found in chosen)
        margins, verdicts = [], [found.verdict for found in classes]
        for weights, total in zip(self.weights, self.totals, strict=True):
            margin, verdict = self.together(weights, float(total), chosen)
            margins.append(margin)
            verdicts.append(verdict)
        return {
            "classes": classes,
            "margin": min([margins[0], *(found.margin for found in classes)]),
            "work_margin": min([margins[1], *(found.work_margin for found in classes)]),
            "verdict": _worst(verdicts),
        }

    def together(
        self, weights: Floats, total: float, chosen: Sequence[tuple[WindowClass, Ints, frozenset[int]]]
    ) -> tuple[float, Verdict]:
        """Return the smallest margin over sets of classes and its verdict."""
        shares = [min(1.0, float(weights[found[1]].sum()) / total) for found in chosen]  # sums round
        margin, hot = worst_set(shares, [found[2] for found in chosen], self.instances)
        inside = [found[1] for found in chosen if found[2] and found[2] <= hot]
        if not inside:
            return margin, "holds"
        return margin, self.verdict(weights, total, np.concatenate(inside), len(hot))

    def verdict(self, weights: Floats, total: float, requests: Ints, holders: int) -> Verdict:
        own = weights[requests]
        excess = float(own.sum()) - holders / self.instances * total
        if holders == 0 or excess <= 1e-9 * total:  # sums of floats round
            return "holds"
        return "fails" if excess > self.confidence * math.sqrt(float((own * own).sum())) else "chance"

    def classes(self) -> list[tuple[WindowClass, Ints, frozenset[int]]]:
        """Return the classes with the largest shares, their requests in the window and their holders."""
        prompts = self.trace.prompt_tokens[self.members]
        found = []
        for depth, requests in self.prefixes():
            prefix_tokens = depth * self.trace.block_size
            if prefix_tokens >= _LEAST_PREFIX_RATIO * prompts[requests].mean():
                share = float((self.weights[:, requests].sum(axis=1) / self.totals).max())
                found.append((share, depth, requests))
        found.sort(key=lambda class_: -class_[0])
        return [self.class_of(depth, requests) for _, depth, requests in found[:_CANDIDATES]]

    def prefixes(self) -> list[tuple[int, Ints]]:
        """Return blocks and requests of every prefix that two requests share and no longer one of the same.

        Ids are chained, so an id is a prefix, and how many requests have it falls along a prompt: a prefix
        is wanted where it falls. O(blocks log blocks).
        """
        whole = self.trace.prompt_tokens[self.members] // self.trace.block_size
        ids = [self.trace.block_ids(int(i))[:n] for i, n in zip(self.members, whole, strict=True)]
        lengths = np.array([len(x) for x in ids])
        if not lengths.sum():
            return []
        owner = np.repeat(np.arange(len(ids)), lengths)
        flat = np.concatenate(ids)
        depth = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1
        _, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
        count = counts[inverse]
        following = np.append(count[1:], 0)
        following[np.cumsum(lengths)[lengths > 0] - 1] = 0
        ends = np.unique(inverse[(following < count) & (count > 1)])
        order = np.argsort(inverse, kind="stable")
        starts = np.cumsum(counts) - counts
        places = [order[starts[block] : starts[block] + counts[block]] for block in ends]
        return [(int(depth[place[0]]), owner[place]) for place in places]

    def class_of(self, depth: int, requests: Ints) -> tuple[WindowClass, Ints, frozenset[int]]:
        has = self.matched[requests] >= depth * self.parts
        counts = np.sort(has.sum(axis=1))
        counts = counts[counts > 0]
        holders = int(counts[(len(counts) - 1) // 2]) if len(counts) else 0
        most = np.argsort(-has.sum(axis=0), kind="stable")[:holders]  # those that had it most often
        shares = [
            min(1.0, float(weights[requests].sum()) / float(total))  # sums round
            for weights, total in zip(self.weights, self.totals, strict=True)
        ]
        verdicts = [
            self.verdict(weights, float(total), requests, holders)
            for weights, total in zip(self.weights, self.totals, strict=True)
        ]
        margins = [count_margin(share, holders, self.instances) for share in shares]
        described = WindowClass(
            request=int(self.members[requests[0]]),
            prefix_tokens=depth * self.trace.block_size,
            requests=len(requests),
            share_ratio=shares[0],
            work_share_ratio=shares[1],
            holders=holders,
            margin=margins[0],
            work_margin=margins[1],
            verdict=_worst(verdicts),
        )
        return described, requests, frozenset(most.tolist())


def _worst(verdicts: Sequence[Verdict]) -> Verdict:
    order: tuple[Verdict, ...] = ("holds", "chance", "fails")
    return max(verdicts, key=order.index)

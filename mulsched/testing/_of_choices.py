"""Invariants of choices: who is chosen when something changes, and who must not be."""

from collections import Counter

import numpy as np
from hypothesis import assume, reject
from hypothesis import strategies as st

from mulsched.indicators import Columns
from mulsched.router import Router
from mulsched.testing import strategies
from mulsched.testing._columns import BETTER_LOW, with_values
from mulsched.testing._subject import Draw, Subject
from mulsched.testing.report import CounterExample, Shown

__all__ = [
    "best_wins",
    "dominance",
    "independent_of_irrelevant",
    "monotone",
    "no_zero_veto",
    "ties_do_not_herd",
    "work_conserving",
]

HUGE = 1_000_000


def monotone(subject: Subject, draw: Draw) -> CounterExample | None:
    """An instance that is not chosen is not chosen for getting worse.

    Worse is fewer matched blocks, or more queued tokens, running or waiting requests, or context; one of
    them changes, for one instance.
    Domain: two candidates or more.
    Gives: load drives requests away and hits attract them, each at any level of the others.
    Breaks in: signs turned by mistake; ratios with a load below the line, such as ``p_tokens / running``.
    """
    trial, columns = subject.trial(draw), draw(subject.columns(min_size=2))
    before = trial.ask("before", columns)
    at = draw(st.sampled_from([i for i in range(len(columns)) if i != before.position]))
    indicator = draw(st.sampled_from(["matched_blocks", *BETTER_LOW]))
    old = int(columns[indicator][at])
    if indicator == "matched_blocks":
        assume(old > 0)
        new = draw(st.integers(0, old - 1))
    else:
        assume(indicator != "context_tokens" or columns.batch_size[at] > 1)
        new = old + draw(st.integers(1, 50) | st.integers(1, HUGE))
    after = trial.ask("after", with_values(columns, at, **{indicator: new}))
    if after.position != at:
        return None
    reason = f"{after.instance} is not chosen with {indicator} {old}, and chosen with {new}"
    return CounterExample(reason, (before, after), trial.history)


def dominance(subject: Subject, draw: Draw) -> CounterExample | None:
    """No instance beats by its score one that is no worse in every indicator and better in one.

    That is, if the worse one is chosen, their scores are equal and a tie decided. Filtered out counts as the
    worst score. Indicators are matched blocks, queue, running, waiting and context; the size of the known
    cache may differ, since blocks that no request uses are free to evict.
    Domain: two candidates or more, of which one dominates another.
    Gives: nobody has to explain why the request went to the fuller queue with the colder cache.
    Breaks in: sessions and hash rings, which do not look; draws, of two choices too; "the smallest cache"
    (SGLang below its threshold).
    """
    trial, columns = subject.trial(draw), draw(subject.columns(min_size=2))
    better, worse = _two(draw, columns)
    # as loaded as the better one and as drawn together, which is never less
    values = {name: int(columns[name][better] + columns[name][worse]) for name in BETTER_LOW}
    values["matched_blocks"] = int(min(columns.matched_blocks[better], columns.matched_blocks[worse]))
    assume(any(value != columns[name][better] for name, value in values.items()))
    asked = trial.ask("asked", with_values(columns, worse, **values))
    best = asked.scores[better]
    if asked.position != worse or asked.scores[worse] == best:
        return None
    names = asked.columns.instances
    reason = f"{names[worse]} is chosen over {names[better]}, no worse in anything and better in some"
    return CounterExample(reason, (asked,), trial.history)


def best_wins(subject: Subject, draw: Draw) -> CounterExample | None:
    """An instance that is better than every other in every indicator is chosen.

    Indicators are those of ``dominance``.
    Domain: two candidates or more, of which one is idle and has matched more blocks than any other, and the
    others have running and waiting requests, a queue and context.
    Gives: where there is nothing to trade off, nothing is traded off, ties included.
    Breaks in: what breaks ``dominance``, apart from ties; round robin.
    """
    trial, columns = subject.trial(draw), draw(subject.columns(min_size=2))
    best = draw(st.integers(0, len(columns) - 1))
    most = columns.request.prompt_tokens // columns.block_size
    assume(most > 0)
    for name in BETTER_LOW:
        np.maximum(columns[name], 1, out=columns[name])
    np.minimum(columns.matched_blocks, most - 1, out=columns.matched_blocks)
    columns = with_values(columns, best, matched_blocks=most, **dict.fromkeys(BETTER_LOW, 0))
    asked = trial.ask("asked", columns)
    if asked.position == best:
        return None
    names = asked.columns.instances
    reason = f"{asked.instance} is chosen, though {names[best]} is better than all in everything"
    return CounterExample(reason, (asked,), trial.history)


def work_conserving(subject: Subject, draw: Draw) -> CounterExample | None:
    """An idle instance is chosen if it has matched as many blocks as any, rather than one with requests.

    Domain: two candidates or more, of which at least one is idle (nothing running, waiting, queued) with
    the longest match, and the others have requests; caches may be of any size.
    Gives: no request waits behind others while an instance that would serve it as well does nothing.
    Breaks in: sessions and hash rings; round robin and draws; ``ties="first"`` with a score of the cache
    alone; "the smallest cache".
    """
    trial, columns = subject.trial(draw), draw(subject.columns(min_size=2))
    idle = draw(st.integers(0, len(columns) - 1))
    # without requests there is no queue
    columns.queued_prefill_tokens[columns.batch_size == 1] = 0
    columns = with_values(
        columns, idle, matched_blocks=int(columns.matched_blocks.max()), **dict.fromkeys(BETTER_LOW, 0)
    )
    assume((columns.batch_size > 1).any())
    asked = trial.ask("asked", columns)
    if columns.batch_size[asked.position] == 1:
        return None
    names = asked.columns.instances
    reason = f"{asked.instance} is chosen, which is busy; {names[idle]} is idle and has cached as much"
    return CounterExample(reason, (asked,), trial.history)


def independent_of_irrelevant(subject: Subject, draw: Draw) -> CounterExample | None:
    """Taking away an instance that is not chosen does not change the choice.

    Domain: two candidates or more.
    Gives: a hot, cold or failing instance that nobody would choose cannot turn the choice between the
    others; a decision is explained by two rows.
    Breaks in: min-max normalisation and division by the largest (llm-d's queue scorers, Bailian's, linear
    scores as LMetric's paper compares with); balance gates over the fleet (SGLang, AIBrix); a bound on the
    mean load.
    """
    trial, columns = subject.trial(draw), draw(subject.columns(min_size=2))
    before = trial.ask("before", columns)
    gone = draw(st.sampled_from([i for i in range(len(columns)) if i != before.position]))
    after = trial.ask("after", columns.take(np.arange(len(columns)) != gone))
    if before.instance == after.instance:
        return None
    reason = (
        f"without {columns.instances[gone]}, which is not chosen, "
        f"the choice moves from {before.instance} to {after.instance}"
    )
    return CounterExample(reason, (before, after), trial.history)


def no_zero_veto(subject: Subject, draw: Draw) -> CounterExample | None:
    """A zero in one indicator does not hide that all the others are hopeless.

    Domain: two candidates. One has nothing queued, or nothing running, or nothing waiting, or no context, or
    no block to compute, and a million of each of the others on top of what the second has, which has no
    more than 300 tokens queued: behind a million of them it would be hopeless too.
    Gives: no instance is chosen at any load for one good column.
    Breaks in: products with a factor that can be 0 (Infera had all requests on one instance while no load
    was booked); scores of one column; sums of normalised columns, which bound what load can cost (a
    ``linear`` weight of .7 on the cache outweighs any batch); prefix thresholds (Preble, llm-d).
    """
    trial = subject.trial(draw)
    columns = draw(subject.columns(min_size=2, max_size=2))
    np.minimum(columns.queued_prefill_tokens, 300, out=columns.queued_prefill_tokens)
    zero, other = _two(draw, columns)
    indicator = draw(st.sampled_from(["matched_blocks", *BETTER_LOW]))
    values = {name: int(columns[name][other]) + HUGE for name in BETTER_LOW}
    values["matched_blocks"] = 0
    if indicator == "matched_blocks":
        whole, part = divmod(columns.request.prompt_tokens, columns.block_size)
        assume(whole > 0 and part == 0)
        values["matched_blocks"] = whole
    else:
        values[indicator] = 0
    asked = trial.ask("asked", with_values(columns, zero, **values))
    if asked.position == other:
        return None
    names, value = asked.columns.instances, values[indicator]
    reason = f"{names[zero]} is chosen for its {indicator} {value}, {names[other]} is better in all else"
    return CounterExample(reason, (asked,), trial.history)


def ties_do_not_herd(subject: Subject, draw: Draw) -> CounterExample | None:
    """In a burst of equal requests on equal instances, none is ever sent two more than another.

    Each is booked before the next is decided (``Router.route``), and none has its first token yet.
    Domain: 2 to 4 instances with equal reported load and nothing cached, up to 4 requests for each, no
    session. Prefixes in flight are ignored: who follows them herds by affinity, not by ties.
    Gives: a fleet that comes up, or is idle, is not served by its first row.
    Breaks in: ``ties="first"`` with a score that does not see what waits (Dynamo, SGLang and Infera each had
    a report of it); draws, by chance; hash rings.
    """
    n, rounds = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    load, prompt = draw(strategies.loads()), draw(strategies.prompts())
    router = Router(policy=subject.factory(), seed=draw(st.integers(0, 5)), in_flight="ignore")
    for row in range(n):
        router.add_instance(f"i{row}")
        router.report_load(f"i{row}", **load)
    sent: Counter[str] = Counter(dict.fromkeys(router.instances, 0))
    for request in range(n * rounds):
        try:
            with np.errstate(all="ignore"):
                decision = router.route(prompt, request_id=request, now=10.0)
        except Exception:  # as in Trial.ask
            reject()
        sent[decision.instance] += 1
        counts = [sent[instance] for instance in router.instances]
        if max(counts) - min(counts) > 1:
            last = Shown("the last of them", decision.columns, decision.scores, decision.position)
            reason = f"{request + 1} equal requests on {n} equal instances went {', '.join(map(str, counts))}"
            return CounterExample(reason, (last,))
    return None


def _two(draw: Draw, columns: Columns) -> tuple[int, int]:
    """Return the positions of two candidates."""
    first, step = draw(st.integers(0, len(columns) - 1)), draw(st.integers(1, len(columns) - 1))
    return first, (first + step) % len(columns)

"""A router's log: what is written, what is read back, and what a crash leaves."""

import dataclasses
import json
import threading
from base64 import b64encode
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulsched import Router
from mulsched.errors import InvalidArgument, InvalidType, TraceError
from mulsched.failure import FailureDetector
from mulsched.record import FORMAT, VERSION, Recorder
from mulsched.replay import read_trace, replay, synthetic_trace, validate_trace, write_trace
from mulsched.replay.profile import builtin_profile
from mulsched.types import Namespace


def router_of(n=2, block_size=16):
    router = Router(block_size=block_size)
    for i in range(n):
        router.add_instance(f"i{i}", cache_blocks=1000)
    return router


def keys(*names):
    return np.array(names, dtype=np.uint64)


def recorded(path, prompts, **options):
    """Record prompts of whole blocks, one a second, each named by its position."""
    router = router_of()
    with Recorder(path, **options) as recorder:
        for i, prompt in enumerate(prompts):
            decision = router.route_keys(keys(*prompt), prompt_tokens=16 * len(prompt) + 1, request_id=i)
            recorder.dispatched(decision, now=float(i))
    return [json.loads(line) for line in path.read_text().splitlines()]


def beginnings(trace):
    """Which requests share which leading blocks: what ids say, whatever their numbers are."""
    sharing = defaultdict(list)
    for i in range(len(trace)):
        ids = trace.block_ids(i)[: trace.prompt_tokens[i] // trace.block_size].tolist()
        for depth in range(len(ids)):
            sharing[(depth, ids[depth])].append(i)
    return sorted((depth, who) for (depth, _), who in sharing.items())


def beginnings_of(prompts):
    """The same of prompts as lists of keys."""
    sharing = defaultdict(list)
    for i, prompt in enumerate(prompts):
        for depth in range(len(prompt)):
            sharing[tuple(prompt[: depth + 1])].append(i)
    return sorted((len(path) - 1, who) for path, who in sharing.items())


def test_a_log_says_what_was_decided_and_when(tmp_path):
    router = router_of()
    with Recorder(tmp_path / "log") as recorder:
        decision = router.route(list(range(40)), request_id="a", now=5.0)
        recorder.dispatched(decision, now=5.0)
        recorder.first_token("a", now=5.5)
        recorder.finished("a", now=6.0, output_tokens=7)
    header, dispatched, first, finished = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert (header["format"], header["version"], header["block_size"]) == (FORMAT, VERSION, 16)
    assert dispatched == {
        "event": "dispatched",
        "t": 5.0,
        "id": "a",
        "instance": "i0",
        "prompt_tokens": 40,
        "candidates": 2,
        "policy": "lmetric",
        "score": 40.0,
        "columns": list(decision.indicators.values()),
        "decision": 0,
        "keys": b64encode(decision.columns.request.keys.astype("<u8").tobytes()).decode(),
    }
    assert header["columns"] == list(decision.indicators)
    assert first == {"event": "first_token", "t": 5.5, "id": "a"}
    assert finished == {"event": "finished", "t": 6.0, "id": "a", "output_tokens": 7}


def test_an_alarm_is_written_in_words(tmp_path):
    router = Router(detector=FailureDetector())
    for i in range(4):
        router.add_instance(f"i{i}", cache_blocks=1000)
    with Recorder(tmp_path / "log") as recorder:
        for i in range(40):  # all but the last to one instance
            decision = router.route_keys(
                keys(*range(20)), prompt_tokens=321, request_id=i, candidates=["i0"] if i < 39 else None
            )
            recorder.dispatched(decision, now=float(i))
    assert decision.alarm is not None
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["alarm"] == str(decision.alarm)
    assert len(read_trace(tmp_path / "log")) == 40


def test_a_prompt_text_is_nowhere_in_the_log(tmp_path):
    router = router_of()
    with Recorder(tmp_path / "log") as recorder:
        text = "a secret of sixteen and more characters"
        recorder.dispatched(router.route_text(text, request_id=1), now=0.0)
    assert "secret" not in (tmp_path / "log").read_text()


def test_blocks_that_were_written_are_referred_to(tmp_path):
    lines = recorded(tmp_path / "log", [[1, 2, 3], [1, 2, 4, 5], [1, 2, 4, 5], [9]])
    assert [line.get("shared") for line in lines[1:]] == [None, [0, 2], [1, 4], None]
    assert [len(line.get("keys", "")) for line in lines[1:]] == [32, 24, 0, 12]


@pytest.mark.parametrize(
    "prompts", [[[1, 2], [3, 2]], [[1, 2, 3], [2, 3]], [[1, 1], [1]], [[0, 0], [0], [5, 0]]]
)
def test_equal_blocks_after_different_ones_are_not_shared(tmp_path, prompts):
    recorded(tmp_path / "log", prompts)
    assert beginnings(read_trace(tmp_path / "log")) == beginnings_of(prompts)


def test_prompts_under_different_cache_salts_share_nothing(tmp_path):
    router = router_of()
    with Recorder(tmp_path / "log") as recorder:
        for salt in "ab":
            namespace = Namespace(cache_salt=salt)
            decision = router.route(list(range(160)), request_id=salt, namespace=namespace)
            recorder.dispatched(decision, now=0.0)
    trace = read_trace(tmp_path / "log")
    assert not set(trace.block_ids(0)) & set(trace.block_ids(1))


def test_other_ids_than_names_and_numbers_are_written_by_their_repr(tmp_path):
    with Recorder(tmp_path / "log") as recorder:
        recorder.first_token(("a", 1), now=0.0)
    assert json.loads((tmp_path / "log").read_text().splitlines()[1])["id"] == "('a', 1)"


def test_a_decision_without_id_needs_one(tmp_path):
    decision = router_of().select(list(range(40)))
    with Recorder(tmp_path / "log") as recorder:
        with pytest.raises(InvalidArgument, match="no request id"):
            recorder.dispatched(decision, now=0.0)
        recorder.dispatched(decision, now=0.0, request_id="b")
    assert json.loads((tmp_path / "log").read_text().splitlines()[1])["id"] == "b"


def test_a_log_is_never_overwritten(tmp_path):
    (tmp_path / "log").write_text("precious")
    with pytest.raises(FileExistsError):
        Recorder(tmp_path / "log")
    assert (tmp_path / "log").read_text() == "precious"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda recorder: recorder.dispatched("i0", now=0.0), InvalidType),
        (lambda recorder: recorder.first_token(1, now=None), InvalidType),
        (lambda recorder: recorder.finished(1, now=float("nan")), InvalidArgument),
        (lambda recorder: recorder.finished(1, now=0.0, output_tokens=-1), InvalidArgument),
        (lambda recorder: recorder.cancelled(1, now=None), InvalidType),
        (
            lambda recorder: recorder.dispatched(
                router_of(block_size=32).route(list(range(40)), request_id=1), now=0.0
            ),
            InvalidArgument,
        ),
    ],
)
def test_bad_input_writes_nothing(tmp_path, call, error):
    with Recorder(tmp_path / "log") as recorder, pytest.raises(error):
        call(recorder)
    assert len((tmp_path / "log").read_text().splitlines()) == 1


WRONG = [
    {"block_size": 0},
    {"block_size": 2**14 + 1},
    {"known_keys": 0},
    {"units_per_token": 0},
    {"block_size": 18, "units_per_token": 4},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_recorder_that_cannot_be_leaves_no_file(tmp_path, wrong):
    with pytest.raises(InvalidArgument):
        Recorder(tmp_path / "log", **wrong)
    assert not (tmp_path / "log").exists()


def test_flush_writes_what_is_buffered(tmp_path):
    with Recorder(tmp_path / "log") as recorder:
        recorder.first_token(1, now=0.0)
        recorder.flush()
        assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_threads_share_a_recorder(tmp_path):
    router = router_of()

    def work(thread):
        for i in range(50):
            prompt = keys(1, 2, 3 + i)
            decision = router.route_keys(prompt, prompt_tokens=50, request_id=(thread, i))
            recorder.dispatched(decision, now=float(i))

    with Recorder(tmp_path / "log", known_keys=20) as recorder:
        threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert validate_trace(tmp_path / "log")[0] == []
    assert len(read_trace(tmp_path / "log")) == 200


def test_a_log_reads_as_the_trace_that_was_routed(tmp_path):
    trace = synthetic_trace("chat", duration_s=60, seed=3)
    router = router_of()
    with Recorder(tmp_path / "log", units_per_token=1) as recorder:
        for i, (now, prompt) in enumerate(zip(trace.arrival_s, trace.prompt_tokens.tolist(), strict=True)):
            decision = router.route_keys(trace.keys(i), prompt_tokens=prompt, request_id=i, now=float(now))
            recorder.dispatched(decision, now=float(now))
            recorder.finished(i, now=float(now) + 1, output_tokens=int(trace.output_tokens[i]))
    read = read_trace(tmp_path / "log")
    assert read.arrival_s.tolist() == (trace.arrival_s - trace.arrival_s[0]).tolist()
    assert read.prompt_tokens.tolist() == trace.prompt_tokens.tolist()
    assert read.output_tokens.tolist() == trace.output_tokens.tolist()
    assert beginnings(read) == beginnings(trace)
    assert read.notes == ()


def test_a_log_in_characters_reads_in_tokens_and_keeps_what_prompts_share(tmp_path):
    router = router_of(block_size=64)
    text = "".join(f"{i:04}" for i in range(250))
    texts = [text[:length] for length in (2, 62, 64, 66, 1000, 998)]
    with Recorder(tmp_path / "log", block_size=64, units_per_token=4) as recorder:
        for i, text in enumerate(texts):
            recorder.dispatched(router.route_text(text, request_id=i), now=float(i))
    trace = read_trace(tmp_path / "log")
    assert trace.block_size == 16
    assert trace.prompt_tokens.tolist() == [1, 15, 16, 16, 250, 249]
    assert [len(trace.block_ids(i)) for i in range(6)] == [0, 0, 1, 1, 15, 15]
    assert trace.block_ids(4).tolist() == trace.block_ids(5).tolist()


def test_a_log_that_does_not_say_its_unit_is_read_as_tokens_with_a_note(tmp_path):
    router = router_of(block_size=64)
    with Recorder(tmp_path / "log", block_size=64) as recorder:
        recorder.dispatched(router.route_text("ab" * 500, request_id=0), now=0.0)
    trace = read_trace(tmp_path / "log")
    assert (trace.block_size, trace.prompt_tokens.tolist()) == (64, [1000])
    assert "the log does not say its unit: read as tokens" in trace.notes


def test_a_log_replays_as_the_trace_does(tmp_path):
    trace = synthetic_trace("chat", duration_s=60, seed=3)
    trace = dataclasses.replace(trace, arrival_s=trace.arrival_s - trace.arrival_s[0])
    router = router_of()
    with Recorder(tmp_path / "log") as recorder:
        for i in range(len(trace)):
            now = float(trace.arrival_s[i])
            decision = router.route_keys(
                trace.keys(i), prompt_tokens=int(trace.prompt_tokens[i]), request_id=i
            )
            recorder.dispatched(decision, now=now)
            recorder.finished(i, now=now, output_tokens=int(trace.output_tokens[i]))
    options = {"profile": builtin_profile(), "instances": 2}
    of_log = replay(read_trace(tmp_path / "log"), "lmetric", **options)
    of_trace = replay(trace, "lmetric", **options)
    assert of_log.instance.tolist() == of_trace.instance.tolist()
    assert of_log.cached_tokens.tolist() == of_trace.cached_tokens.tolist()


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_torn_last_line_is_left_out_and_told_of(tmp_path, left):
    recorded(tmp_path / "log", [[1, 2], [1, 3], [1, 4]])
    whole = (tmp_path / "log").read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    (tmp_path / "log").write_bytes(whole[:last] + whole[last:-1][:left])
    trace = read_trace(tmp_path / "log")
    assert len(trace) == 2
    assert "the last line is torn, as by a crash, and left out" in trace.notes


def test_a_last_line_that_lacks_only_its_end_is_read(tmp_path):
    recorded(tmp_path / "log", [[1, 2], [1, 3]])
    (tmp_path / "log").write_bytes((tmp_path / "log").read_bytes()[:-1])
    assert len(read_trace(tmp_path / "log")) == 2


def test_a_torn_line_in_the_middle_is_an_error(tmp_path):
    recorded(tmp_path / "log", [[1, 2], [1, 3]])
    lines = (tmp_path / "log").read_text().splitlines()
    (tmp_path / "log").write_text("\n".join([lines[0], lines[1][:30], lines[2]]) + "\n")
    with pytest.raises(TraceError, match="log:2: not JSON"):
        read_trace(tmp_path / "log")


def test_what_refers_to_a_bad_line_is_bad_too(tmp_path):
    recorded(tmp_path / "log", [[1, 2], [1, 3], [7]])
    lines = (tmp_path / "log").read_text().splitlines()
    (tmp_path / "log").write_text("\n".join([lines[0], "{}", *lines[2:]]) + "\n")
    problems, trace = validate_trace(tmp_path / "log")
    assert problems == [
        "log:2: field 't' is missing",
        "log:3: shares blocks with decision 0, which was not read",
    ]
    assert len(trace) == 1


def test_an_answer_of_unknown_length_is_one_token_and_counted(tmp_path):
    recorded(tmp_path / "log", [[1, 2]], units_per_token=1)
    trace = read_trace(tmp_path / "log")
    assert trace.output_tokens.tolist() == [1]
    assert trace.notes == ("1 requests recorded without output replay with one token",)


def test_ends_of_requests_from_before_the_log_are_counted(tmp_path):
    with Recorder(tmp_path / "log", units_per_token=1) as recorder:
        recorder.finished("earlier", now=0.0, output_tokens=3)
        recorder.dispatched(router_of().route(list(range(20)), request_id="a"), now=1.0)
        recorder.finished("a", now=1.0, output_tokens=3)
    assert read_trace(tmp_path / "log").notes == (
        "1 signals of requests that the log does not have left out",
    )


def test_a_cancelled_request_says_when_and_how_far_it_came(tmp_path):
    with Recorder(tmp_path / "log") as recorder:
        recorder.cancelled("a", now=2.0)
        recorder.cancelled("b", now=3.0, output_tokens=5)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()[1:]]
    assert lines == [
        {"event": "cancelled", "t": 2.0, "id": "a"},
        {"event": "cancelled", "t": 3.0, "id": "b", "output_tokens": 5},
    ]


def test_a_request_that_was_tried_twice_replays_once(tmp_path):
    router = router_of()
    with Recorder(tmp_path / "log", units_per_token=1) as recorder:
        recorder.dispatched(router.route(list(range(40)), request_id="a"), now=0.0)
        router.cancel("a")
        recorder.cancelled("a", now=1.0)
        # its blocks are those of the line that is left out
        recorder.dispatched(router.route(list(range(40)), request_id="a"), now=1.0)
        recorder.finished("a", now=2.0, output_tokens=3)
    trace = read_trace(tmp_path / "log")
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([40], [3])
    assert trace.notes == ("1 requests that were cancelled before their first token left out",)


def test_a_trace_without_what_was_cancelled_is_a_valid_trace(tmp_path):
    router = router_of()
    with Recorder(tmp_path / "log", units_per_token=1) as recorder:
        for i in range(3):
            recorder.dispatched(router.route(list(range(i, i + 40)), request_id=i), now=float(i))
        recorder.cancelled(0, now=3.0)
        recorder.cancelled(1, now=3.0)
    write_trace(read_trace(tmp_path / "log"), tmp_path / "trace")
    problems, trace = validate_trace(tmp_path / "trace")
    assert (problems, len(trace), trace.arrival_s.tolist()) == ([], 1, [0.0])


def test_a_request_that_was_cancelled_later_replays_with_what_its_client_got(tmp_path):
    router = router_of()
    with Recorder(tmp_path / "log", units_per_token=1) as recorder:
        recorder.dispatched(router.route(list(range(40)), request_id="a"), now=0.0)
        recorder.first_token("a", now=1.0)
        recorder.cancelled("a", now=2.0, output_tokens=7)
    assert read_trace(tmp_path / "log").output_tokens.tolist() == [7]


def test_an_id_that_is_used_again_ends_where_it_was_used_last(tmp_path):
    router = router_of()
    with Recorder(tmp_path / "log") as recorder:
        for now, output in ((0.0, 3), (5.0, 4)):
            recorder.dispatched(router.route(list(range(20)), request_id="a"), now=now)
            recorder.finished("a", now=now + 1, output_tokens=output)
            router.finish("a")
    assert read_trace(tmp_path / "log").output_tokens.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "log:1: version 2 is newer than 1"),
        ({"block_size": 0}, "log:1: block_size must lie in 1"),
        ({"units_per_token": "four"}, "log:1: units_per_token must be an integer, got 'four'"),
        ({"units_per_token": 3}, "log:1: block_size must be a multiple of units_per_token, got 16 and 3"),
    ],
)
def test_a_bad_header_is_refused(tmp_path, change, message):
    header, *rest = recorded(tmp_path / "log", [[1]])
    (tmp_path / "log").write_text("\n".join(map(json.dumps, [header | change, *rest])))
    with pytest.raises(TraceError, match=message):
        read_trace(tmp_path / "log")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"event": "lost"}, "event must be dispatched, first_token, finished or cancelled, got 'lost'"),
        ({"id": None}, "id must be a string or an integer, got None"),
        ({"keys": "@"}, "keys must be 64-bit numbers in base64, got '@'"),
        ({"keys": "AAAA"}, "keys must be 64-bit numbers in base64, got 'AAAA'"),
        ({"prompt_tokens": 16}, "16 tokens have 1 whole blocks of 16, got 2"),
        ({"shared": [0]}, "shared must be a decision and its leading blocks, got [0]"),
        ({"shared": [0, 5]}, "shares 5 blocks with decision 0, which has 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path, change, message):
    *good, bad = recorded(tmp_path / "log", [[1, 2], [3, 4]])
    (tmp_path / "log").write_text("\n".join(map(json.dumps, [*good, bad | change])) + "\n")
    assert validate_trace(tmp_path / "log")[0] == [f"log:3: {message}"]


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=12), st.integers(1, 12))
def test_what_is_remembered_changes_no_prefix(tmp_path_factory, prompts, known_keys):
    path = tmp_path_factory.mktemp("log") / "log"
    recorded(path, prompts, known_keys=known_keys)
    assert beginnings(read_trace(path)) == beginnings_of(prompts)

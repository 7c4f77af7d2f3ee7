"""Readers of trace files: what they read, and that a bad line is named."""

import gzip
from pathlib import Path

import pytest

from mulsched.errors import InvalidArgument, TraceError
from mulsched.replay import read_trace

DATA = Path(__file__).parent / "data"
MOONCAKE = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}'
BAILIAN = (
    '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 5, "input_length": 20, "output_length": 5, '
    '"hash_ids": [1]}'
)
AGENTIC = '{"sid": "a", "t": 5, "in": 100, "out": 10, "think_time": 0.0, "rle": [1, 1]}'
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


def test_mooncake_keeps_ids_and_spreads_arrivals_within_a_tick():
    trace = read_trace(DATA / "mooncake.jsonl")
    assert trace.block_size == 512
    assert [trace.block_ids(i).tolist() for i in range(3)] == [[0, 1], [0, 2, 3], [0, 9]]
    assert trace.prompt_tokens.tolist() == [1000, 1536, 600]
    assert trace.output_tokens.tolist() == [5, 7, 1]
    assert trace.arrival_s[0] == 0 <= trace.arrival_s[1] < 3 < trace.arrival_s[2] + 3
    assert "spread" in trace.notes[0]


def test_the_seed_places_arrivals():
    one, same, other = (read_trace(DATA / "mooncake.jsonl", seed=seed) for seed in (1, 1, 2))
    assert one.arrival_s.tolist() == same.arrival_s.tolist() != other.arrival_s.tolist()


def test_ticks_can_be_left_as_they_are():
    trace = read_trace(DATA / "mooncake.jsonl", spread_ticks=False)
    assert trace.arrival_s.tolist() == [0, 0, 3]
    assert trace.notes == ()


def test_bailian_links_follow_ups_and_tolerates_parents_from_before_the_trace():
    trace = read_trace(DATA / "bailian.jsonl")
    assert trace.block_size == 16
    assert trace.previous.tolist() == [-1, -1, 0]
    assert trace.session.tolist() == [1, 99, 1]
    assert trace.think_s.tolist() == [0, 0, 60]
    assert trace.block_ids(2).tolist() == [10, 11, 13, 14, 15]


def test_agentic_sessions_follow_their_own_clock():
    trace = read_trace(DATA / "agentic.jsonl", spread_s=100, seed=3)
    assert trace.block_size == 64
    first, second = (i for i in range(3) if trace.session[i] == 0)
    assert trace.previous[second] == first
    assert trace.think_s[second] == 7
    assert trace.arrival_s[second] - trace.arrival_s[first] == pytest.approx(9)
    assert trace.block_ids(second).tolist() == [1, 2, 3, 50, 51]
    assert trace.output_tokens[second] == 1
    assert "1 requests recorded without output replay with one token" in trace.notes


def test_azure_has_times_to_the_tenth_of_a_microsecond_and_no_prefixes():
    trace = read_trace(DATA / "azure.csv")
    assert trace.arrival_s.tolist() == pytest.approx([0, 0.052])
    assert trace.prompt_tokens.tolist() == [4808, 31]
    assert trace.stats().hit_ratio == 0
    assert len(trace.keys(0)) == 300


@pytest.mark.parametrize("name", ["mooncake.jsonl", "bailian.jsonl", "agentic.jsonl", "azure.csv"])
def test_gzip_is_read_like_the_plain_file(name, tmp_path):
    packed = tmp_path / "any_name"
    packed.write_bytes(gzip.compress((DATA / name).read_bytes()))
    assert read_trace(packed).arrival_s.tolist() == read_trace(DATA / name).arrival_s.tolist()


def test_a_limit_ends_sessions_and_says_how_many_requests_it_took():
    trace = read_trace(DATA / "agentic.jsonl", max_prompt_tokens=210)
    assert sorted(trace.prompt_tokens.tolist()) == [150, 200]
    assert trace.notes[-1] == "1 requests left out by max_prompt_tokens=210"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "not JSON"),
        ("[1, 2]", "a JSON object expected, got list"),
        (MOONCAKE.replace('"input_length"', '"in_length"'), "field 'input_length' is missing"),
        (MOONCAKE.replace("600", '"600"'), "input_length must be an integer, got '600'"),
        (MOONCAKE.replace("600", "true"), "input_length must be an integer, got True"),
        (MOONCAKE.replace("600", "0"), "input_length must lie in 1..2**48-1, got 0"),
        (MOONCAKE.replace(": 5", ": -5"), "output_length must lie in 0..2**48-1, got -5"),
        (MOONCAKE.replace('p": 0', 'p": NaN'), "timestamp must lie in 0..2**48-1, got nan"),
        (MOONCAKE.replace('p": 0', 'p": 1e999'), "timestamp must lie in 0..2**48-1, got inf"),
        (MOONCAKE.replace("600", "1" + "0" * 400), "input_length must lie in 1..2**48-1, got 1000"),
        (MOONCAKE.replace("[0, 1]", f"[0, {2**48}]"), "hash_ids must be integers in 0..2**48-1"),
        (MOONCAKE.replace("[0, 1]", "[0]").replace("600", "1600"), "1600 tokens have 4 blocks of 512, got 1"),
        (MOONCAKE.replace("[0, 1]", "[0, 1, 2]"), "600 tokens have 2 blocks of 512, got 3"),
        (MOONCAKE.replace("[0, 1]", '[0, "1"]'), "hash_ids must be integers"),
        (MOONCAKE.replace("[0, 1]", "null"), "hash_ids must be a list, got None"),
    ],
)
def test_a_bad_mooncake_line_is_named(line, message, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(f"{MOONCAKE}\n\n{line}\n")
    with pytest.raises(TraceError, match=r"bad\.jsonl:3: ") as caught:
        read_trace(file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("first", "line", "message"),
    [
        (MOONCAKE.replace('p": 0', 'p": 9'), MOONCAKE, "timestamp goes back from 9 to 0"),
        (BAILIAN, BAILIAN, "chat_id 1 occurs twice"),
        (
            BAILIAN,
            BAILIAN.replace("-1", "1").replace('d": 1', 'd": 2', 1).replace(": 5", ": 4", 1),
            "before its",
        ),
        (MOONCAKE, MOONCAKE.replace("{", '{"session_id": "a", '), "leaves out what came before"),
        (MOONCAKE, "[" * 100_000, "not JSON: maximum recursion depth exceeded"),
        (AGENTIC, AGENTIC.replace('"t": 5', '"t": 4'), "t goes back within session a"),
        (AGENTIC, AGENTIC.replace('"a"', "7"), "sid must be a string, got 7"),
        (AGENTIC, AGENTIC.replace("[1, 1]", "[1]"), "rle must be a list of start, length pairs"),
        (AGENTIC, AGENTIC.replace("[1, 1]", "[1, 9]"), "100 tokens have 2 blocks of 64, rle has 9"),
        (AGENTIC, AGENTIC.replace("[1, 1]", "[]"), "100 tokens have 2 blocks of 64, rle has 0"),
        (AGENTIC, AGENTIC.replace("[1, 1]", "[-1, 1]"), "rle must hold integers in 0..2**47-1, got [-1, 1]"),
        (AGENTIC, AGENTIC.replace("[1, 1]", f"[{2**64}, 1]"), "rle must hold integers in 0..2**47-1"),
        (AGENTIC, AGENTIC.replace('"out": 10, ', ""), "field 'out' is missing"),
        (BAILIAN, BAILIAN.replace(": 1,", ": 0.5,", 1), "chat_id must be an integer, got 0.5"),
        (AZURE, "2023-11-16 18:17:03.97,12", "3 cells expected, got 2"),
        (AZURE, "yesterday,12,3", "TIMESTAMP must be a date and time, got 'yesterday'"),
        (AZURE, "2023-11-16 18:17:03.1e3,12,3", "TIMESTAMP must be a date and time"),
        (AZURE, "2023-11-16 18:17:03.97,0,3", "ContextTokens must be an integer in 1..2**48-1, got '0'"),
        (AZURE, "2023-11-16 18:17:03.97,12,x", "GeneratedTokens must be an integer in 0..2**48-1, got 'x'"),
        (AZURE, f"2023-11-16 18:17:03.97,{'9' * 5000},1", "ContextTokens must be an integer in 1..2**48-1"),
    ],
)
def test_a_line_at_odds_with_its_format_is_named(first, line, message, tmp_path):
    file = tmp_path / "bad"
    file.write_text(f"{first}\n{line}\n")
    with pytest.raises(TraceError, match="bad:2: ") as caught:
        read_trace(file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"hello\n", "bad:1: not a line of any known format"),
        (b"\xff\xfe", "neither text nor gzip"),
        (b"\x1f\x8bnonsense", "neither text nor gzip"),
        (gzip.compress(MOONCAKE.encode(), mtime=0)[:-9], "neither text nor gzip"),
        (gzip.compress(MOONCAKE.encode(), mtime=0)[:10] + b"\xff" * 40, "neither text nor gzip"),
        (AZURE.encode(), "the file has no requests"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(content, message, tmp_path):
    file = tmp_path / "bad"
    file.write_bytes(content)
    with pytest.raises(TraceError, match=message):
        read_trace(file)


def test_mooncake_rows_without_ids_and_with_blocks_of_another_size_are_read(tmp_path):
    file = tmp_path / "aiperf.jsonl"
    file.write_text(
        MOONCAKE.replace("[0, 1]", "[0, 1, 2]") + "\n" + MOONCAKE.replace(', "hash_ids": [0, 1]', "")
    )
    trace = read_trace(file, hash_block_tokens=256)
    assert trace.block_size == 256
    assert [len(trace.block_ids(i)) for i in range(2)] == [3, 0]
    assert "1 requests without hash_ids: their prompts are their own" in trace.notes
    with pytest.raises(InvalidArgument, match=r"hash_block_tokens must lie in 1\.\.16384, got 0"):
        read_trace(file, hash_block_tokens=0)


def test_bad_lines_are_left_out_and_told_when_there_is_a_list_for_them(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(f"{MOONCAKE}\nnonsense\n{MOONCAKE}\n[]\n")
    bad = ["earlier"]
    trace = read_trace(file, bad_lines=bad)
    assert len(trace) == 2
    assert [line[:12] for line in bad] == ["earlier", "bad.jsonl:2:", "bad.jsonl:4:"]
    assert trace.notes[-1] == "2 bad lines left out"


def test_a_bad_bailian_line_leaves_no_chat_to_follow(tmp_path):
    file = tmp_path / "bad"
    follow_up = BAILIAN.replace('d": 1', 'd": 2', 1).replace("-1", "1")
    file.write_text(f"{BAILIAN.replace('1, ', '7, ', 1)}\n{BAILIAN.replace('[1]', '[]')}\n{follow_up}\n")
    assert read_trace(file, bad_lines=[]).previous.tolist() == [-1, -1]


@pytest.mark.parametrize("spread_s", [-1.0, float("nan"), float("inf")])
def test_a_spread_that_is_no_time_is_refused(spread_s):
    with pytest.raises(InvalidArgument, match=f"spread_s must be finite and at least 0, got {spread_s}"):
        read_trace(DATA / "agentic.jsonl", spread_s=spread_s)


def test_an_unknown_format_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="unknown trace format 'csv', expected one of mooncake"):
        read_trace(DATA / "azure.csv", format="csv")
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "none")

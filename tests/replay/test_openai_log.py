"""Logs with text become traces without: what is kept, and that nothing else is."""

import gzip
import json
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched.errors import InvalidArgument, MissingExtra, TraceError
from mulsched.replay import load_tokenizer, read_openai_log, write_trace

SALT = bytes(range(32))
SYSTEM = {"role": "system", "content": "You are a helpful assistant with a long list of rules."}


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def line(at, *messages, answer="yes", prompt_tokens=None, **more):
    """A line of a chat's log, with a token per character."""
    body = {"model": "m", "messages": list(messages)}
    usage = {"prompt_tokens": prompt_tokens or 400, "completion_tokens": 7}
    response = {"choices": [{"message": said(answer)}], "usage": usage}
    return {"timestamp": at, "request": body, "response": response} | more


def plain(at, prompt, **more):
    usage = {"prompt_tokens": max(1, len(prompt)), "completion_tokens": 1}
    return {"timestamp": at, "prompt": prompt, "usage": usage} | more


def read(tmp_path, *lines, **options):
    file = tmp_path / "log.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_openai_log(file, **({"salt": SALT, "chars_per_token": 1.0, "block_size": 8} | options))


def ids(trace):
    return [trace.block_ids(i).tolist() for i in range(len(trace))]


def test_a_conversation_becomes_a_session_whose_prompts_extend_each_other(tmp_path):
    first = line(100.0, SYSTEM, user("Hello"), answer="Hi", endTime=103)
    then = line(110.0, SYSTEM, user("Hello"), said("Hi"), user("How are you?"))
    other = line(105.0, SYSTEM, user("Good morning"))
    trace = read(tmp_path, then, first, other)
    assert trace.arrival_s.tolist() == [0, 5, 10]
    assert trace.prompt_tokens.tolist() == [400] * 3
    assert trace.output_tokens.tolist() == [7] * 3
    assert trace.session.tolist() == [0, 1, 0]
    assert trace.previous.tolist() == [-1, -1, 0]
    assert trace.think_s.tolist() == [0, 0, 7]
    one, two, three = ids(trace)
    assert one == list(range(len(one)))
    assert three[: len(one)] == one
    assert two[: len(SYSTEM["content"]) // 8] == one[: len(SYSTEM["content"]) // 8]
    assert not set(two) & set(three[len(one) :])


def test_the_notes_say_what_was_decided_and_nothing_of_the_log(tmp_path):
    trace = read(tmp_path, line(1, user("Hello there")), plain(2, "x", status="failure"))
    assert trace.name == "openai log"
    assert trace.notes == (
        "block ids: numbers of chained keyed hashes of blocks of 8 characters (1 per token, given)",
        "sessions inferred from prompts that go on after an answer",
        "think time from the arrival of the request before",
        "96.0% of the blocks have no text in the log, and so no id",
        "1 requests that failed, were cached, or asked for no tokens left out",
    )


def test_the_characters_of_a_block_are_measured_on_the_log(tmp_path):
    lines = [plain(1, "x" * 300, usage={"prompt_tokens": 100, "completion_tokens": 1})]
    trace = read(tmp_path, *lines, chars_per_token=None, block_size=10)
    assert len(trace.block_ids(0)) == 10
    assert "30 characters (3 per token, measured)" in trace.notes[0]


def test_without_usage_lengths_are_estimated_at_four_characters_a_token(tmp_path):
    trace = read(tmp_path, {"ts": 1, "prompt": "x" * 33, "response": "y" * 9}, chars_per_token=None)
    assert trace.prompt_tokens.tolist() == [9]
    assert trace.output_tokens.tolist() == [3]
    assert "32 characters (4 per token, assumed)" in trace.notes[0]


def test_a_prompt_has_no_more_ids_than_whole_blocks_of_its_tokens(tmp_path):
    trace = read(tmp_path, plain(1, "x" * 100, usage={"prompt_tokens": 17, "completion_tokens": 1}))
    assert ids(trace) == [[0, 1]]


def test_gzip_is_read_like_the_plain_file(tmp_path):
    file = tmp_path / "log"
    file.write_bytes(gzip.compress(json.dumps(plain(1, "x" * 20)).encode()))
    assert len(read_openai_log(file, salt=SALT)) == 1


CHAT = {"model": "m", "messages": [user("Hello")]}
USED = {"usage": {"prompt_tokens": 20, "completion_tokens": 7}}


@pytest.mark.parametrize(
    "record",
    [
        {"timestamp": 1, **CHAT, **USED},
        {"timestamp": 1, "request": CHAT, "response": USED},
        {"timestamp": 1, "request": json.dumps(CHAT), "response": json.dumps(USED)},
        {
            "timestamp": 1,
            "request": {"method": "POST", "body": CHAT},
            "response": {"body": USED, "status_code": 200},
        },
        {"timestamp": 1, "body": CHAT, "response": {"status_code": 200, "body": USED}},
        {"timestamp": 1, "request_body": CHAT, "response_body": USED, "status": "200"},
        {"timestamp": 1, "proxy_server_request": {"body": CHAT}, "response": USED},
        {
            "startTime": 1.0,
            "endTime": 2.0,
            "status": "success",
            **CHAT,
            "prompt_tokens": 20,
            "completion_tokens": 7,
        },
        {"startTime": "1970-01-01T00:00:01+00:00", "request": CHAT, "response": {"created": 5, **USED}},
        {"request": CHAT, "response": {"created": 1, **USED}},
        {"timestamp": 1, "request": CHAT, "output": {"usage": {"input_tokens": 20, "output_tokens": 7}}},
    ],
)
def test_common_shapes_of_lines_are_understood(record, tmp_path):
    trace = read(tmp_path, record)
    assert trace.prompt_tokens.tolist() == [20]
    assert trace.output_tokens.tolist() == [7]
    assert len(trace.block_ids(0)) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (CHAT, {"model": "m", "input": "Hello"}),
        (CHAT, {"model": "m", "input": [user("Hello")]}),
        (CHAT, {"model": "m", "input": [user([{"type": "input_text", "text": "Hello"}])]}),
        (
            CHAT,
            {
                "model": "m",
                "messages": [user([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}])],
            },
        ),
        (
            {"input": "Hello", "instructions": "Be brief."},
            {"messages": [{"role": "system", "content": "Be brief."}, user("Hello")]},
        ),
        ({"prompt": "Hello Hello"}, {"prompt": ["Hello Hello"]}),
        ({"prompt": [1] * 16}, {"prompt": [[1] * 16]}),
    ],
)
def test_one_prompt_said_in_two_ways_has_the_same_ids(one, other, tmp_path):
    first, second = ids(read(tmp_path, {"ts": 1, **one, **USED}, {"ts": 2, **other, **USED}))
    assert first == second
    assert first


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (CHAT, CHAT | {"model": "n"}),
        (CHAT, CHAT | {"cache_salt": "tenant"}),
        (CHAT, CHAT | {"tools": [{"type": "function", "function": {"name": "look"}}]}),
        (CHAT, {"model": "m", "messages": [SYSTEM | {"content": "Hello"}]}),
        ({"prompt": [1] * 16}, {"prompt": [2] * 16}),
        ({"messages": [user([PICTURE])]}, {"messages": [user([PICTURE | {"image_url": {"url": "other"}}])]}),
        (
            {"messages": [said(None) | {"tool_calls": [CALL]}]},
            {"messages": [said(None) | {"tool_calls": [CALL | {"function": {"name": "see"}}]}]},
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "1", "output": "cat"}]},
            {"input": [{"type": "function_call_output", "call_id": "1", "output": "dog"}]},
        ),
    ],
)
def test_different_prompts_have_different_ids(one, other, tmp_path):
    used = {"usage": {"prompt_tokens": 100, "completion_tokens": 7}}
    first, second = ids(read(tmp_path, {"ts": 1, **one, **used}, {"ts": 2, **other, **used}))
    assert first
    assert second
    assert first != second


def test_ids_of_calls_are_not_part_of_a_prompt(tmp_path):
    lines = [line(t, user("Look"), said(None) | {"tool_calls": [CALL | {"id": f"call_{t}"}]}) for t in (1, 2)]
    first, second = ids(read(tmp_path, *lines))
    assert first == second


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (1_700_000_001, 1.0),
        (1_700_000_001.25, 1.25),
        (1_700_000_001_250, 1.25),
        (1_700_000_001_250_000, 1.25),
        (1_700_000_001_250_000_000, 1.25),
        ("1700000001.25", 1.25),
        ("2023-11-14T22:13:21.250Z", 1.25),
        ("2023-11-14 22:13:21.250", 1.25),
        ("2023-11-15T00:13:21.250+02:00", 1.25),
    ],
)
def test_times_are_read_in_the_units_they_are_written_in(value, seconds, tmp_path):
    trace = read(tmp_path, plain(1_700_000_000, "x"), plain(0, "x") | {"timestamp": value})
    assert trace.arrival_s.tolist() == [0, seconds]


def test_fields_for_time_and_session_can_be_named(tmp_path):
    lines = [
        plain(9, "x", clock={"t": t}, metadata={"session_id": s}) for t, s in ((0, "b"), (3, "a"), (7, "b"))
    ]
    trace = read(
        tmp_path,
        *lines,
        plain(9, "x", clock={"t": 8}),
        session_field="metadata.session_id",
        time_field="clock.t",
    )
    assert trace.arrival_s.tolist() == [0, 3, 7, 8]
    assert trace.session.tolist() == [0, 1, 0, -1]
    assert trace.previous.tolist() == [-1, -1, 0, -1]
    assert trace.think_s.tolist() == [0, 0, 7, 0]
    assert "sessions as logged" in trace.notes


def test_an_empty_session_is_none(tmp_path):
    lines = [plain(1, "x", user="a"), plain(2, "x", user=""), plain(3, "x", user=None)]
    assert read(tmp_path, *lines, session_field="user").session.tolist() == [0, -1, -1]


def test_of_two_equal_prompts_the_one_that_got_the_answer_is_followed(tmp_path):
    lines = [
        line(1, user("Hi"), answer="A"),
        line(2, user("Hi"), answer="B"),
        line(3, user("Hi"), answer="C"),
    ]
    trace = read(tmp_path, *lines, line(4, user("Hi"), said("B"), user("Go on")))
    assert trace.previous.tolist() == [-1, -1, -1, 1]


def test_the_longest_earlier_conversation_is_followed(tmp_path):
    turns = [user("Hi"), said("A"), user("Go on"), said("B"), user("And?")]
    trace = read(tmp_path, *(line(n, *turns[:n]) for n in (1, 3, 5)))
    assert trace.previous.tolist() == [-1, 0, 1]
    assert trace.session.tolist() == [0, 0, 0]


def test_an_answer_that_was_edited_is_still_followed(tmp_path):
    trace = read(
        tmp_path, line(1, user("Hi"), answer="<think>A</think>B"), line(2, user("Hi"), said("B"), user("?"))
    )
    assert trace.previous.tolist() == [-1, 0]


def test_steps_of_an_agent_follow_each_other(tmp_path):
    call = {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "1", "output": "nothing"}
    used = {"usage": {"input_tokens": 50, "output_tokens": 5}, "output": [call]}
    steps = [{"ts": 1, "input": [user("Look")], "response": used}]
    steps.append(
        {"ts": 2, "input": [user("Look"), {"type": "reasoning", "id": "r"}, call, result], "response": used}
    )
    assert read(tmp_path, *steps).previous.tolist() == [-1, 0]


def test_prompts_that_the_server_completes_have_no_ids(tmp_path):
    body = {"input": "And then?", "previous_response_id": "resp_1"}
    trace = read(
        tmp_path, {"ts": 1, "body": body, "response": {"usage": {"input_tokens": 90, "output_tokens": 5}}}
    )
    assert ids(trace) == [[]]
    assert any("1 requests go on with what the server kept" in note for note in trace.notes)


@pytest.mark.parametrize(
    "more",
    [
        {"status": "failure"},
        {"status": 429},
        {"status_code": "500"},
        {"error": {"message": "no"}},
        {"response": {"status_code": 503, "body": {}}},
        {"cache_hit": True},
        {"call_type": "aembedding"},
        {"url": "/v1/embeddings"},
    ],
)
def test_what_no_engine_answered_with_tokens_is_left_out(more, tmp_path):
    assert len(read(tmp_path, plain(1, "x"), plain(2, "y", **more))) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "a JSON object expected, got list"),
        ({"ts": 1}, "no messages, prompt or input, neither in the line nor in request"),
        ({"ts": 1, "messages": [3], **USED}, "a message must be an object, got int"),
        ({"ts": 1, "prompt": ["a", "b"], **USED}, "a prompt must be one text"),
        ({"ts": 1, "prompt": [-1], **USED}, "a prompt must be one text"),
        ({"prompt": "x", **USED}, "no time of arrival: none of startTime, start_time"),
        (
            {"ts": "soon", "prompt": "x", **USED},
            "ts must be a time, a number since 1970 or ISO 8601, got 'soon'",
        ),
        ({"ts": True, "prompt": "x", **USED}, "ts must be a time"),
        ({"ts": 1e300, "prompt": "x", **USED}, "ts must be a time"),
        ({"ts": 1, "prompt": "x"}, "neither a usage nor an answer tells the output tokens"),
        ({"ts": 1, "prompt": "x", "usage": {"prompt_tokens": 0}}, "prompt_tokens must lie in 1.."),
        ({"ts": 1, "prompt": "x", "usage": {"prompt_tokens": "many"}}, "prompt_tokens must be an integer"),
        ({"ts": 1, "messages": [user("redacted-by-litellm")], **USED}, "the log does not hold it"),
    ],
)
def test_a_bad_line_is_named_or_left_out(record, message, tmp_path):
    lines = plain(1, "x"), record, plain(2, "y")
    with pytest.raises(TraceError, match=re.escape(message)) as caught:
        read(tmp_path, *lines)
    assert str(caught.value).startswith("log.jsonl:2: ")
    bad = []
    assert len(read(tmp_path, *lines, bad_lines=bad)) == 2
    assert bad == [str(caught.value)]


def test_no_message_quotes_the_text(tmp_path):
    bad = []
    lines = [
        plain(1, "x"),
        {"ts": 1, "prompt": {"SECRET": 1}},
        {"ts": 1, "prompt": ["SECRET", "SECRET"], **USED},
    ]
    lines += [
        {"ts": 1, "messages": ["SECRET"], **USED},
        {"ts": 1, "prompt": "SECRET"},
        {"prompt": "SECRET", **USED},
    ]
    read(tmp_path, *lines, bad_lines=bad)
    assert len(bad) == 5
    assert "SECRET" not in "".join(bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"salt": b"short"}, "salt must be 16 to 64 bytes"),
        ({"salt": "x" * 32}, "salt must be 16 to 64 bytes"),
        ({"block_size": 0}, "block_size must lie in 1..16384, got 0"),
        ({"chars_per_token": float("inf")}, "chars_per_token must be finite and above 0, got inf"),
        ({"session_field": "user"}, "no line has a session at user"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, tmp_path):
    with pytest.raises((InvalidArgument, TraceError), match=re.escape(message)):
        read(tmp_path, plain(1, "x"), **options)


def test_a_log_without_a_request_is_refused(tmp_path):
    with pytest.raises(TraceError, match=r"log\.jsonl: the file has no requests"):
        read(tmp_path, plain(1, "x", status="failure"))


def test_gzip_that_was_cut_short_is_refused(tmp_path):
    (tmp_path / "log").write_bytes(gzip.compress(json.dumps(plain(1, "x")).encode())[:-9])
    with pytest.raises(TraceError, match="log: not gzip to its end"):
        read_openai_log(tmp_path / "log", salt=SALT)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A tokenizer whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    words.save(str(file))
    return str(file)


def test_a_tokenizer_cuts_blocks_of_tokens_and_counts_where_no_usage_does(tokenizer_file, tmp_path):
    lines = [
        {"ts": t, "prompt": prompt, "response": "a b a"} for t, prompt in enumerate(("a  b a b", "a b a a b"))
    ]
    lines.append({"ts": 2, "prompt": [0, 1, 0, 1], "response": "b"})
    trace = read(
        tmp_path, *lines, tokenizer=load_tokenizer(tokenizer_file), chars_per_token=None, block_size=2
    )
    assert trace.prompt_tokens.tolist() == [4, 5, 4]
    assert trace.output_tokens.tolist() == [3, 3, 1]
    assert ids(trace) == [[0, 1], [0, 2], [0, 1]]
    assert "blocks of 2 tokens of the given tokenizer" in trace.notes[0]


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"no tokenizer in or under '.*t\.json'"):
        load_tokenizer(str(tmp_path / "t.json"))


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'mulsched\[tokenizer\]'"):
        load_tokenizer("any")


# What leaves: properties. A trace is a function of lengths, times and which prompts begin alike.

WORDS = st.text(alphabet="QXZJK", min_size=1, max_size=12)


@st.composite
def logs(draw):
    """Lines of conversations that share beginnings, over an alphabet that no trace file uses."""
    lines = []
    for t in range(draw(st.integers(1, 5))):
        texts = draw(st.lists(WORDS, min_size=1, max_size=4))
        messages = [said(text) if i % 2 else user(text) for i, text in enumerate(texts)]
        tokens = draw(st.integers(1, 60))
        lines.append(line(t, *messages, answer=draw(WORDS), prompt_tokens=tokens, user=draw(WORDS)))
    return lines


def file_of(directory, lines, **options):
    write_trace(read(directory, *lines, **options), directory / "out")
    return (directory / "out").read_text()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("property")


@settings(max_examples=50)
@given(logs(), st.permutations("QXZJK"), st.sampled_from([None, "user"]))
def test_other_text_with_the_same_lengths_and_equalities_gives_the_same_file(
    directory, lines, letters, field
):
    renamed = json.loads(json.dumps(lines).translate(str.maketrans("QXZJK", "".join(letters))))
    for options in ({}, {"chars_per_token": None}):
        one = file_of(directory, lines, session_field=field, **options)
        assert one == file_of(directory, renamed, session_field=field, **options)


@settings(max_examples=50)
@given(logs(), st.sampled_from([None, "user"]))
def test_nothing_of_the_text_is_in_the_file(directory, lines, field):
    assert not set("QXZJK") & set(file_of(directory, lines, session_field=field))


@settings(max_examples=50)
@given(logs(), st.binary(min_size=16, max_size=64))
def test_the_salt_leaves_no_trace(directory, lines, salt):
    assert file_of(directory, lines) == file_of(directory, lines, salt=salt)


@settings(max_examples=50)
@given(st.lists(st.text(alphabet="ab", max_size=12), min_size=1, max_size=5), st.integers(1, 3))
def test_ids_are_equal_exactly_where_prompts_begin_alike(directory, texts, block_size):
    found = ids(read(directory, *(plain(t, text) for t, text in enumerate(texts)), block_size=block_size))
    meaning = {}
    for text, blocks in zip(texts, found, strict=True):
        assert len(blocks) == len(text) // block_size
        for i, block in enumerate(blocks, 1):
            assert meaning.setdefault(block, text[: i * block_size]) == text[: i * block_size]
    assert len(set(meaning.values())) == len(meaning)
    assert list(meaning) == list(range(len(meaning)))  # numbered as they first arrive


@settings(max_examples=50)
@given(logs())
def test_the_order_of_lines_does_not_matter(directory, lines):
    one, other = read(directory, *lines), read(directory, *reversed(lines))
    assert ids(one) == ids(other)
    assert one.notes == other.notes
    assert one.previous.tolist() == other.previous.tolist()

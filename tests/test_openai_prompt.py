"""What requests are routed by: equal beginnings stay equal, and nothing of a prompt is quoted."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulsched.block_keys import text_block_keys
from mulsched.errors import InvalidArgument, InvalidType
from mulsched.openai_prompt import parse_prompt


def chat(*messages, **more):
    return {
        "model": "m",
        "messages": [{"role": role, "content": content} for role, content in messages],
    } | more


def image(url, **more):
    return {"type": "image_url", "image_url": {"url": url} | more}


def test_a_chat_is_its_tools_then_its_messages():
    body = chat(("system", "Be brief."), ("user", "Hi"), tools=[{"type": "function"}], stream=True)
    prompt = parse_prompt(body)
    assert prompt.text == '<tools>\n[{"type":"function"}]\n<system>\nBe brief.\n<user>\nHi\n'
    assert (prompt.token_ids, prompt.model, prompt.stream, prompt.continued) == (None, "m", True, False)


@pytest.mark.parametrize(
    ("body", "text", "token_ids"),
    [
        ({"prompt": "once"}, "once", None),
        ({"prompt": ["once", "twice"]}, "once\ntwice", None),
        ({"prompt": [1, 2, 2**32 - 1]}, None, [1, 2, 2**32 - 1]),
        ({"prompt": [[1, 2], [3]]}, None, [1, 2, 3]),
        ({"input": ["to embed", "this too"]}, "to embed\nthis too", None),
        ({"input": [[7, 8]]}, None, [7, 8]),
        ({"input": "say"}, "<user>\nsay\n", None),
        ({"input": "say", "instructions": "Rhyme."}, "<system>\nRhyme.\n<user>\nsay\n", None),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]},
            "<user>\na\n",
            None,
        ),
        (
            {"input": [{"type": "function_call", "id": "1", "call_id": "2", "name": "f", "arguments": "{}"}]},
            '<assistant>\n{"type":"function_call","name":"f","arguments":"{}"}\n',
            None,
        ),
        ({"input": [{"type": "function_call_output", "call_id": "2", "output": "4"}]}, "<tool>\n4\n", None),
    ],
)
def test_every_kind_of_request_has_its_prompt(body, text, token_ids):
    prompt = parse_prompt(body)
    assert (prompt.text, prompt.token_ids) == (text, token_ids)


def test_a_request_that_the_server_continues_says_so():
    assert parse_prompt({"input": "more", "previous_response_id": "resp_1"}).continued


def test_ids_of_tool_calls_do_not_count():
    def turn(name):
        call = {"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}}
        return {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}

    assert parse_prompt(turn("call_1")) == parse_prompt(turn("call_2"))


def test_an_image_counts_by_what_it_is():
    def asked(*parts):
        return parse_prompt(chat(("user", [*parts, {"type": "text", "text": "What is it?"}]))).text

    cat, dog = asked(image("data:image/png;base64,AAAA")), asked(image("data:image/png;base64,AAAB"))
    assert cat == asked(image("data:image/png;base64,AAAA")) != dog
    assert "AAAA" not in cat
    assert len(cat) == len(dog)


def test_the_salt_is_kept_for_the_keys():
    assert parse_prompt(chat(("user", "a"), cache_salt="s")).cache_salt == "s"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": None},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"messages": []},
        {"messages": ["sesame"]},
        {"messages": "sesame"},
        {"prompt": {"sesame": 1}},
        {"prompt": ["sesame", 1]},
        {"prompt": [1, -1]},
        {"prompt": [2**32]},
        {"prompt": [1.0]},
        {"prompt": [True]},
        {"prompt": [[1], "sesame"]},
    ],
    ids=json.dumps,
)
def test_what_is_no_prompt_is_refused_without_quoting_it(body):
    with pytest.raises(InvalidArgument) as refused:
        parse_prompt(body)
    assert "sesame" not in str(refused.value)


def test_a_body_must_be_an_object():
    with pytest.raises(InvalidType, match="JSON object, got list"):
        parse_prompt([])


def test_a_body_nested_too_deeply_is_refused():
    part = leaf = {}
    for _ in range(100_000):
        leaf["x"] = {}
        leaf = leaf["x"]
    with pytest.raises(InvalidArgument, match="nested too deeply"):
        parse_prompt(chat(("user", [part])))


def test_lone_surrogates_are_replaced():
    prompt = parse_prompt({"model": "\udc00", "prompt": "a\ud800b😀"})
    assert (prompt.text, prompt.model) == ("a\ufffdb😀", "\ufffd")
    text_block_keys(prompt.text, 1)


def test_its_repr_tells_nothing_that_was_said():
    prompts = [
        parse_prompt(body | {"cache_salt": "sesame"}) for body in ({"prompt": "sesame"}, {"prompt": [4711]})
    ]
    assert "sesame" not in repr(prompts)
    assert "4711" not in repr(prompts)


# what JSON may hold, lone surrogates included
TEXT = st.text(st.characters(), max_size=5)
CONTENT = TEXT | st.lists(
    st.builds(lambda text: {"type": "text", "text": text}, TEXT) | st.builds(image, TEXT), max_size=3
)
MESSAGES = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), CONTENT), min_size=1, max_size=3
)


@given(MESSAGES, MESSAGES)
def test_a_later_turn_begins_with_the_earlier_one(earlier, more):
    tools = [{"name": "f"}]
    first, then = (parse_prompt(chat(*turns, tools=tools)).text for turns in (earlier, earlier + more))
    assert then.startswith(first)
    assert len(then) > len(first)


JSON = st.sampled_from(
    [None, True, 0, -1, 2**32, 0.5, "a", "\ud800", [], [1], [[1]], ["a"], [None], {}, {"text": 1}]
)
FIELDS = ["messages", "prompt", "input", "instructions", "tools", "model", "cache_salt", "stream"]
KEYS = ["role", "content", "type", "output", "tool_calls", "function_call"]


@given(
    st.dictionaries(
        st.sampled_from(FIELDS), JSON | st.lists(st.dictionaries(st.sampled_from(KEYS), JSON), max_size=2)
    )
)
def test_any_object_has_a_prompt_or_is_refused(body):
    try:
        prompt = parse_prompt(body)
    except InvalidArgument:
        return
    assert (prompt.text is None) != (prompt.token_ids is None)
    assert prompt.text or prompt.token_ids
    if prompt.text is not None:
        text_block_keys(prompt.text, 4)

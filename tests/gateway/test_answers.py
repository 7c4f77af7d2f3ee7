"""What passing bytes tell: the first token, and usage."""

import pytest

from mulsched.gateway.answers import AnswerWatch

CHAT = b': ping\n\ndata: {"choices":[]}\n\ndata: [DONE]\n\n'
RESPONSES = b'data: {"type":"response.created"}\n\ndata: {"type":"response.output_text.delta"}\n\n'


@pytest.mark.parametrize(("answer", "responses", "at"), [(CHAT, False, 13), (RESPONSES, True, 77)])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_the_first_token_is_seen_once_wherever_the_pieces_are_cut(answer, responses, at, size):
    watch = AnswerWatch(streamed=True, responses=responses)
    pieces = [answer[i : i + size] for i in range(0, len(answer), size)]
    seen = [i for i, piece in enumerate(pieces) if watch.feed(piece)]
    assert seen == [(at - 1) // size]
    assert answer[:at].endswith(b'.delta"' if responses else b"data:")


def test_a_comment_is_no_token():
    assert not AnswerWatch(streamed=True, responses=False).feed(b": ping\n\n")


def test_an_answer_that_is_not_streamed_tells_of_no_token():
    assert not AnswerWatch(streamed=False, responses=False).feed(b'{"data:": 1}')


@pytest.mark.parametrize(
    ("answer", "usage"),
    [
        (b'{"usage": {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}}}', (7, 3)),
        (b'{"usage":{"input_tokens":7,"input_tokens_details":{"cached_tokens":3}}}', (7, 3)),
        (b'{"usage":{"prompt_tokens":7,"prompt_tokens_details":null}}', None),
        (rb'{"text":"\"prompt_tokens\":9, \"cached_tokens\":9"}', None),
        (b'{"prompt_tokens":' + b"9" * 100 + b',"cached_tokens":1}', None),
        (b"", None),
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_usage_is_the_engines_and_no_text_that_looks_like_it(answer, usage, size):
    watch = AnswerWatch(streamed=False, responses=False)
    for i in range(0, len(answer), size):
        watch.feed(answer[i : i + size])
    assert watch.usage() == usage


def test_no_more_than_a_tail_is_kept():
    watch = AnswerWatch(streamed=True, responses=True)
    for _ in range(100):
        watch.feed(b"x" * 1000)
    assert len(watch._tail) <= 2048

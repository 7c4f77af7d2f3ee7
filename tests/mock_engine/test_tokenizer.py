"""Text to tokens and back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulsched.errors import InvalidArgument
from mulsched.mock_engine.tokenizer import ROLES, ByteTokenizer, FileTokenizer, made_answer

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
messages = st.lists(st.tuples(st.sampled_from(ROLES), texts), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A byte-level BPE of few merges, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" the ace and all day of any cat and dog and box" * 20], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(params=["byte", "file"])
def tokenizer(request, path):
    return ByteTokenizer() if request.param == "byte" else FileTokenizer(path)


def test_a_token_is_four_bytes():
    assert ByteTokenizer().encode("abcdef").tolist() == [0x64636261, 0xFFFF6665]


def test_a_chat_is_roles_texts_and_ends():
    opened, closed, answer = (int.from_bytes(b"\xff" + name, "little") for name in (b"use", b"eom", b"ass"))
    assert ByteTokenizer().chat([("user", "abcd")]).tolist() == [opened, 0x64636261, closed, answer]


def test_what_stands_for_no_text_decodes_to_none():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.chat([("user", "hello"), ("assistant", "you")])) == "helloyou"


def test_broken_utf8_is_replaced():
    assert ByteTokenizer().decode(np.array([0xFFFFFFC3])) == "�"
    assert ByteTokenizer().decode(np.array([0x616161C3])) == "�aaa"


def test_answers_of_a_file_are_of_words_that_come_back(path):
    tokenizer = FileTokenizer(path)
    words = {tokenizer.decode(np.array([token])) for token in tokenizer.vocabulary}
    assert words >= {" ace", " cat", " dog"}
    for token in tokenizer.vocabulary.tolist():
        assert tokenizer.encode(tokenizer.decode(np.array([token] * 3))).tolist() == [token] * 3


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"x\.json is not a tokenizer's file"):
        FileTokenizer(tmp_path / "x.json")


def test_the_same_prompt_has_the_same_answer_and_another_another(tokenizer):
    words = tokenizer.vocabulary
    one, other = tokenizer.encode("one"), tokenizer.encode("other")
    assert made_answer(one, 20, words).tolist() == made_answer(one, 20, words).tolist()
    assert made_answer(one, 20, words).tolist() != made_answer(other, 20, words).tolist()
    assert made_answer(one, 20, words)[:5].tolist() == made_answer(one, 5, words).tolist()


def test_an_answer_comes_back_token_by_token(tokenizer):
    answer = made_answer(tokenizer.encode("prompt"), 50, tokenizer.vocabulary)
    text = "".join(tokenizer.pieces(answer))
    assert text == tokenizer.decode(answer)
    assert tokenizer.encode(text).tolist() == answer.tolist()


@given(texts)
def test_a_text_comes_back(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=40)
@given(messages, texts)
def test_a_turn_and_its_answer_are_a_prefix_of_the_next_turn(path, turn, text):
    for tokenizer in (ByteTokenizer(), FileTokenizer(path)):
        prompt = tokenizer.chat(turn)
        answer = made_answer(prompt, 5, tokenizer.vocabulary)
        reply = "".join(tokenizer.pieces(answer))
        following = tokenizer.chat([*turn, ("assistant", reply), ("user", text)])
        expected = [*prompt.tolist(), *answer.tolist()]
        assert following[: len(expected)].tolist() == expected

"""What a prompt is routed by: text, token ids, or what a tokenizer and a chat template make of it."""

import asyncio
import json

import pytest
from made_tokenizer import MadeTokenizer

from mulsched.block_keys import block_keys
from mulsched.chat_template import ChatTemplate, load_chat_template
from mulsched.errors import InvalidArgument
from mulsched.gateway import PromptReader, load_tokenizer
from mulsched.lifecycle import Lifecycle
from mulsched.router import Router
from mulsched.types import Namespace

TEMPLATE = (
    "{% for m in messages %}\n"
    "    {%- if m.role == 'bad' %}{{ raise_exception('no') }}{% endif %}\n"
    "[{{ m.role }}]{{ m.content }}\n"
    "{% endfor %}\n"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "a<b"}]}


def letters(text, *, whole):
    """A tokenizer: a token a letter, and one before a whole prompt."""
    return [0] * whole + [ord(letter) for letter in text]


LETTERS = MadeTokenizer(letters)


class Instance:
    """A router over one instance that remembers all, and decisions on bodies."""

    def __init__(self, reader):
        self.reader = reader
        self.lifecycle = Lifecycle(Router(block_size=reader.router_block_size))
        self.lifecycle.router.add_instance("a", cache_blocks=10_000)
        self.n = 0

    def send(self, body):
        """Return prompt and hit, and end the request."""
        self.n += 1
        keys, length = asyncio.run(self.reader.read(body))
        decision = self.lifecycle.route_keys(keys, prompt_tokens=length, request_id=self.n, now=float(self.n))
        self.lifecycle.finish(self.n, now=float(self.n))
        return decision.columns.request.prompt_tokens, decision.hit_tokens


def test_without_a_tokenizer_a_block_is_its_tokens_in_characters():
    instance = Instance(PromptReader(16))
    ask = {"prompt": "x" * 200}
    assert [instance.send(ask), instance.send(ask)] == [(200, 0), (200, 192)]


def test_token_ids_count_in_the_same_unit():
    instance = Instance(PromptReader(16))
    ask = {"prompt": list(range(50))}
    assert [instance.send(ask), instance.send(ask)] == [(200, 0), (200, 192)]


def test_with_a_tokenizer_everything_is_tokens():
    instance = Instance(PromptReader(4, LETTERS))
    assert instance.send({"prompt": "abcdefgh"}) == (9, 0)
    assert instance.send({"prompt": [0, *b"abcdefgh"]}) == (9, 8)


def test_a_long_text_is_tokenized_alike():
    instance = Instance(PromptReader(4, LETTERS))
    text = "abcdefgh" * 1000
    assert instance.send({"prompt": text}) == (8001, 0)
    assert instance.send({"prompt": letters(text, whole=True)}) == (8001, 8000)


def test_texts_go_by_the_call_that_lets_other_threads_run():
    """``encode`` of the package keeps the interpreter's lock, whatever thread it is called in."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE({"<s>": 0, "Ġ": 32, "a": 97, "b": 98}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    called = []

    class Watched:
        def __getattr__(self, name):
            called.append(name)
            return getattr(tokenizer, name)

    for text in ("a b", "a b" * 2000):
        keys, length = asyncio.run(PromptReader(4, Watched()).read({"prompt": text}))
        assert length == 1 + len(text)
        assert keys.tolist() == block_keys(letters(text, whole=True), 4).tolist()
    assert called == ["encode_batch_fast"] * 2


def test_a_chat_is_what_the_template_makes_of_it():
    instance = Instance(PromptReader(4, LETTERS, ChatTemplate(TEMPLATE)))
    text = "[user]a<b\n[assistant]"
    assert instance.send({"prompt": letters(text, whole=False)}) == (len(text), 0)
    assert instance.send(CHAT) == (len(text), len(text) // 4 * 4)


def test_lone_surrogates_in_a_chat_are_replaced():
    """No tokenizer takes them."""
    reader = PromptReader(4, LETTERS, ChatTemplate(TEMPLATE))
    first, second = (
        asyncio.run(reader.read({"messages": [{"role": "user", "content": content}]})).keys.tolist()
        for content in ("a\ud800b", "a\ufffdb")
    )
    assert first == second


def test_an_adapter_shares_no_cache_with_its_model():
    reader = PromptReader(4, LETTERS)
    first, second, third = (
        asyncio.run(reader.read({"model": "m", "prompt": "abcd"}, adapter=adapter)).keys
        for adapter in (False, True, False)
    )
    assert first.tolist() == third.tolist() != second.tolist()
    assert (
        second.tolist() == block_keys(letters("abcd", whole=True), 4, namespace=Namespace(lora="m")).tolist()
    )


@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_models_directory_has_its_template_and_special_tokens(tmp_path, in_a_file):
    template = (
        "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ strftime_now('%d') }}{{ pad_token }}"
    )
    described = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    if in_a_file:
        (tmp_path / "chat_template.jinja").write_text(template)
    else:
        described["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    loaded = load_chat_template(tmp_path, None, lambda form: f"[{form}]")
    assert loaded(CHAT) == "<s>a<b</s>[%d]"
    (tmp_path / "other").write_text("{{ eos_token }}")
    assert load_chat_template(tmp_path, tmp_path / "other", str)(CHAT) == "</s>"


def test_a_directory_without_a_template_has_none(tmp_path):
    assert load_chat_template(tmp_path, None, str) is None
    (tmp_path / "tokenizer_config.json").write_text("[7]")
    with pytest.raises(InvalidArgument, match="tokenizer_config.json is not a JSON object"):
        load_chat_template(tmp_path, None, str)


@pytest.mark.parametrize("loop", ["m.content", "m['content']", 'm["content"]'])
def test_a_template_that_loops_over_parts_is_given_parts(loop):
    template = ChatTemplate(
        f"{{% for m in messages %}}{{% for p in {loop} %}}<{{{{ p.text }}}}>{{% endfor %}}{{% endfor %}}"
    )
    for content, text in (("ab", "<ab>"), ([{"text": "a"}, {"text": "b"}], "<a><b>")):
        assert template({"messages": [{"role": "user", "content": content}]}) == text


def test_a_template_without_such_a_loop_is_given_text():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    for content, text in (("a", "a"), ([{"text": "a"}, {"text": "b"}], "a\nb"), (None, "None"), ([7], "[7]")):
        assert template({"messages": [{"role": "user", "content": content}]}) == text


def test_tools_and_arguments_reach_the_template():
    template = ChatTemplate(TEMPLATE + "{{ mood }}")
    body = {**CHAT, "tools": [{"a": "<é>"}], "chat_template_kwargs": {"mood": "!"}}
    assert template(body) == '[user]a<b\n[{"a": "<é>"}][assistant]!'


@pytest.mark.parametrize("role", ["bad", None])
def test_a_chat_that_the_template_refuses_is_routed_by_load(role):
    template = TEMPLATE if role else "{{ 1 / 0 }}"
    instance = Instance(PromptReader(4, LETTERS, ChatTemplate(template)))
    assert instance.send({"messages": [{"role": role or "user", "content": "secret"}]}) == (1, 0)


@pytest.mark.parametrize("source", ["{% if %}", "{{ unclosed"])
def test_what_is_no_template_is_refused(source):
    with pytest.raises(InvalidArgument, match="not a chat template"):
        ChatTemplate(source)


def test_a_template_cannot_leave_its_sandbox():
    with pytest.raises(InvalidArgument, match="SecurityError"):
        ChatTemplate("{{ ''.__class__.__mro__ }}")({})


@pytest.mark.parametrize("other", [{"cache_salt": "s"}, {"model": "n"}])
def test_prompts_that_share_no_cache_are_apart(other):
    instance = Instance(PromptReader(16))
    ask = {"prompt": "x" * 65, "model": "m"}
    assert [instance.send(ask)[1], instance.send({**ask, **other})[1], instance.send(ask)[1]] == [0, 0, 64]


@pytest.mark.parametrize("body", [{}, {"prompt": ""}, {"prompt": 7}, {"messages": [7]}, {"input": [[-1]]}])
def test_a_prompt_that_cannot_be_read_counts_as_one(body):
    assert Instance(PromptReader(16)).send(body) == (1, 0)


def test_where_a_block_is_a_token_too():
    instance = Instance(PromptReader(1, LETTERS))
    assert [instance.send({}), instance.send({})] == [(1, 0), (1, 0)]


def test_a_tokenizer_is_a_file_or_lies_in_a_directory(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"a": 5, "b": 6, "?": 7}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path / "tokenizer.json", tmp_path):
        assert load_tokenizer(str(path)).encode("b a c").ids == [6, 5, 7]


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"no tokenizer in or under '.*no\.json'"):
        load_tokenizer(str(tmp_path / "no.json"))

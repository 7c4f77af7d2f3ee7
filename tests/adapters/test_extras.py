"""Without its framework an adapter's import names the extra; and the shared reading of calls."""

import importlib
import sys
from types import SimpleNamespace

import pytest

from mulsched.adapters._bodies import BodyRouter, as_body
from mulsched.errors import InvalidArgument, MissingExtra


@pytest.mark.parametrize(
    ("module", "framework", "extra"),
    [("ray_serve", "ray", "ray"), ("litellm", "litellm", "litellm")],
)
def test_without_its_framework_an_adapter_names_the_extra(monkeypatch, module, framework, extra):
    monkeypatch.setitem(sys.modules, framework, None)
    monkeypatch.delitem(sys.modules, f"mulsched.adapters.{module}", raising=False)
    with pytest.raises(MissingExtra, match=rf"mulsched\[{extra}\]"):
        importlib.import_module(f"mulsched.adapters.{module}")


class Message:
    def model_dump(self, exclude_none):
        return {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("value", "body"),
    [
        ("hello", {"prompt": "hello"}),
        ({"prompt": "hello", "n": 1}, {"prompt": "hello", "n": 1}),
        ({"n": 1}, None),
        (SimpleNamespace(prompt=[1, 2]), {"prompt": [1, 2]}),
        (
            SimpleNamespace(messages=[Message()], model="m"),
            {"messages": [Message().model_dump(True)], "model": "m"},
        ),
        (7, None),
        (None, None),
    ],
)
def test_what_a_body_is_among_the_arguments_of_a_call(value, body):
    assert as_body(value) == body


@pytest.mark.parametrize("options", [{"cache_tokens": 15}, {"block_size": 0}, {"prefill_tokens_per_s": -1}])
def test_options_are_checked_before_any_instance_is_there(options):
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        BodyRouter(**options)


def test_a_pick_books_nothing_and_says_nothing_of_what_waits_there():
    bodies = BodyRouter(prefill_tokens_per_s=100.0)
    bodies.set_instances(["a"])
    bodies.reserve({"prompt": "x" * 4000}, request_id=1, now=0.0)
    router = bodies.lifecycle.router
    before = router.load("a")
    assert bodies.pick_keys(bodies.read({"prompt": "y" * 4000}), now=1.0, candidates=["a"]) == "a"
    assert {**router.load("a"), "last_chosen": before["last_chosen"]} == before


def test_a_pick_counts_as_cached_where_it_was_made():
    bodies = BodyRouter()
    bodies.set_instances(["a", "b"])
    prompt = bodies.read({"prompt": "x" * 4000})
    picked = {bodies.pick_keys(prompt, now=0.0, candidates=["a", "b"]) for _ in range(5)}
    assert len(picked) == 1

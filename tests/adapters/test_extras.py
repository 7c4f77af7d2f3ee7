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

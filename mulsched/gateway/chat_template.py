"""The chat template of a model, as engines apply it: from a chat request to the text that the model sees."""

import json
from collections.abc import Mapping
from typing import Any

from mulsched.errors import InvalidArgument, MissingExtra

try:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError as error:
    raise MissingExtra("chat templates need jinja2: pip install 'mulsched[gateway]'") from error

__all__ = ["ChatTemplate"]


class ChatTemplate:
    """A template in Jinja with the functions that Hugging Face's ``transformers`` offers to one.

    Raises InvalidArgument (not a template).
    """

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InvalidArgument(f"not a chat template: {error}") from None

    def __call__(self, body: Mapping[str, Any]) -> str:
        """Return the text of a chat request. Raises InvalidArgument (the template refuses it)."""
        extra = body.get("chat_template_kwargs")
        try:
            return self._template.render(
                messages=body.get("messages"),
                tools=body.get("tools"),
                add_generation_prompt=body.get("add_generation_prompt", True),
                **(extra if isinstance(extra, dict) else {}),
            )
        except Exception as error:  # a template may fail on any message in any way
            raise InvalidArgument(f"the chat template fails: {type(error).__name__}") from None


def _to_json(value: Any, indent: int | None = None) -> str:
    # as transformers does, and unlike Jinja: nothing is escaped for HTML
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateError(message)

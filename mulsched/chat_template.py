"""The chat template of a model, as engines apply it: from a chat request to the text that the model sees."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mulsched.errors import InvalidArgument, MissingExtra

try:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError as error:
    raise MissingExtra("chat templates need jinja2: pip install 'mulsched[tokenizer]'") from error

__all__ = ["ChatTemplate", "load_chat_template"]

# A template with such a loop is given contents as lists of parts, any other as text: so does vLLM.
_LOOP_OVER_PARTS = re.compile(r"\bfor\s+\w+\s+in\s+(?:content\b|\w+(?:\.content\b|\[['\"]content['\"]\]))")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """A template in Jinja with the functions that Hugging Face's ``transformers`` offers to one.

    ``names``: further ones that the template may use. Raises InvalidArgument (not a template).
    """

    def __init__(self, source: str, **names: Any) -> None:
        self._in_parts = _LOOP_OVER_PARTS.search(source) is not None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, **names}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InvalidArgument(f"not a chat template: {error}") from None

    def __call__(self, body: Mapping[str, Any]) -> str:
        """Return the text of a chat request. Raises InvalidArgument (the template refuses it)."""
        extra = body.get("chat_template_kwargs")
        try:
            return self._template.render(
                messages=_contents(body.get("messages"), in_parts=self._in_parts),
                tools=body.get("tools"),
                add_generation_prompt=body.get("add_generation_prompt", True),
                **(extra if isinstance(extra, dict) else {}),
            )
        except Exception as error:  # a template may fail on any message in any way
            raise InvalidArgument(f"the chat template fails: {type(error).__name__}") from None


def load_chat_template(
    model: Path, source: Path | None, strftime_now: Callable[[str], str]
) -> ChatTemplate | None:
    """Return the chat template in a model's directory, with the special tokens that are named there.

    ``source``: a template to take instead. None if there is neither. ``strftime_now``: the day or time of
    day in the format it is given, for templates that tell the model. Raises OSError, InvalidArgument.
    """
    described, file = {}, model / "tokenizer_config.json"
    if file.is_file():
        try:
            described = dict(json.loads(file.read_text(encoding="utf-8")))
        except (TypeError, ValueError):
            raise InvalidArgument(f"{file} is not a JSON object") from None
    if source is None and (model / "chat_template.jinja").is_file():
        source = model / "chat_template.jinja"
    try:
        template = described.get("chat_template") if source is None else source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{source} must be text in UTF-8: {error}") from None
    if not isinstance(template, str):
        return None
    tokens = {name: described.get(name) for name in _SPECIAL_TOKENS}
    names = {
        name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()
    }
    return ChatTemplate(
        template, strftime_now=strftime_now, **{name: token for name, token in names.items() if token}
    )


def _contents(messages: Any, *, in_parts: bool) -> Any:
    """Return messages with texts as lists of parts, or with lists of texts as text, joined as in vLLM."""
    if not isinstance(messages, list):
        return messages
    return [
        {**message, "content": _content(message["content"], in_parts)}
        if isinstance(message, dict) and "content" in message
        else message
        for message in messages
    ]


def _content(content: Any, in_parts: bool) -> Any:
    if in_parts:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(content, list):
        return content
    texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "\n".join(texts) if len(texts) == len(content) else content


def _to_json(value: Any, indent: int | None = None) -> str:
    # as transformers does, and unlike Jinja: nothing is escaped for HTML
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateError(message)

"""The options that say what prompts are routed by, of the commands that stand before engines."""

import argparse
import sys
import time
from pathlib import Path

from mulsched.errors import InvalidArgument
from mulsched.prompt_reader import PromptReader
from mulsched.tokenizer import load_tokenizer

__all__ = ["add_prompt_options", "prompt_reader"]


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add them."""
    parser.add_argument(
        "--tokenizer", default="none", metavar="NAME",
        help="a model's directory, a tokenizer.json, or a model on Hugging Face's hub "
        "(default: none, routing by text)",
    )  # fmt: skip
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="for tokens of chats as engines see them (default: the one beside the tokenizer)",
    )


def prompt_reader(options: argparse.Namespace, block_size: int) -> PromptReader:
    """Return what reads prompts as the options say.

    Raises InvalidArgument, MissingExtra, OSError.
    """
    if options.tokenizer == "none":
        if options.chat_template is not None:
            raise InvalidArgument("--chat-template goes with --tokenizer")
        return PromptReader(block_size)
    from mulsched.chat_template import load_chat_template

    model = Path(options.tokenizer)
    source = None if options.chat_template is None else Path(options.chat_template)
    template = load_chat_template(model.parent if model.is_file() else model, source, time.strftime)
    tokenizer = load_tokenizer(options.tokenizer)
    if template is None:
        print(f"mulsched: no chat template with {model}: KV events will match no chat", file=sys.stderr)
    return PromptReader(block_size, tokenizer, template)

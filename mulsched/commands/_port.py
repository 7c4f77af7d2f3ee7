"""The type of options that name a port."""

import argparse

__all__ = ["port"]


def port(text: str) -> int:
    """Return a port, 0 for a free one; uvloop would take a larger number modulo 2**16."""
    if not (text.isascii() and text.isdecimal() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"a port in 0..65535 expected, got {text!r}")
    return int(text)

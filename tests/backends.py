"""The twins of the prefix index, by name."""

import os

from mulsched._prefix_index_py import PrefixIndexPy

# Both twins, unless the environment asks for the pure package. An absent extension is then an error.
BACKENDS = ("python",) if os.environ.get("MULSCHED_BACKEND") == "python" else ("native", "python")


def new_backend(name):
    if name == "python":
        return PrefixIndexPy()
    from mulsched._native import PrefixIndex as NativeIndex

    return NativeIndex()

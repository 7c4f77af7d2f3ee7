"""Which twin is in use: the native core or pure Python.

``MULSCHED_BACKEND`` is ``auto`` (default), ``native`` or ``python`` and is read once, at import.
"""

import os
import warnings

from mulsched.errors import BackendWarning

__all__ = ["BACKEND"]


def _choose(wanted: str) -> str:
    if wanted not in ("auto", "native", "python"):
        raise ImportError(f"MULSCHED_BACKEND must be auto, native or python, got {wanted!r}")
    if wanted == "python":
        return "python"
    try:
        from mulsched._native import PrefixIndex as _  # noqa: F401
    except ModuleNotFoundError:
        # Only an absent extension falls back. One that is there and broken raises ImportError, which
        # must be seen. The spelling matters: "from mulsched import _native" hides the difference.
        if wanted == "native":
            raise
        warnings.warn(
            "mulsched's native core is not installed; decisions take about 20 times longer in pure Python",
            BackendWarning,
            stacklevel=3,
        )
        return "python"
    return "native"


BACKEND = _choose(os.environ.get("MULSCHED_BACKEND", "auto"))

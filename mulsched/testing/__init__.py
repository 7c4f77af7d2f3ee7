"""Verification for authors of scores and routers: strategies, named invariants, counter-examples.

Needs the extra ``mulsched[testing]``, which is Hypothesis.
"""

from mulsched.errors import MissingExtra

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise MissingExtra("mulsched.testing needs hypothesis: pip install 'mulsched[testing]'") from error

from mulsched.testing import invariants, strategies
from mulsched.testing._check import check_policy, check_score
from mulsched.testing._columns import make_columns
from mulsched.testing._lives import Cancel, Dispatch, Finish, FirstToken, run_lives
from mulsched.testing.report import CounterExample, Finding, Report, Shown

__all__ = [
    "Cancel",
    "CounterExample",
    "Dispatch",
    "Finding",
    "Finish",
    "FirstToken",
    "Report",
    "Shown",
    "check_policy",
    "check_score",
    "invariants",
    "make_columns",
    "run_lives",
    "strategies",
]

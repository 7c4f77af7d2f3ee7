"""Everything mulsched raises on purpose.

Each error also inherits the builtin that a caller would expect, so that ``except KeyError`` around a
lookup keeps working::

    MulschedError (Exception)
    ├── InvalidArgument (ValueError)       a value out of range, NaN, a bad combination
    │   └── InvalidTokens                  a token that is negative, too large, or not an integer value
    ├── InvalidType (TypeError)            an argument of the wrong type
    ├── UnknownInstance (KeyError)         no such instance
    ├── DuplicateInstance (ValueError)     the instance is there already
    ├── UnknownBlock (KeyError)            a parent hash that the instance does not hold
    ├── BlockSizeMismatch (ValueError)     an event's block size is not the router's
    ├── InvalidEvents (ValueError)         a message of engine events that cannot be read
    ├── UnknownRequest (KeyError)          no such request is booked
    ├── DuplicateRequest (ValueError)      the request id is booked already
    ├── LifecycleError (RuntimeError)      a life-cycle call out of order
    ├── NoEligibleInstance (LookupError)   nobody left to choose from
    ├── NonFiniteScore (ArithmeticError)   a score that is NaN or infinite
    ├── UnknownPolicy (KeyError)           no policy of that name
    ├── TraceError (ValueError)            a trace that cannot be read: names file and line
    ├── ProfileError (ValueError)          a step-time profile that cannot be read
    ├── ResultsError (ValueError)          results of an experiment that cannot be read
    └── MissingExtra (ImportError)         an optional dependency that is not installed: names the extra
"""

__all__ = [
    "BackendWarning",
    "BlockSizeMismatch",
    "DuplicateInstance",
    "DuplicateRequest",
    "InvalidArgument",
    "InvalidEvents",
    "InvalidTokens",
    "InvalidType",
    "LifecycleError",
    "MissingExtra",
    "MulschedError",
    "NoEligibleInstance",
    "NonFiniteScore",
    "ProfileError",
    "ResultsError",
    "TraceError",
    "UnknownBlock",
    "UnknownInstance",
    "UnknownPolicy",
    "UnknownRequest",
]


class MulschedError(Exception):
    """Root of the errors that mulsched raises."""

    # KeyError prints the repr of its argument; a message is meant to be read.
    __str__ = Exception.__str__


class InvalidArgument(MulschedError, ValueError):
    """A value that is out of range, not finite, or does not go with the others."""


class InvalidTokens(InvalidArgument):
    """Tokens that are not all integers in 0..2**32-1; the message gives the position."""


class InvalidType(MulschedError, TypeError):
    """An argument of the wrong type."""


class UnknownInstance(MulschedError, KeyError):
    """No instance of that name."""


class DuplicateInstance(MulschedError, ValueError):
    """An instance of that name is there already."""


class UnknownBlock(MulschedError, KeyError):
    """A parent block that the instance does not hold."""


class BlockSizeMismatch(MulschedError, ValueError):
    """An event whose block size differs from the router's."""


class InvalidEvents(MulschedError, ValueError):
    """A message of engine events that cannot be read as a whole."""


class UnknownRequest(MulschedError, KeyError):
    """No request of that id is booked."""


class DuplicateRequest(MulschedError, ValueError):
    """A request of that id is booked already."""


class LifecycleError(MulschedError, RuntimeError):
    """A life-cycle call out of order, such as a second first token."""


class NoEligibleInstance(MulschedError, LookupError):
    """There is no instance to choose from."""


class NonFiniteScore(MulschedError, ArithmeticError):
    """A score that is NaN or infinite."""


class UnknownPolicy(MulschedError, KeyError):
    """No policy is registered under that name."""


class TraceError(MulschedError, ValueError):
    """A trace that cannot be read or is not consistent."""


class ProfileError(MulschedError, ValueError):
    """A step-time profile that cannot be read or is not usable."""


class ResultsError(MulschedError, ValueError):
    """Results of an experiment that cannot be read, or do not fit together."""


class MissingExtra(MulschedError, ImportError):
    """An optional dependency is not installed."""


class BackendWarning(UserWarning):
    """The native core is not installed and the pure-Python twin is used instead."""

"""What can go wrong with a request, and what to tell its sender.

CutawayError
├── InvalidField        the request breaks a rule: field, value and rule are named
├── NotFound            no such request
├── AlreadyExists       a request of that name is running
├── QueueFull           too many wait; try again later
├── OverBudget          what is asked would send more bytes than it may
├── Unsupported         this model or tokenizer cannot do that
├── Draining            the server is going down and takes no new requests
├── DeadlineExceeded    the request's time is up
├── EngineFailed        our own bug: the engine or one request's computation failed
└── ModelError          model files that are missing, damaged or of an unknown kind (raised at start only)

`service/status.py` has the one table from these to gRPC status codes.
"""

from __future__ import annotations


class CutawayError(Exception):
    """The base of every error that Cutaway raises on purpose."""


class InvalidField(CutawayError):
    """A request breaks a rule. The message names the field, the value and the rule."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        super().__init__(f"{field}: {shown} is not allowed: {rule}")
        self.field = field
        self.rule = rule


class NotFound(CutawayError):
    """What the request names does not exist."""


class AlreadyExists(CutawayError):
    """A request of that name is queued or running."""


class QueueFull(CutawayError):
    """So many requests wait, or so much of something else is held, that no more are taken. `what` is it."""

    def __init__(self, message: str, retry_after_seconds: float, what: str = "requests") -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.what = what


class OverBudget(CutawayError):
    """What is asked would send more bytes than the request, or the server, allows. Nothing was computed."""


class Unsupported(CutawayError):
    """This model or tokenizer cannot do what is asked."""


class Draining(CutawayError):
    """The server is going down and takes no new requests."""


class DeadlineExceeded(CutawayError):
    """The request's deadline passed before it was finished."""


class EngineFailed(CutawayError):
    """Our own bug. The cause is logged and not told to the client."""


class ModelError(CutawayError):
    """Model files are missing, damaged or of an unknown kind. The message says what is wrong, and where."""

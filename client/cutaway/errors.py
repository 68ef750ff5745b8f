"""What a call can raise.

CutawayError
├── InvalidArgument      the request breaks a rule: the message names field, value and rule
├── NotFound             no request of that name is running
├── AlreadyExists        a request of that name is running
├── FailedPrecondition   this model or tokenizer cannot do that
├── ResourceExhausted    the request is over a budget of the server
│   └── QueueFull        too many wait; `retry_after` says in how many seconds to try again
├── Unauthenticated      the server asks who you are
├── PermissionDenied     the server knows who you are, and says no
├── DeadlineExceeded     the timeout is over; the server has stopped computing
├── Cancelled            the stream was closed, by us or by the server
├── Unavailable          nobody answers at that address, or the server is going down
└── ServerError          a bug of the server, or a server that speaks another version
"""

from __future__ import annotations


class CutawayError(Exception):
    """The base of everything that a call raises on purpose."""


class InvalidArgument(CutawayError):
    """The request breaks a rule. The message names the field, the value and the rule."""


class NotFound(CutawayError):
    """No request of that name is queued or running."""


class AlreadyExists(CutawayError):
    """A request of that name is queued or running."""


class FailedPrecondition(CutawayError):
    """The model or tokenizer that is served cannot do that."""


class ResourceExhausted(CutawayError):
    """The request is over a budget of the server, or a message over the size that gRPC lets through."""


class QueueFull(ResourceExhausted):
    """So many requests wait that no more are taken. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unauthenticated(CutawayError):
    """The server asks who you are."""


class PermissionDenied(CutawayError):
    """The server knows who you are, and says no."""


class DeadlineExceeded(CutawayError):
    """The timeout is over; the server has stopped computing."""


class Cancelled(CutawayError):
    """The stream was closed, by us or by the server."""


class Unavailable(CutawayError):
    """Nobody answers at that address, or the server is going down."""


class ServerError(CutawayError):
    """A bug of the server, or a server that speaks another version of the protocol."""

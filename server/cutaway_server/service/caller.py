"""Who asks: a name, what that name may do, and whose pages and requests it sees."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum


class Scope(StrEnum):
    """What a credential may do. None implies another."""

    GENERATE = "generate"  # text in, tokens out
    INTROSPECT = "introspect"  # read values inside one's own requests
    EDIT = "edit"  # change them
    WEIGHTS = "weights"  # read the weights
    OBSERVE = "observe"  # read the state of the whole server
    ADMIN = "admin"  # change the state of the whole server


@dataclass(frozen=True, slots=True)
class Caller:
    """A name that was proven, and what comes with it."""

    name: str
    proof: str  # "key", "certificate", or "none" where the server asks for none
    tenant: str
    scopes: frozenset[Scope]
    max_calls: int | None = None  # of its tenant at a time; None: any
    max_capture_bytes: int | None = None  # that its tenant's requests hold at a time; None: any
    priority: int = 0  # of its requests; the higher, the sooner
    share: float = 1.0  # of its tenant in what is computed, beside those of others


NOBODY = Caller("", "none", "", frozenset())  # who is not known
ANYBODY = Caller("", "none", "", frozenset(Scope))  # on a server that asks nobody who they are


@dataclass(slots=True)
class Call:
    """One call in progress, for logs and metrics. The handler names the request, if it is about one."""

    method: str
    caller: Caller
    request_id: str = ""
    looks_inside: bool = False  # its request has captures or edits


CALL: ContextVar[Call] = ContextVar("call")  # each call has a task, and so a context, of its own


def current() -> Call:
    """The call that is being answered; outside of any, one of the server's own."""
    return CALL.get(None) or Call("", ANYBODY)

"""Cutaway's client: `Client` and `AsyncClient`, what they return, and what they raise.

Importing this is quick: gRPC is loaded only when one of the two clients is first named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cutaway.errors import (
    AlreadyExists,
    Cancelled,
    CutawayError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    QueueFull,
    ResourceExhausted,
    ServerError,
    Unauthenticated,
    Unavailable,
)
from cutaway.options import GenerateOptions, Message, Sampling, TokenizeOptions
from cutaway.results import (
    Answer,
    Architecture,
    Completion,
    Detokenized,
    FinishReason,
    Health,
    Limits,
    Merge,
    Model,
    PromptToken,
    Started,
    TextInfo,
    Timings,
    Token,
    Tokenized,
    TopLogprob,
    Usage,
    WordMerges,
)

if TYPE_CHECKING:
    from cutaway.aio import AsyncClient, AsyncStream
    from cutaway.client import Client, Stream

__all__ = [
    "AlreadyExists",
    "Answer",
    "Architecture",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Client",
    "Completion",
    "CutawayError",
    "DeadlineExceeded",
    "Detokenized",
    "FailedPrecondition",
    "FinishReason",
    "GenerateOptions",
    "Health",
    "InvalidArgument",
    "Limits",
    "Merge",
    "Message",
    "Model",
    "NotFound",
    "PermissionDenied",
    "PromptToken",
    "QueueFull",
    "ResourceExhausted",
    "Sampling",
    "ServerError",
    "Started",
    "Stream",
    "TextInfo",
    "Timings",
    "Token",
    "TokenizeOptions",
    "Tokenized",
    "TopLogprob",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "WordMerges",
]


def __getattr__(name: str) -> object:
    """Load what needs gRPC when it is first asked for."""
    if name in ("Client", "Stream"):
        from cutaway import client

        return getattr(client, name)
    if name in ("AsyncClient", "AsyncStream"):
        from cutaway import aio

        return getattr(aio, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

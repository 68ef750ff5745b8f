"""Cutaway's client: `Client` and `AsyncClient`, what they return, and what they raise.

Importing this is quick: gRPC is loaded when one of the two clients is first named, numpy with the first array.
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
from cutaway.machine import (
    Block,
    BlockEvent,
    BlockHolder,
    Blocks,
    CacheContents,
    CacheHit,
    CacheStats,
    CompletionInfo,
    RequestInfo,
    Requests,
    Step,
    StepRows,
    StepToken,
)
from cutaway.options import GenerateOptions, Message, Sampling, TokenizeOptions
from cutaway.replay import Replay, SampleCandidate, SampleFilter, SampleReplay
from cutaway.results import (
    Answer,
    Architecture,
    AttributionResult,
    Completion,
    Detokenized,
    Estimate,
    FinishReason,
    Health,
    Identity,
    LensResult,
    Limits,
    Merge,
    Model,
    Point,
    PromptToken,
    SelfCheck,
    Started,
    TextInfo,
    Timings,
    Token,
    Tokenized,
    TopLogprob,
    Usage,
    WordMerges,
)
from cutaway.stored import Sae, Stored, StoredFile, StoredFiles

if TYPE_CHECKING:
    from cutaway.aio import AsyncClient, AsyncStream
    from cutaway.arrays import Array, Arrays
    from cutaway.capture import Capture
    from cutaway.client import Client, Stream
    from cutaway.edit import Edit
    from cutaway.machine_aio import AsyncWatch
    from cutaway.machine_calls import Watch
    from cutaway.sweeping import Divergence, Logit, LogitDifference, Probability, SweepResult
    from cutaway.weighing import NearestTokens, ScoredToken

__all__ = [
    "AlreadyExists",
    "Answer",
    "Architecture",
    "Array",
    "Arrays",
    "AsyncClient",
    "AsyncStream",
    "AsyncWatch",
    "AttributionResult",
    "Block",
    "BlockEvent",
    "BlockHolder",
    "Blocks",
    "CacheContents",
    "CacheHit",
    "CacheStats",
    "Cancelled",
    "Capture",
    "Client",
    "Completion",
    "CompletionInfo",
    "CutawayError",
    "DeadlineExceeded",
    "Detokenized",
    "Divergence",
    "Edit",
    "Estimate",
    "FailedPrecondition",
    "FinishReason",
    "GenerateOptions",
    "Health",
    "Identity",
    "InvalidArgument",
    "LensResult",
    "Limits",
    "Logit",
    "LogitDifference",
    "Merge",
    "Message",
    "Model",
    "NearestTokens",
    "NotFound",
    "PermissionDenied",
    "Point",
    "Probability",
    "PromptToken",
    "QueueFull",
    "Replay",
    "RequestInfo",
    "Requests",
    "ResourceExhausted",
    "Sae",
    "SampleCandidate",
    "SampleFilter",
    "SampleReplay",
    "Sampling",
    "ScoredToken",
    "SelfCheck",
    "ServerError",
    "Started",
    "Step",
    "StepRows",
    "StepToken",
    "Stored",
    "StoredFile",
    "StoredFiles",
    "Stream",
    "SweepResult",
    "TextInfo",
    "Timings",
    "Token",
    "TokenizeOptions",
    "Tokenized",
    "TopLogprob",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "Watch",
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
    if name == "Watch":
        from cutaway import machine_calls

        return machine_calls.Watch
    if name == "AsyncWatch":
        from cutaway import machine_aio

        return machine_aio.AsyncWatch
    if name in ("Divergence", "Logit", "LogitDifference", "Probability", "SweepResult"):
        from cutaway import sweeping

        return getattr(sweeping, name)
    if name in ("NearestTokens", "ScoredToken"):
        from cutaway import weighing

        return getattr(weighing, name)
    if name in ("Array", "Arrays"):
        from cutaway import arrays

        return getattr(arrays, name)
    if name == "Capture":
        from cutaway import capture

        return capture.Capture
    if name == "Edit":
        from cutaway import edit

        return edit.Edit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The one table from errors to gRPC status, and the door through which messages come in and errors leave."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from cutaway_server.errors import (
    AlreadyExists,
    CutawayError,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    InvalidField,
    ModelError,
    NotFound,
    OverBudget,
    QueueFull,
    Unsupported,
)  # fmt: skip

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Incoming = bytes | AsyncIterable[bytes]  # one message, or a stream of them
R = TypeVar("R")


class Loading(CutawayError):
    """The model is not ready yet."""


class Backlog(CutawayError):
    """The client reads so slowly that more is held for it than may be."""


class Unauthenticated(CutawayError):
    """Nobody knows who calls."""


class PermissionDenied(CutawayError):
    """The caller is known, and may not do this."""


CODES: dict[type[CutawayError], grpc.StatusCode] = {
    InvalidField: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    OverBudget: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Backlog: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unsupported: grpc.StatusCode.FAILED_PRECONDITION,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    Draining: grpc.StatusCode.UNAVAILABLE,
    Loading: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    EngineFailed: grpc.StatusCode.INTERNAL,
    ModelError: grpc.StatusCode.INTERNAL,
}
UNTOLD = "internal error; the server's log says more"


@dataclass(frozen=True, slots=True)
class Status:
    """What a client is told: code, message and trailing metadata."""

    code: grpc.StatusCode
    message: str
    trailing: tuple[tuple[str, str], ...] = ()


def status_of(error: Exception) -> Status:
    """The status of an error; one that nobody foresaw is INTERNAL, and its words stay here."""
    code = CODES.get(type(error)) if isinstance(error, CutawayError) else None  # the classes have no heirs
    if code is None or isinstance(error, ModelError):  # whose words have paths
        return Status(grpc.StatusCode.INTERNAL, UNTOLD)
    if isinstance(error, QueueFull):
        wait = ("retry-after-ms", str(round(error.retry_after_seconds * 1000)))
        return Status(code, str(error), (wait,))
    return Status(code, str(error))


def answering(
    handler: Callable[[Any, Context], Awaitable[R]], kind: type[Message]
) -> Callable[[Incoming, Context], Awaitable[R]]:
    """A method that parses what comes in itself, and makes whatever its handler raises the status of its call."""

    @functools.wraps(handler)
    async def answered(data: Incoming, context: Context) -> R:
        try:
            request = _parsed(data, kind) if isinstance(data, bytes) else _each_parsed(data, kind)
            return await handler(request, context)
        except grpc.aio.InternalError:  # what cannot be sent has no reader any more, though gRPC has not told so yet
            log.info("%s: the client has left", handler.__name__)
            raise asyncio.CancelledError from None
        except Exception as error:
            code = status_of(error).code
            if code is grpc.StatusCode.INTERNAL:
                log.exception("%s failed", handler.__name__)
            else:
                log.info("%s: %s: %s", handler.__name__, code.name, _loggable(error))
            return await abort(context, error)

    return answered


async def abort(context: Context, error: Exception) -> NoReturn:
    """End the call with the status of `error`."""
    status = status_of(error)
    try:
        await context.abort(status.code, status.message, status.trailing)
    except grpc.aio.AbortError as aborted:
        raise aborted from error  # who counts calls asks why
    raise AssertionError("abort raises")


def name_of(code: object) -> str:
    """The name of a status code, which grpc.aio's contexts keep as a number."""
    return next((known.name for known in grpc.StatusCode if code in (known, known.value[0])), "UNKNOWN")


def _loggable(error: Exception) -> str:
    """What is wrong, without the value that was sent: it may be a part of somebody's text."""
    return error.field if isinstance(error, InvalidField) else str(error)


async def _each_parsed(stream: AsyncIterable[bytes], kind: type[Message]) -> AsyncIterator[Message]:
    async for data in stream:
        yield _parsed(data, kind)


def _parsed(data: bytes, kind: type[Message]) -> Message:
    try:
        return kind.FromString(data)
    except DecodeError:
        rule = f"must be an encoded {kind.DESCRIPTOR.full_name} with its texts in UTF-8"
        raise InvalidField("message", f"{len(data)} bytes", rule) from None

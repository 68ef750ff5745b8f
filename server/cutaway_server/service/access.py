"""Who may call what: one table, and the one interceptor that holds every call to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import grpc

from cutaway_server.errors import QueueFull
from cutaway_server.service.caller import ANYBODY, CALL, NOBODY, Call, Caller, Scope
from cutaway_server.service.credentials import CredentialStore
from cutaway_server.service.quotas import Quotas
from cutaway_server.service.status import Context, PermissionDenied, Unauthenticated, abort, name_of

if TYPE_CHECKING:  # only the stubs make these generic
    Handler = grpc.RpcMethodHandler[Any, Any]
    Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    Interceptor = grpc.aio.ServerInterceptor

Behaviour = Callable[[Any, Context], Awaitable[Any]]

KNOWN = frozenset(Scope)  # any credential will do
GENERATE = frozenset({Scope.GENERATE})
OBSERVE = frozenset({Scope.OBSERVE})
INTROSPECT = frozenset({Scope.INTROSPECT})
WEIGHTS = frozenset({Scope.WEIGHTS})
PUT_ASIDE = frozenset({Scope.INTROSPECT, Scope.EDIT})
INTROSPECTION = "/cutaway.v1.Introspection/"
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.{}.ServerReflection/ServerReflectionInfo"

# One of the scopes is enough. What is served and not listed here is denied to all.
METHODS: Mapping[str, frozenset[Scope]] = {
    "/cutaway.v1.Inference/Generate": GENERATE,
    "/cutaway.v1.Inference/Abort": GENERATE,
    "/cutaway.v1.Inference/Tokenize": GENERATE | INTROSPECT,
    "/cutaway.v1.Inference/Detokenize": GENERATE | INTROSPECT,
    "/cutaway.v1.Inference/GetModel": KNOWN,
    INTROSPECTION + "ListPoints": INTROSPECT,
    INTROSPECTION + "Trace": INTROSPECT,
    INTROSPECTION + "GetHiddenStates": INTROSPECT,
    INTROSPECTION + "GetAttention": INTROSPECT,
    INTROSPECTION + "LogitLens": INTROSPECT,
    INTROSPECTION + "Attribution": INTROSPECT,
    INTROSPECTION + "SelfCheck": INTROSPECT,
    INTROSPECTION + "Estimate": INTROSPECT,
    INTROSPECTION + "GetCacheStats": OBSERVE,
    INTROSPECTION + "GetBlocks": OBSERVE,
    INTROSPECTION + "WatchCache": OBSERVE,
    INTROSPECTION + "WatchSteps": OBSERVE,
    INTROSPECTION + "ListRequests": OBSERVE,
    INTROSPECTION + "PredictCacheHit": OBSERVE | GENERATE,
    INTROSPECTION + "ReadCache": INTROSPECT,
    INTROSPECTION + "Fork": GENERATE,
    INTROSPECTION + "PutRun": INTROSPECT,
    INTROSPECTION + "Sweep": INTROSPECT,
    INTROSPECTION + "GetWeights": WEIGHTS,
    INTROSPECTION + "GetNearestTokens": WEIGHTS,
    INTROSPECTION + "PutVectors": PUT_ASIDE,
    INTROSPECTION + "ListVectors": PUT_ASIDE,
    INTROSPECTION + "DeleteVectors": PUT_ASIDE,
    INTROSPECTION + "ReplaySample": INTROSPECT,
    HEALTH + "Check": KNOWN,
    HEALTH + "List": KNOWN,
    HEALTH + "Watch": KNOWN,
    REFLECTION.format("v1"): KNOWN,
    REFLECTION.format("v1alpha"): KNOWN,
}
BEARER = "bearer "


class Recorder(Protocol):
    """Where it is written down who did what."""

    def record(self, call: Call, peer: str, code: str, seconds: float) -> None:
        """Take note of a call that is over."""


class Gate(Interceptor):
    """Lets a call through to its handler if its caller is known and may make it. Used on the event loop.

    A key is checked before the request is read; a certificate only where there is no key, once it can be seen.
    """

    def __init__(self, store: CredentialStore | None, recorder: Recorder | None, quotas: Quotas) -> None:
        """Guard the server by the credentials of `store`; with None nobody is asked for any."""
        self._store = store
        self._recorder = recorder
        self._quotas = quotas

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: Any
    ) -> Handler:
        """The handler, behind the gate; one that refuses, for whom it is closed; None where there is no method."""
        caller = None
        try:
            caller = self._known(details.invocation_metadata)
            handler = await continuation(details)
            if handler is None:
                return handler  # UNIMPLEMENTED: clients that ask for newer methods first rely on it
            if caller is not None:
                check(caller, details.method)
        except (Unauthenticated, PermissionDenied) as error:
            return self._refusing(Call(details.method, caller or NOBODY), error)
        return self._gated(handler, details.method, caller)

    def _known(self, metadata: Any) -> Caller | None:
        """Whose key the metadata has; None: the certificate must tell.

        Raises:
            Unauthenticated: no one's.
        """
        if self._store is None:
            return ANYBODY
        known = self._store.current
        given = [value for key, value in metadata or () if key == "authorization"]
        if not given:
            if known.certificates:
                return None
            raise Unauthenticated("this server asks for an API key (metadata authorization: Bearer KEY)")
        value = given[0] if len(given) == 1 and isinstance(given[0], str) else ""
        key = value[len(BEARER) :] if value.lower().startswith(BEARER) else ""
        caller = known.of_key(key.strip())
        if caller is None:
            raise Unauthenticated("authorization: not 'Bearer' and an API key that this server knows")
        return caller

    def _certified(self, context: Context) -> Caller:
        """Whose certificate the connection has shown.

        Raises:
            Unauthenticated: no one's.
        """
        assert self._store is not None, "without credentials nobody is asked"
        shown: Mapping[str, Any] = context.auth_context()
        names = [*shown.get("x509_common_name", ()), *shown.get("x509_subject_alternative_name", ())]
        caller = self._store.current.of_names(bytes(name).decode(errors="replace") for name in names)
        if caller is None:
            raise Unauthenticated("no API key, and no certificate with a name that this server knows")
        return caller

    def _gated(self, handler: Handler, method: str, known: Caller | None) -> Handler:
        async def behaviour(request: Any, context: Context) -> Any:
            call = Call(method, known or NOBODY)
            CALL.set(call)
            with self._recorded(call, context), ExitStack() as place:
                try:
                    call.caller = caller = known or self._certified(context)
                    check(caller, method)
                    place.enter_context(self._quotas.call(caller))
                except (Unauthenticated, PermissionDenied, QueueFull) as error:
                    return await abort(context, error)
                return await inner(request, context)

        kind = ("stream" if handler.request_streaming else "unary", "stream" if handler.response_streaming else "unary")
        inner = cast(Behaviour, getattr(handler, "_".join(kind)))
        make = getattr(grpc, f"{'_'.join(kind)}_rpc_method_handler")
        return cast("Handler", make(behaviour, handler.request_deserializer, handler.response_serializer))

    def _refusing(self, call: Call, error: Exception) -> Handler:
        async def refuse(_: Any, context: Context) -> None:
            with self._recorded(call, context):
                await abort(context, error)

        # Whatever kind of call it is: a handler of streams runs before anything of the request has been read.
        return grpc.stream_stream_rpc_method_handler(cast(Any, refuse))

    @contextmanager
    def _recorded(self, call: Call, context: Context) -> Iterator[None]:
        began, code = time.monotonic(), "OK"
        try:
            yield
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except BaseException:
            code = name_of(context.code())
            raise
        finally:
            aside = call.method.startswith(HEALTH) and code in ("OK", "CANCELLED")
            if self._recorder is not None and not aside:
                self._recorder.record(call, context.peer(), code, time.monotonic() - began)


def check(caller: Caller, method: str) -> None:
    """Let `caller` make this call.

    Raises:
        PermissionDenied: it has none of the scopes that the method asks for, or the method is in no table.
    """
    allowed = METHODS.get(method)
    if allowed and allowed & caller.scopes:
        return
    if allowed is None:
        raise PermissionDenied(f"{method} is open to no scope")
    has = ", ".join(sorted(caller.scopes))
    raise PermissionDenied(f"{method} asks for scope {' or '.join(sorted(allowed))}, and {caller.name!r} has {has}")

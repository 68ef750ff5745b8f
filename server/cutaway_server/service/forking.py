"""Fork: a completion continued from any of its tokens, as a request that shares the pages of those before.

A fork is found in the prefix cache like any prompt that begins as another did: whole blocks are shared, and the tokens
of one that was not full are computed again.
"""
# ruff: noqa: N802  (the contract names the methods, and gRPC gives each both arguments)

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

from cutaway.v1 import inference_pb2
from cutaway.v1 import introspection_pb2 as v1

from cutaway_server.edits import NO_EDITS, Edits, Set
from cutaway_server.engine.stored import tokens_of
from cutaway_server.errors import InvalidField, NotFound
from cutaway_server.request import Request
from cutaway_server.service.caller import Scope, current
from cutaway_server.service.desk import full_name
from cutaway_server.service.generation import Generation
from cutaway_server.service.reply import Asked
from cutaway_server.service.status import Context, Loading, PermissionDenied
from cutaway_server.service.watching import Looking


class Forking:
    """The method, for `methods_of`. Until `connect` is called it is UNAVAILABLE."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._looking: Looking | None = None

    def connect(self, looking: Looking) -> None:
        """Say what is looked at."""
        self._looking = looking

    async def Fork(self, request: v1.ForkRequest, context: Context) -> None:
        """Stream a completion's continuation."""
        if self._looking is None:
            raise Loading("the model is still being loaded")
        if "/" in request.request_id or not request.request_id:
            raise NotFound(f"request_id: no request {request.request_id!r} is running, or has ended and is kept")
        caller = current().caller
        name = full_name(caller.tenant, request.request_id)
        find = partial(tokens_of, name=name, index=request.index)
        forked, tokens = await asyncio.wrap_future(self._looking.look(find))
        inherits = not request.generate.edits and forked.edits is not NO_EDITS
        if inherits and Scope.EDIT not in caller.scopes:
            has = ", ".join(sorted(caller.scopes))
            rule = f"the request forked has edits, which ask for scope edit, and {caller.name!r} has {has}"
            raise PermissionDenied(f"request_id: {rule}")
        asked = fork_of(request, forked, tokens)
        alter = partial(_inheriting, forked.edits, len(forked.prompt)) if inherits else None
        await self._generation.stream(asked, context, lambda event: v1.ForkResponse(event=event), alter)


def fork_of(request: v1.ForkRequest, forked: Request, tokens: tuple[int, ...]) -> inference_pb2.GenerateRequest:
    """The request that goes on.

    Raises:
        InvalidField: it has a prompt of its own, or there are not so many tokens.
    """
    if (prompt := request.generate.WhichOneof("prompt")) is not None:
        raise InvalidField(f"generate.{prompt}", "set", "must not be set: the prompt is that of the request forked")
    generated = len(tokens) - len(forked.prompt)
    at = request.at if request.HasField("at") else generated
    if at > generated:
        raise InvalidField("at", at, f"the completion has {generated} tokens")
    asked = inference_pb2.GenerateRequest()
    asked.CopyFrom(request.generate)
    asked.token_ids.ids.extend(tokens[: len(forked.prompt) + at])
    return asked


def _inheriting(edits: Edits, prompt_length: int, asked: Asked) -> Asked:
    """What was asked, with the edits of the request forked, whose prompt had so many tokens.

    Raises:
        InvalidField: these set rows one by one, and the fork could have more.
    """
    made = asked.request
    computed = len(made.prompt) + max(0, made.sampling.max_tokens - 1)
    for edit in edits.edits:
        if isinstance(edit.change, Set) and edit.change.places:
            last = edit.change.places[-1]
            if not set(edit.rows.within(0, computed)) <= set(edit.change.places):
                rule = f"an edit of the request forked has values for rows up to {last}, and this could have {computed}"
                raise InvalidField("generate.sampling.max_tokens", made.sampling.max_tokens, rule)
    gone = len(made.prompt) - prompt_length
    left = tuple((step - gone, token) for step, token in edits.overrides if step >= gone)
    return replace(asked, request=replace(made, edits=replace(edits, overrides=left)))

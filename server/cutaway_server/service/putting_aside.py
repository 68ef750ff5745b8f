"""The part of cutaway.v1.Introspection that keeps files for later requests."""
# ruff: noqa: N802, ARG002  (the contract names the methods, and gRPC gives each both arguments)

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from functools import partial

from cutaway.v1 import inference_pb2, introspection_pb2
from cutaway.v1 import stored_pb2 as v1

from cutaway_server.errors import InvalidField
from cutaway_server.service.caller import current
from cutaway_server.service.files import read_file
from cutaway_server.service.generation import Generation
from cutaway_server.service.introspection import of_the_prompt
from cutaway_server.service.runs import check_kept, run_of
from cutaway_server.service.shelf import Kept, Kind, Shelf
from cutaway_server.service.status import Context
from cutaway_server.service.workers import Workers

NAME = re.compile(r"[A-Za-z0-9._:-]{0,128}")
KINDS = {
    Kind.VECTORS: v1.STORED_KIND_VECTORS, Kind.TUNED_LENS: v1.STORED_KIND_TUNED_LENS, Kind.SAE: v1.STORED_KIND_SAE,
    Kind.RUN: v1.STORED_KIND_RUN,
}  # fmt: skip


class PuttingAside:
    """The methods, for `methods_of`."""

    def __init__(self, shelf: Shelf, workers: Workers, generation: Generation) -> None:
        self._shelf, self._workers, self._generation = shelf, workers, generation

    async def PutVectors(
        self, requests: AsyncIterator[v1.PutVectorsRequest], context: Context
    ) -> v1.PutVectorsResponse:
        """Keep a file."""
        tenant = current().caller.tenant
        header: v1.VectorsHeader | None = None
        with self._shelf.arriving(tenant) as arriving:
            async for request in requests:
                if request.WhichOneof("part") == "header":
                    _check_header(request.header, header)
                    header = request.header
                elif header is None:
                    raise InvalidField("header", None, "must be the first message")
                else:
                    arriving.add(request.data)
            if header is None:
                raise InvalidField("header", None, "must be the first message")
            data = arriving.data
            kept = await self._workers.run(partial(read_file, data, header.name, header.sae_config), len(data))
        self._shelf.put(tenant, kept)
        return v1.PutVectorsResponse(file=told(kept, shared=False))

    async def PutRun(
        self, request: introspection_pb2.PutRunRequest, context: Context
    ) -> introspection_pb2.PutRunResponse:
        """Compute a request and keep what it captures."""
        tenant = current().caller.tenant
        check_name(request.name, "name")
        check_kept(request.generate, self._generation.ready().facts.config)
        asked = inference_pb2.GenerateRequest()
        asked.CopyFrom(of_the_prompt(request.generate))
        room = self._shelf.room(tenant)
        if not asked.HasField("max_capture_bytes") or asked.max_capture_bytes > room:
            asked.max_capture_bytes = max(0, room)  # refused before it is computed
        gathered = await self._generation.gather(asked, context)
        kept = await self._workers.run(partial(run_of, gathered, len(asked.captures), request.name))
        self._shelf.put(tenant, kept)
        return introspection_pb2.PutRunResponse(file=told(kept, shared=False))

    async def ListVectors(self, request: v1.ListVectorsRequest, context: Context) -> v1.ListVectorsResponse:
        """Tell what is kept."""
        tenant = current().caller.tenant
        return v1.ListVectorsResponse(
            files=[told(kept, shared=shared) for kept, shared in self._shelf.listed(tenant)],
            bytes=self._shelf.used(tenant), max_bytes=self._shelf.max_bytes,
        )  # fmt: skip

    async def DeleteVectors(self, request: v1.DeleteVectorsRequest, context: Context) -> v1.DeleteVectorsResponse:
        """Forget a file."""
        self._shelf.delete(current().caller.tenant, request.id)
        return v1.DeleteVectorsResponse()


def _check_header(header: v1.VectorsHeader, before: v1.VectorsHeader | None) -> None:
    if before is not None:
        raise InvalidField("header", header.name, "must come once, as the first message")
    check_name(header.name, "header.name")


def check_name(name: str, field: str) -> None:
    """Refuse what lists cannot show.

    Raises:
        InvalidField: it has other characters, or too many.
    """
    if not NAME.fullmatch(name):
        raise InvalidField(field, name, "must be at most 128 characters of [A-Za-z0-9._:-]")


def told(kept: Kept, *, shared: bool) -> v1.StoredFile:
    """A file as lists tell it."""
    tensors = [
        v1.StoredTensor(name=name, shape=tensor.shape, positions=kept.positions.get(name, ()))
        for name, tensor in sorted(kept.tensors.items())
    ]
    made = v1.StoredFile(
        id=kept.id, name=kept.name, kind=KINDS[kept.kind], bytes=kept.n_bytes, tensors=tensors, shared=shared
    )
    if kept.sae is not None:
        d_in, d_sae = kept.sae.w_enc.shape
        sae = v1.Sae(architecture=kept.sae.architecture, hook_name=kept.sae.hook_name, d_in=d_in, d_sae=d_sae)
        made.sae.CopyFrom(sae)
    return made

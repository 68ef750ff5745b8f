"""The calls that put files aside on the server, of both clients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from cutaway import stored_wire as wire
from cutaway.looking import Prompt, TraceOptions, trace_request
from cutaway.stored import StoredFile, StoredFiles
from cutaway.v1 import introspection_pb2
from cutaway.v1 import stored_pb2 as pb

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from cutaway.aio import AsyncCalls
    from cutaway.client import Calls

    Source = str | Path | ArrayLike | Mapping[str, ArrayLike]


class Keeping:
    """What `Client` can put aside. Scope `introspect` or `edit`."""

    _calls: Calls

    def put_vectors(self, source: Source, *, name: str = "", timeout: float | None = None) -> StoredFile:
        """Keep vectors on the server: arrays by name, one array, or the path of a safetensors file.

        The path of a directory is that of a sparse autoencoder as SAELens saves it. The file's id is a hash of its
        content. It stays until it is deleted or the server ends.

        Raises:
            InvalidArgument: it is no safetensors file of finite floats.
            ResourceExhausted: it does not fit what the tenant may keep.
        """
        calls = self._calls
        return wire.stored_file(calls.send(calls.introspection.PutVectors, wire.upload(source, name), timeout).file)

    def put_run(self, prompt: Prompt | None = None, *, name: str = "", **options: Unpack[TraceOptions]) -> StoredFile:
        """Compute a prompt and keep `points` of it, for `Edit.set` of other requests: as `trace`, sent nowhere."""
        request = run_request(prompt, name, options)
        calls = self._calls
        return wire.stored_file((calls.ask(calls.introspection.PutRun, request, options.get("timeout"))).file)

    def list_vectors(self, *, timeout: float | None = None) -> StoredFiles:
        """Tell what is kept."""
        calls = self._calls
        return wire.stored_files(calls.ask(calls.introspection.ListVectors, pb.ListVectorsRequest(), timeout))

    def delete_vectors(self, file: StoredFile | str, *, timeout: float | None = None) -> None:
        """Forget a file.

        Raises:
            NotFound: the tenant keeps none of this id.
        """
        request = pb.DeleteVectorsRequest(id=file if isinstance(file, str) else file.id)
        self._calls.ask(self._calls.introspection.DeleteVectors, request, timeout)


class AsyncKeeping:
    """What `AsyncClient` can put aside: as `Keeping`, awaited."""

    _calls: AsyncCalls

    async def put_vectors(self, source: Source, *, name: str = "", timeout: float | None = None) -> StoredFile:
        """Keep vectors on the server: arrays by name, one array, or the path of a safetensors file."""
        calls = self._calls
        told = await calls.send(calls.introspection.PutVectors, wire.upload(source, name), timeout)
        return wire.stored_file(told.file)

    async def put_run(
        self, prompt: Prompt | None = None, *, name: str = "", **options: Unpack[TraceOptions]
    ) -> StoredFile:
        """Compute a prompt and keep `points` of it, for `Edit.set` of other requests: as `trace`, sent nowhere."""
        request = run_request(prompt, name, options)
        calls = self._calls
        return wire.stored_file((await calls.ask(calls.introspection.PutRun, request, options.get("timeout"))).file)

    async def list_vectors(self, *, timeout: float | None = None) -> StoredFiles:
        """Tell what is kept."""
        calls = self._calls
        return wire.stored_files(await calls.ask(calls.introspection.ListVectors, pb.ListVectorsRequest(), timeout))

    async def delete_vectors(self, file: StoredFile | str, *, timeout: float | None = None) -> None:
        """Forget a file."""
        request = pb.DeleteVectorsRequest(id=file if isinstance(file, str) else file.id)
        await self._calls.ask(self._calls.introspection.DeleteVectors, request, timeout)


def run_request(prompt: Prompt | None, name: str, options: TraceOptions) -> introspection_pb2.PutRunRequest:
    """The wire's request."""
    return introspection_pb2.PutRunRequest(generate=trace_request(prompt, options).generate, name=name)

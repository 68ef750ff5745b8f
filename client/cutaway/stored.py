"""What is put aside on the server for later requests: files of vectors, and references to their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cutaway.errors import InvalidArgument

if TYPE_CHECKING:
    from cutaway.v1 import stored_pb2 as pb


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a stored file, or rows of it: goes where an edit or a capture takes vectors."""

    id: str  # of the file, or the name of one that the operator has loaded
    tensor: str = ""  # its name; empty: the file's only one
    rows: tuple[int, ...] = ()  # empty: all

    def message(self) -> pb.Stored:
        """The wire's reference.

        Raises:
            InvalidArgument: a row is no number from 0 on.
        """
        from cutaway.v1 import stored_pb2 as pb

        try:
            return pb.Stored(id=self.id, tensor=self.tensor, rows=self.rows)
        except ValueError as error:
            raise InvalidArgument(f"rows: {self.rows!r} cannot be sent: {error}") from error


@dataclass(frozen=True, slots=True)
class Sae:
    """What a sparse autoencoder is."""

    architecture: str  # "standard", "gated", "topk", "jumprelu"
    hook_name: str  # the point that it was trained on
    d_in: int
    d_sae: int  # features


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that is kept. `file["name"]` is its tensor of that name, `file["name", 7]` a row of it."""

    id: str
    name: str
    kind: str  # "vectors", "tuned lens", "sae", "run"
    bytes: int  # on the server
    tensors: Mapping[str, tuple[int, ...]]  # shapes
    shared: bool  # the operator's
    sae: Sae | None = None
    positions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of a run's rows, by tensor

    def __getitem__(self, key: str | tuple[str, int]) -> Stored:
        name, rows = (key, ()) if isinstance(key, str) else (key[0], (key[1],))
        if name not in self.tensors:
            raise KeyError(name)
        return Stored(self.id, name, rows)


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """The files that requests can use: the operator's, then the tenant's own."""

    files: tuple[StoredFile, ...]
    bytes: int  # that the tenant's own take
    max_bytes: int  # that they may take

    def __iter__(self) -> Iterator[StoredFile]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

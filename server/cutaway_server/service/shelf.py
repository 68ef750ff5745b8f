"""What is kept for later requests: files of vectors and lenses, the operator's and each tenant's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from cutaway.v1 import stored_pb2 as v1

from cutaway_server.captures import Sae
from cutaway_server.edits import Floats
from cutaway_server.errors import InvalidField, NotFound, OverBudget

MAX_TENSORS = 8192  # of a tenant: so that a list of them fits one message


class Kind(Enum):
    """What a file can be used for beside its tensors."""

    VECTORS = "vectors"
    TUNED_LENS = "tuned lens"
    SAE = "sae"
    RUN = "run"


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A file: its tensors fp32 by name. `id` is a hash of its content."""

    id: str
    name: str
    kind: Kind
    tensors: Mapping[str, Floats]
    sae: Sae | None = None
    positions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of a run's rows, by tensor

    @property
    def n_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def rows(self, name: str, positions: Iterable[int], place: str) -> Floats:
        """Rows of a run's tensor at absolute positions.

        Raises:
            InvalidField: it is no run, or has not kept these.
        """
        if self.kind is not Kind.RUN:
            raise InvalidField(place, self.id, "is no run: put_run keeps one")
        tensor, kept = self.tensor(name, place), {at: row for row, at in enumerate(self.positions[name])}
        for position in positions:
            if position not in kept:
                raise InvalidField(place, position, f"{self.id} has not kept {name} at this position")
        return tensor[[kept[position] for position in positions]]

    def tensor(self, name: str, place: str) -> Floats:
        """One of its tensors; "" is the only one.

        Raises:
            InvalidField: it has none of that name.
        """
        if name in self.tensors:
            return self.tensors[name]
        if not name and len(self.tensors) == 1:
            return next(iter(self.tensors.values()))
        known = ", ".join(sorted(self.tensors)[:16])
        raise InvalidField(place, name, f"is no tensor of {self.id}, which has {known}")


@dataclass(frozen=True, slots=True)
class Drawer:
    """What one tenant can use: its own files, and the operator's, which also go by their names."""

    files: Mapping[str, Kept]

    def find(self, name: str, field: str) -> Kept:
        """The file called so.

        Raises:
            InvalidField: there is none.
        """
        if name not in self.files:
            raise InvalidField(
                field, name, "no file of this id is kept: put_vectors keeps one, list_vectors lists them"
            )
        return self.files[name]

    def values(self, message: v1.Stored, field: str) -> Floats:
        """The tensor, or the rows of it, that a request names.

        Raises:
            InvalidField: there is none.
        """
        found = self.find(message.id, f"{field}.id").tensor(message.tensor, f"{field}.tensor")
        if not message.rows:
            return found
        if found.ndim < 2:
            raise InvalidField(f"{field}.rows", list(message.rows)[:16], "the tensor has one axis: no rows to take")
        for row in message.rows:
            if row >= len(found):
                raise InvalidField(f"{field}.rows", row, f"the tensor has rows 0 to {len(found) - 1}")
        return found[list(message.rows)]

    def salt(self, name: str) -> bytes:
        """What tells apart the contents that a name could stand for."""
        return self.files[name].id.encode()


EMPTY = Drawer({})


class Shelf:
    """All files. Belongs to the event loop; what `of` gives may be read by any thread."""

    def __init__(self, max_bytes: int, shared: Iterable[Kept] = ()) -> None:
        """`max_bytes`: of each tenant's files, those included that are on their way. `shared`: the operator's."""
        self.max_bytes = max_bytes
        self._shared = list(shared)
        self._own: defaultdict[str, dict[str, Kept]] = defaultdict(dict)
        self._arriving: defaultdict[str, int] = defaultdict(int)

    def of(self, tenant: str) -> Drawer:
        """What a tenant can use."""
        named = {kept.name: kept for kept in self._shared}
        return Drawer({**self._own.get(tenant, {}), **named, **{kept.id: kept for kept in self._shared}})

    def used(self, tenant: str) -> int:
        """Bytes of a tenant's files."""
        return sum(kept.n_bytes for kept in self._own.get(tenant, {}).values())

    def listed(self, tenant: str) -> list[tuple[Kept, bool]]:
        """The files that a tenant can use, and whether they are the operator's."""
        return [(kept, True) for kept in self._shared] + [(kept, False) for kept in self._own.get(tenant, {}).values()]

    @contextmanager
    def arriving(self, tenant: str) -> Iterator[Arriving]:
        """Room for the bytes of a file as they come."""
        taken = Arriving(self, tenant)
        try:
            yield taken
        finally:
            self._arriving[tenant] -= len(taken.data)
            if not self._arriving[tenant]:
                del self._arriving[tenant]

    def take(self, tenant: str, size: int) -> None:
        """Count bytes that are on their way.

        Raises:
            OverBudget: they would be too many.
        """
        self.refuse(tenant, size)
        self._arriving[tenant] += size

    def refuse(self, tenant: str, size: int) -> None:
        """Refuse bytes that do not fit.

        Raises:
            OverBudget: tells the numbers.
        """
        used = self.used(tenant) + self._arriving.get(tenant, 0)
        if used + size > self.max_bytes:
            rule = f"{used} bytes of at most {self.max_bytes} are taken; delete_vectors makes room"
            raise OverBudget(f"data: {size} bytes more are too many: {rule}")

    def room(self, tenant: str) -> int:
        """Bytes that a tenant may still put aside."""
        return self.max_bytes - self.used(tenant) - self._arriving.get(tenant, 0)

    def put(self, tenant: str, kept: Kept) -> None:
        """Keep a file; one that is kept already takes its new name.

        Raises:
            OverBudget: it does not fit.
        """
        own = self._own[tenant]
        if kept.id not in own:
            tensors = sum(len(each.tensors) for each in own.values())
            if tensors + len(kept.tensors) > MAX_TENSORS:
                rule = f"{tensors} of at most {MAX_TENSORS} are kept; delete_vectors makes room"
                raise OverBudget(f"data: the file has {len(kept.tensors)} tensors, and {rule}")
            used = self.used(tenant)
            if used + kept.n_bytes > self.max_bytes:
                rule = f"{used} of at most {self.max_bytes} are taken; delete_vectors makes room"
                raise OverBudget(f"data: the file takes {kept.n_bytes} bytes, where all numbers are F32, and {rule}")
        own[kept.id] = kept

    def delete(self, tenant: str, name: str) -> None:
        """Forget a tenant's file.

        Raises:
            NotFound: it has none of that id.
        """
        if self._own.get(tenant, {}).pop(name, None) is None:
            raise NotFound(f"id: no file {name!r} of this tenant is kept")


class Arriving:
    """The bytes of a file so far."""

    def __init__(self, shelf: Shelf, tenant: str) -> None:
        self._shelf, self._tenant = shelf, tenant
        self.data = bytearray()

    def add(self, data: bytes) -> None:
        """Take more.

        Raises:
            OverBudget: the tenant has no room for them.
        """
        self._shelf.take(self._tenant, len(data))
        self.data += data


def flattened(values: Floats) -> Floats:
    """The numbers one after the other."""
    return np.ascontiguousarray(values).reshape(-1)

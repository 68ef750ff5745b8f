"""How many bytes the tensors of something take: counted where they lie, so no form of weights can hide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

CONTAINERS = (list, tuple, set, frozenset)


def tensor_bytes(root: object, apart_from: object = None) -> int:
    """Bytes of the tensors that can be reached from `root` through our own objects, but those of `apart_from`.

    Tensors that share their storage count once.
    """
    storages = {storage.data_ptr(): storage.nbytes() for storage in _storages(root, set())}
    others = {storage.data_ptr() for storage in _storages(apart_from, set())}
    return sum(n_bytes for place, n_bytes in storages.items() if place not in others)


def _storages(part: object, seen: set[int]) -> Iterator[torch.UntypedStorage]:
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, torch.Tensor):
        yield part.untyped_storage()
    elif isinstance(part, Mapping):
        for item in part.values():
            yield from _storages(item, seen)
    elif isinstance(part, CONTAINERS):
        for item in part:
            yield from _storages(item, seen)
    elif type(part).__module__.startswith("cutaway_server."):
        for item in _members(part):
            yield from _storages(item, seen)


def _members(part: object) -> Iterator[object]:
    yield from vars(part).values() if hasattr(part, "__dict__") else ()
    for kind in type(part).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(part, name):
                yield getattr(part, name)

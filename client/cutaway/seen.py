"""What captures brought in pieces, as whole arrays by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from cutaway.arrays import Array, Arrays, joined
from cutaway.receiving import Received

MAIN = ("", "values", "logprobs", "given_logprobs")  # which part stands for a capture that has several


def assembled(pieces: Iterable[Received]) -> Arrays:
    """One array for each capture, rows in the order of the pieces; what has the same name is told apart by "#1"."""
    by_capture: defaultdict[int, list[list[Received]]] = defaultdict(list)
    for piece in pieces:
        place = (piece.header.step, piece.header.HasField("index"), piece.header.index)
        known = by_capture[piece.header.capture]
        if known and place == _place(known[-1][0]) and all(p.header.part != piece.header.part for p in known[-1]):
            known[-1].append(piece)
        else:
            known.append([piece])
    found = Arrays()
    for number in sorted(by_capture):
        whole = joined([_one(parts) for parts in by_capture[number]], _fill(by_capture[number][0][0]))
        name, copy = whole.name, 0
        while name in found:
            copy += 1
            name = f"{whole.name}#{copy}"
        found[name] = whole
    return found


def by_layer(arrays: Arrays) -> Arrays:
    """Arrays of several layers as one for each layer, under its own name."""
    found = Arrays()
    for name, array in arrays.items():
        if "layer" not in array.at:
            found[name] = array
            continue
        for layer in array.at["layer"]:
            own = name.replace("*", str(layer))
            found[own] = replace(array.sel(layer=layer), name=array.name.replace("*", str(layer)))
    return found


def layers_joined(arrays: Iterable[Array]) -> Array:
    """Residuals before layers, and the one after the last (one more), along one axis `layer`."""
    several = list(arrays)
    first = several[0]
    at = dict(first.at)
    at["layer"] = tuple(layer + array.name.endswith("resid_post") for array in several for layer in array.at["layer"])
    values = np.concatenate([array.values for array in several])
    parts = {name: layers_joined([array.parts[name] for array in several]) for name in first.parts}
    return replace(first, values=values, at=at, parts=parts)


def _place(piece: Received) -> tuple[int, bool, int]:
    return (piece.header.step, piece.header.HasField("index"), piece.header.index)


def _one(parts: list[Received]) -> Array:
    named = {part.header.part: part.array for part in parts}
    main = next(name for name in MAIN if name in named)
    return replace(named[main], parts={name: array for name, array in named.items() if name})


def _fill(piece: Received) -> float:
    return -np.inf if piece.header.name.endswith("hook_attn_scores") else 0.0

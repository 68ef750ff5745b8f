"""Captures as the wire has them, made into what the engine obeys. Every rule about them is here."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from cutaway.v1 import capture_pb2 as v1
from cutaway.v1 import edit_pb2

from cutaway_server import captures
from cutaway_server.architecture import ModelConfig
from cutaway_server.captures import Capture, Reduction
from cutaway_server.errors import InvalidField
from cutaway_server.probe.points import Found, Point, find, size_of
from cutaway_server.service.selecting import indices, merged, rows, spans_of

MAX_CAPTURES = 64
MAX_CELLS = 256
MAX_LENS = 128
MAX_GIVEN = 1024
MAX_VECTORS = 1024
DTYPES = ("F32", "F16", "BF16")
HEADS = ("head", "kv_head")
PATTERN = "blocks.{i}.attn.hook_pattern"
RESIDUALS = tuple(f"blocks.{{i}}.hook_resid_{place}" for place in ("pre", "mid", "post"))


def captures_of(
    messages: Iterable[v1.Capture], config: ModelConfig, prompt_length: int, max_tokens: int
) -> tuple[Capture, ...]:
    """Check the captures of a request.

    Raises:
        InvalidField: one breaks a rule: field, value and rule are named.
    """
    listed = list(messages)
    if len(listed) > MAX_CAPTURES:
        raise InvalidField("captures", f"{len(listed)} entries", f"at most {MAX_CAPTURES} are allowed")
    computed = prompt_length + max(0, max_tokens - 1)
    return tuple(_capture(each, f"captures[{i}]", config, prompt_length, computed) for i, each in enumerate(listed))


def _capture(message: v1.Capture, field: str, config: ModelConfig, prompt_length: int, computed: int) -> Capture:
    found = find(config, message.point, f"{field}.point")
    point = found.point
    heads = elements = None
    if message.HasField("heads"):
        axis = next((axis for axis in point.axes if axis in HEADS), None)
        if axis is None:
            raise InvalidField(f"{field}.heads", _shown(message.heads), f"{point.name} has no heads")
        heads = indices(message.heads, size_of(config, axis), f"{field}.heads", f"{axis}s")
    if message.HasField("elements"):
        if point.keyed or point.axes[-1] in HEADS:
            raise InvalidField(f"{field}.elements", _shown(message.elements), f"{point.name} has no elements to select")
        last = point.axes[-1]
        elements = indices(message.elements, size_of(config, last), f"{field}.elements", f"places along {last}")
    if message.dtype not in ("", *DTYPES):
        raise InvalidField(f"{field}.dtype", message.dtype, f"must be one of {', '.join(DTYPES)}")
    keys = spans_of(message.keys, f"{field}.keys")
    if keys and not point.keyed:
        raise InvalidField(f"{field}.keys", keys, f"{point.name} has no keys")
    width = len(elements) if elements is not None else size_of(config, point.axes[-1])
    reduction = _reduction(message, field, point, width, config)
    return Capture(
        point.name, layers_of(message, found, config, field), found.every, heads,
        rows(message.positions, f"{field}.positions", prompt_length, computed),
        keys if isinstance(reduction, captures.SumKeys) else merged(keys), elements, reduction, message.dtype or "F32",
        after_edits=message.after_edits,
    )  # fmt: skip


def layers_of(message: v1.Capture | edit_pb2.Edit, found: Found, config: ModelConfig, field: str) -> tuple[int, ...]:
    """The layers meant by a point's name and the field `layers`."""
    if message.HasField("layers"):
        if not found.every:
            raise InvalidField(f"{field}.layers", _shown(message.layers), 'is for points with "*" in place of a layer')
        return indices(message.layers, config.n_layers, f"{field}.layers", "layers")
    if not found.point.layered:
        return ()
    return tuple(range(config.n_layers)) if found.layer is None else (found.layer,)


def _reduction(message: v1.Capture, field: str, point: Point, width: int, config: ModelConfig) -> Reduction | None:
    kind = message.WhichOneof("reduction")
    if kind is None:
        return None
    place = f"{field}.{kind}"
    _check_fit(kind, place, message, point)
    match kind:
        case "top_k":
            most = 2**20 if point.keyed else width
            if not 1 <= message.top_k.k <= most:
                raise InvalidField(f"{place}.k", message.top_k.k, f"must be in [1, {most}]")
            return captures.TopK(message.top_k.k)
        case "pool":
            if not 1 <= message.pool.size <= MAX_CELLS:
                raise InvalidField(f"{place}.size", message.pool.size, f"must be in [1, {MAX_CELLS}]")
            return captures.Pool(message.pool.size)
        case "norm":
            return captures.Norm()
        case "project":
            return captures.Project(vectors(message.project.vectors, width, f"{place}.vectors"))
        case "sum_keys":
            return captures.SumKeys()
        case "head_summary":
            return captures.HeadSummary()
    return _lens(message.lens, place, config)


def _check_fit(kind: str, place: str, message: v1.Capture, point: Point) -> None:
    """Refuse reductions of values that they make no sense for."""
    if kind in ("pool", "sum_keys", "head_summary") and point.name != PATTERN:
        raise InvalidField(place, point.name, f"is for {PATTERN} only")
    if kind in ("norm", "project") and (point.keyed or point.axes[-1] in HEADS):
        raise InvalidField(place, point.name, "is for points whose last axis is a vector")
    if kind == "lens" and point.name not in RESIDUALS:
        raise InvalidField(place, point.name, f"is for residuals only: {', '.join(RESIDUALS)}")
    if kind == "lens" and message.HasField("elements"):
        raise InvalidField(f"{place}", "elements", "must not be set: the final norm reads the whole residual")
    if kind == "sum_keys" and not message.keys:
        raise InvalidField(place, "no keys", "name the spans to sum over in `keys`")
    if kind in ("pool", "head_summary") and message.keys:
        raise InvalidField(place, "keys", "must not be set: it is of whole patterns")
    if kind == "pool" and (message.positions.spans or message.positions.list):
        raise InvalidField(place, "positions", "must not be set: the picture is of the whole prompt")


def vectors(data: bytes, width: int, field: str) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Vectors fp32 [n, width] from their bytes.

    Raises:
        InvalidField: the length is wrong, or a number is not finite.
    """
    if not data or len(data) % (4 * width) or len(data) > 4 * width * MAX_VECTORS:
        rule = f"must be 1 to {MAX_VECTORS} vectors of {width} little-endian F32 numbers ({4 * width} bytes each)"
        raise InvalidField(field, f"{len(data)} bytes", rule)
    found = np.frombuffer(data, "<f4").reshape(-1, width).astype(np.float32)
    if not np.isfinite(found).all():
        raise InvalidField(field, "a number that is not finite", "every number must be finite")
    return found


def _lens(message: v1.Lens, place: str, config: ModelConfig) -> captures.Lens:
    if message.top_k > min(MAX_LENS, config.d_vocab):
        raise InvalidField(f"{place}.top_k", message.top_k, f"must be at most {min(MAX_LENS, config.d_vocab)}")
    if len(message.token_ids) > MAX_GIVEN:
        raise InvalidField(
            f"{place}.token_ids", f"{len(message.token_ids)} entries", f"at most {MAX_GIVEN} are allowed"
        )
    for token in message.token_ids:
        if token >= config.d_vocab:
            raise InvalidField(f"{place}.token_ids", token, f"token ids are in [0, {config.d_vocab})")
    if not message.top_k and not message.token_ids:
        raise InvalidField(place, "neither top_k nor token_ids", "one of them must be set")
    return captures.Lens(message.top_k, tuple(message.token_ids))


def _shown(message: v1.Indices) -> list[int]:
    return list(message.list)[:16]

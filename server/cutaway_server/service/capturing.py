"""Captures as the wire has them, made into what the engine obeys. Every rule about them is here."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from cutaway.v1 import capture_pb2 as v1
from cutaway.v1 import edit_pb2

from cutaway_server import captures
from cutaway_server.architecture import ModelConfig
from cutaway_server.captures import Capture, Reduction
from cutaway_server.edits import Floats
from cutaway_server.errors import InvalidField
from cutaway_server.probe.points import Found, Point, find, size_of
from cutaway_server.service.selecting import indices, merged, rows, spans_of
from cutaway_server.service.shelf import EMPTY, Drawer, Kept, Kind

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
    messages: Iterable[v1.Capture], config: ModelConfig, prompt_length: int, max_tokens: int, drawer: Drawer = EMPTY
) -> tuple[Capture, ...]:
    """Check the captures of a request; `drawer` has the files that they may name.

    Raises:
        InvalidField: one breaks a rule: field, value and rule are named.
    """
    listed = list(messages)
    if len(listed) > MAX_CAPTURES:
        raise InvalidField("captures", f"{len(listed)} entries", f"at most {MAX_CAPTURES} are allowed")
    computed = prompt_length + max(0, max_tokens - 1)
    return tuple(
        _capture(each, f"captures[{i}]", config, drawer, prompt_length, computed) for i, each in enumerate(listed)
    )


def _capture(
    message: v1.Capture, field: str, config: ModelConfig, drawer: Drawer, prompt_length: int, computed: int
) -> Capture:
    sae = _autoencoder(message, field, drawer)
    name = sae.hook_name if sae is not None and not message.point else message.point
    found = find(config, name, f"{field}.point")
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
    layers = layers_of(message, found, config, field)
    if sae is not None:
        reduction: Reduction | None = _features(message, field, point, sae, config)
    elif message.HasField("lens"):
        _check_fit("lens", f"{field}.lens", message, point)
        reduction = lens_of(message.lens, f"{field}.lens", config, drawer, (point.name, layers))
    else:
        reduction = _reduction(message, field, point, width, drawer)
    return Capture(
        point.name, layers, found.every, heads,
        rows(message.positions, f"{field}.positions", prompt_length, computed),
        keys if isinstance(reduction, captures.SumKeys) else merged(keys), elements, reduction, message.dtype or "F32",
        after_edits=message.after_edits,
    )  # fmt: skip


def _autoencoder(message: v1.Capture, field: str, drawer: Drawer) -> captures.Sae | None:
    """The autoencoder that a capture names."""
    if not message.HasField("features"):
        return None
    kept = drawer.find(message.features.sae, f"{field}.features.sae")
    if kept.sae is None:
        raise InvalidField(f"{field}.features.sae", message.features.sae, "is no sparse autoencoder")
    return kept.sae


def _features(
    message: v1.Capture, field: str, point: Point, sae: captures.Sae, config: ModelConfig
) -> captures.Features:
    place, (d_in, d_sae) = f"{field}.features", sae.w_enc.shape
    for name in ("heads", "elements"):
        if message.HasField(name):
            raise InvalidField(f"{field}.{name}", "set", "must not be set with features, which read all of a row")
    width = 0 if point.keyed else math.prod(size_of(config, axis) for axis in point.axes[1:])
    if width != d_in:
        raise InvalidField(f"{place}.sae", f"reads {d_in} numbers", f"{point.name} has {width}")
    if not 1 <= message.features.top_k <= d_sae:
        raise InvalidField(f"{place}.top_k", message.features.top_k, f"must be in [1, {d_sae}]")
    return captures.Features(sae, message.features.top_k)


def layers_of(message: v1.Capture | edit_pb2.Edit, found: Found, config: ModelConfig, field: str) -> tuple[int, ...]:
    """The layers meant by a point's name and the field `layers`."""
    if message.HasField("layers"):
        if not found.every:
            raise InvalidField(f"{field}.layers", _shown(message.layers), 'is for points with "*" in place of a layer')
        return indices(message.layers, config.n_layers, f"{field}.layers", "layers")
    if not found.point.layered:
        return ()
    return tuple(range(config.n_layers)) if found.layer is None else (found.layer,)


def _reduction(message: v1.Capture, field: str, point: Point, width: int, drawer: Drawer) -> Reduction | None:
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
            return captures.Project(_projected(message.project, width, place, drawer))
        case "sum_keys":
            return captures.SumKeys()
        case "head_summary":
            return captures.HeadSummary()
    raise AssertionError(kind)


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


def vectors(data: bytes, width: int, field: str) -> Floats:
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


def _projected(message: v1.Project, width: int, place: str, drawer: Drawer) -> Floats:
    """The vectors [n, width] that a projection names or brings."""
    if not message.HasField("stored"):
        return vectors(message.vectors, width, f"{place}.vectors")
    if message.vectors:
        raise InvalidField(f"{place}.vectors", f"{len(message.vectors)} bytes", "must not be set beside stored")
    found = drawer.values(message.stored, f"{place}.stored")
    if found.shape[-1:] != (width,) or not 1 <= found.size // width <= MAX_VECTORS:
        rule = f"must be 1 to {MAX_VECTORS} vectors of {width} numbers"
        raise InvalidField(f"{place}.stored", f"a tensor {list(found.shape)}", rule)
    return found.reshape(-1, width)


def lens_of(
    message: v1.Lens, place: str, config: ModelConfig, drawer: Drawer, at: tuple[str, tuple[int, ...]]
) -> captures.Lens:
    """Check a lens `at` a point and layers."""
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
    translators: tuple[captures.Translator | None, ...] = ()
    if message.translators:
        kept = drawer.find(message.translators, f"{place}.translators")
        translators = tuple(translator(kept, layer, f"{place}.translators", config) for layer in _read_by(*at, place))
    return captures.Lens(message.top_k, tuple(message.token_ids), translators)


def _read_by(name: str, layers: tuple[int, ...], place: str) -> tuple[int, ...]:
    """The layers that read the residuals at a point: translators are numbered by these."""
    if name == RESIDUALS[1]:
        raise InvalidField(f"{place}.translators", name, f"are for {RESIDUALS[0]} and {RESIDUALS[2]}")
    return tuple(layer + (name == RESIDUALS[2]) for layer in layers)


def translator(kept: Kept, layer: int, field: str, config: ModelConfig) -> captures.Translator | None:
    """What a tuned lens does to what `layer` reads; None: past the last layer it does nothing.

    Raises:
        InvalidField: the file is no tuned lens of this model.
    """
    if layer == config.n_layers:
        return None
    if kept.kind is not Kind.TUNED_LENS:
        raise InvalidField(field, kept.id, "is no tuned lens: its tensors must be 0.weight, 0.bias, 1.weight, ...")
    made = captures.Translator(kept.tensor(f"{layer}.weight", field), kept.tensor(f"{layer}.bias", field))
    d = config.d_model
    if made.weight.shape != (d, d) or made.bias.shape != (d,):
        shapes = f"{list(made.weight.shape)} and {list(made.bias.shape)}"
        raise InvalidField(field, f"{layer}.weight and {layer}.bias of {shapes}", f"must be [{d}, {d}] and [{d}]")
    return made


def _shown(message: v1.Indices) -> list[int]:
    return list(message.list)[:16]

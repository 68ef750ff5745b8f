"""Edits as the wire has them, made into what the engine obeys. Every rule about them is here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from cutaway.v1 import edit_pb2 as v1

from cutaway_server import edits
from cutaway_server.architecture import ModelConfig
from cutaway_server.edits import NO_EDITS, Change, Edit, Edits, Floats, KnockOut
from cutaway_server.errors import InvalidField
from cutaway_server.positions import Rows
from cutaway_server.probe.points import Point, find, size_of
from cutaway_server.service.capturing import HEADS, layers_of
from cutaway_server.service.selecting import indices, merged, rows, spans_of
from cutaway_server.service.shelf import EMPTY, Drawer, flattened

MAX_EDITS = 16
MAX_DIRECTIONS = 64
MAX_FACTOR = 1e6
SMALLEST = 1e-6  # a direction's part that the others do not have, of its length


def edits_of(
    messages: Iterable[v1.Edit], config: ModelConfig, prompt_length: int, max_tokens: int, drawer: Drawer = EMPTY
) -> Edits:
    """Check the edits of a request; `drawer` has the files that they may name.

    Raises:
        InvalidField: one breaks a rule: field, value and rule are named.
    """
    listed = list(messages)
    if not listed:
        return NO_EDITS
    if len(listed) > MAX_EDITS:
        raise InvalidField("edits", f"{len(listed)} entries", f"at most {MAX_EDITS} are allowed")
    computed = prompt_length + max(0, max_tokens - 1)
    changed: list[Edit] = []
    knocked: list[KnockOut] = []
    overrides: dict[int, int] = {}
    salt = blake2b(digest_size=16)
    for i, message in enumerate(listed):
        field, kind = f"edits[{i}]", message.WhichOneof("change")
        if kind is None:
            raise InvalidField(field, None, "must say what to change: add, scale, zero, set, project_out, ...")
        if kind == "override":
            _override(message, field, config, max_tokens, overrides)
            continue
        if kind == "knock_out":
            knocked.append(_knock_out(message, field, config, prompt_length, computed))
            where: tuple[Rows, object] = (knocked[-1].rows, ())
        else:
            made = _edits(message, field, config, drawer, prompt_length, computed)
            changed += made
            where = (made[-1].rows, made[-1].change.places if isinstance(made[-1].change, edits.Set) else ())
            if named := _named(message):
                salt.update(drawer.salt(named))
        salt.update(_fingerprint(message, *where))
    _check_keys_left(knocked, config, computed)
    return Edits(tuple(changed), tuple(knocked), tuple(sorted(overrides.items())), salt.digest())


def _fingerprint(message: v1.Edit, selected: Rows, places: object) -> bytes:
    """What tells an edit from others: what it does, and to which positions, for "prompt" is not the same in any two."""
    said = v1.Edit()
    said.CopyFrom(message)
    said.ClearField("positions")
    rows_told = repr((selected.ranges, sorted(selected.listed), places)).encode()
    data = said.SerializeToString(deterministic=True)
    return b"%d %d " % (len(data), len(rows_told)) + data + rows_told


def _named(message: v1.Edit) -> str:
    """The stored file that an edit names; "": none."""
    change = getattr(message, message.WhichOneof("change") or "")
    for field in ("stored", "run"):
        if field in change.DESCRIPTOR.fields_by_name and change.HasField(field):
            return str(getattr(change, field).id)
    return ""


def _edits(
    message: v1.Edit, field: str, config: ModelConfig, drawer: Drawer, prompt_length: int, computed: int
) -> list[Edit]:
    """What a message changes: from a run, each layer by itself, for its values are its own."""
    found = find(config, message.point, f"{field}.point")
    point = found.point
    if not point.writable:
        raise InvalidField(f"{field}.point", message.point, f"{point.name} can be read only")
    heads = elements = None
    axis = next((axis for axis in point.axes if axis in HEADS), None)
    if message.HasField("heads"):
        if axis is None:
            raise InvalidField(f"{field}.heads", list(message.heads.list)[:16], f"{point.name} has no heads")
        heads = indices(message.heads, size_of(config, axis), f"{field}.heads", f"{axis}s")
    last = point.axes[-1]
    if message.HasField("elements"):
        elements = indices(message.elements, size_of(config, last), f"{field}.elements", f"places along {last}")
    where = rows(message.positions, f"{field}.positions", prompt_length, computed)
    n_heads = 1 if axis is None else len(heads) if heads is not None else size_of(config, axis)
    width = len(elements) if elements is not None else size_of(config, last)
    place = _Place(point, where, computed, n_heads, width, drawer)
    layers = layers_of(message, found, config, field)
    if message.set.HasField("run"):
        own = {layer: _from_run(message.set, field, place, layer, (heads, elements)) for layer in layers}
        return [Edit(point.name, (layer,), change, heads, where, elements) for layer, change in own.items()]
    return [Edit(point.name, layers, _change(message, field, place), heads, where, elements)]


def _from_run(
    message: v1.Set, field: str, place: _Place, layer: int, selected: tuple[tuple[int, ...] | None, ...]
) -> edits.Set:
    """The values of a run at a layer's point, of the heads and elements selected."""
    if message.values or message.HasField("stored"):
        raise InvalidField(f"{field}.set", "values or stored", "must not be set beside run")
    heads, elements = selected
    kept = place.drawer.find(message.run.id, f"{field}.set.run.id")
    places = tuple(place.where.within(0, place.computed))
    taken = tuple(message.run.positions) or places
    if len(taken) != len(places):
        rule = f"must be as many as the {len(places)} rows selected"
        raise InvalidField(f"{field}.set.run.positions", f"{len(taken)} positions", rule)
    rows = kept.rows(place.point.name.replace("{i}", str(layer)), taken, f"{field}.set.run")
    headed = rows if rows.ndim == 3 else rows[:, None]
    headed = headed if heads is None else headed[:, list(heads)]
    return edits.Set(np.ascontiguousarray(headed if elements is None else headed[..., list(elements)]), places)


@dataclass(frozen=True, slots=True)
class _Place:
    """What an edit changes: a point, rows of those before `computed`, so many heads of so many numbers."""

    point: Point
    where: Rows
    computed: int
    n_heads: int
    width: int
    drawer: Drawer

    def numbers(self, message: v1.Add | v1.Set | v1.ProjectOut | v1.Clamp, name: str, field: str) -> Floats:
        """Numbers that come with an edit as bytes called `name`, or that it names as a stored tensor."""
        given: bytes = getattr(message, name)
        if not message.HasField("stored"):
            return numbers(given, f"{field}.{name}")
        if given:
            raise InvalidField(f"{field}.{name}", f"{len(given)} bytes", "must not be set beside stored")
        return flattened(self.drawer.values(message.stored, f"{field}.stored"))


def _change(message: v1.Edit, field: str, place: _Place) -> Change:
    kind = message.WhichOneof("change")
    named, width, n_heads = f"{field}.{kind}", place.width, place.n_heads
    match kind:
        case "add":
            vector = place.numbers(message.add, "vector", named)
            if len(vector) not in (width, n_heads * width):
                rule = _shape(place.point, width, n_heads)
                raise InvalidField(f"{named}.vector", f"{len(vector)} numbers", rule)
            scale = _finite(message.add.scale, f"{named}.scale") if message.add.HasField("scale") else 1.0
            return edits.Add(vector.reshape(-1, width) * np.float32(scale))
        case "scale":
            return edits.Scale(_finite(message.scale.factor, f"{named}.factor"))
        case "zero":
            return edits.Scale(0.0)
        case "set":
            return _set(message.set, named, place)
        case "project_out":
            directions = place.numbers(message.project_out, "directions", named)
            return edits.ProjectOut(_basis(directions, f"{named}.directions", width))
    return _clamp(message.clamp, named, place)


def _shape(point: Point, width: int, n_heads: int) -> str:
    one = f"{point.name} takes {width} numbers"
    return one if n_heads == 1 else f"{one} for all heads alike, or {n_heads} times as many"


def _set(message: v1.Set, named: str, place: _Place) -> edits.Set:
    values, n_heads, width = place.numbers(message, "values", named), place.n_heads, place.width
    if len(values) in (width, n_heads * width):
        return edits.Set(values.reshape(1, -1, width), ())
    places = tuple(place.where.within(0, place.computed))
    if len(values) == len(places) * n_heads * width:
        return edits.Set(values.reshape(len(places), n_heads, width), places)
    rule = f"{_shape(place.point, width, n_heads)}, or so many for each of the {len(places)} rows selected"
    raise InvalidField(f"{named}.values", f"{len(values)} numbers", rule)


def _basis(directions: Floats, field: str, width: int) -> Floats:
    """Orthonormal vectors [n, width] that span the directions."""
    if len(directions) % width or not 1 <= len(directions) // width <= MAX_DIRECTIONS:
        rule = f"must be 1 to {MAX_DIRECTIONS} vectors of {width} numbers"
        raise InvalidField(field, f"{len(directions)} numbers", rule)
    vectors = directions.reshape(-1, width).astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1)
    if not lengths.all():
        raise InvalidField(field, "a vector of zeros", "has no direction")
    _, sizes, basis = np.linalg.svd(vectors / lengths[:, None], full_matrices=False)
    return np.ascontiguousarray(basis[sizes > SMALLEST * sizes[0]], np.float32)


def _clamp(message: v1.Clamp, named: str, place: _Place) -> edits.Clamp:
    direction = place.numbers(message, "direction", named)
    if len(direction) != place.width:
        raise InvalidField(f"{named}.direction", f"{len(direction)} numbers", f"must be {place.width}")
    length = np.linalg.norm(direction.astype(np.float64))
    if not length:
        raise InvalidField(f"{named}.direction", "a vector of zeros", "has no direction")
    least = _finite(message.min, f"{named}.min") if message.HasField("min") else -math.inf
    most = _finite(message.max, f"{named}.max") if message.HasField("max") else math.inf
    if least > most or (least, most) == (-math.inf, math.inf):
        raise InvalidField(named, f"min {least:g}, max {most:g}", "one must be set, and min must not be above max")
    return edits.Clamp((direction / length).astype(np.float32), least, most)


def _knock_out(message: v1.Edit, field: str, config: ModelConfig, prompt_length: int, computed: int) -> KnockOut:
    if message.point or message.HasField("elements"):
        raise InvalidField(f"{field}.point", message.point, "point and elements must not be set with knock_out")
    layers, heads = tuple(range(config.n_layers)), None
    if message.HasField("layers"):
        layers = indices(message.layers, config.n_layers, f"{field}.layers", "layers")
    if message.HasField("heads"):
        heads = indices(message.heads, config.n_heads, f"{field}.heads", "heads")
    keys = merged(spans_of(message.knock_out.keys, f"{field}.knock_out.keys"))
    if not keys:
        raise InvalidField(f"{field}.knock_out.keys", "no keys", "must name at least one span")
    factor = _finite(message.knock_out.factor, f"{field}.knock_out.factor")
    if not 0.0 <= factor <= MAX_FACTOR:
        raise InvalidField(f"{field}.knock_out.factor", factor, f"must be in [0, {MAX_FACTOR:g}]")
    where = rows(message.positions, f"{field}.positions", prompt_length, computed)
    return KnockOut(layers, keys, factor, heads, where)


def _check_keys_left(knocked: list[KnockOut], config: ModelConfig, computed: int) -> None:
    """Refuse knock-outs that together leave a query without any key."""
    gone = [each for each in knocked if each.factor == 0.0]
    checked = set()
    for layer in range(config.n_layers):
        for head in range(config.n_heads):
            here = tuple(
                i for i, e in enumerate(gone) if layer in e.layers and (e.heads is None or head in e.heads)
            )  # fmt: skip
            window = config.layers[layer].window
            if here and (here, window) not in checked:
                checked.add((here, window))
                _check_queries([gone[i] for i in here], window, computed, layer, head)


def _check_queries(gone: list[KnockOut], window: int | None, computed: int, layer: int, head: int) -> None:
    marked = [set(each.rows.within(0, computed)) for each in gone]
    for query in sorted(set().union(*marked)):
        first = 0 if window is None else max(0, query - window + 1)
        covered = merged(
            tuple(span for each, at in zip(gone, marked, strict=True) if query in at for span in each.keys)
        )
        if any(start <= first and query < stop for start, stop in covered):
            rule = f"query {query} would have no key left in layer {layer}, head {head}"
            raise InvalidField("edits", f"knock_out of keys {first} to {query}", rule)


def _override(message: v1.Edit, field: str, config: ModelConfig, max_tokens: int, known: dict[int, int]) -> None:
    step, token = message.override.step, message.override.token_id
    for name in ("layers", "heads", "positions", "elements"):
        if message.HasField(name):
            raise InvalidField(f"{field}.{name}", "set", "must not be set with override")
    if message.point:
        raise InvalidField(f"{field}.point", message.point, "must not be set with override")
    if step >= max_tokens:
        raise InvalidField(f"{field}.override.step", step, f"there are steps 0 to {max_tokens - 1}")
    if step in known:
        raise InvalidField(f"{field}.override.step", step, "is overridden twice")
    if token >= config.d_vocab:
        raise InvalidField(f"{field}.override.token_id", token, f"token ids are in [0, {config.d_vocab})")
    known[step] = token


def numbers(data: bytes, field: str) -> Floats:
    """fp32 numbers from their bytes.

    Raises:
        InvalidField: there are none, a number is cut, or one is not finite.
    """
    if not data or len(data) % 4:
        raise InvalidField(field, f"{len(data)} bytes", "must be little-endian F32 numbers, 4 bytes each")
    found = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(found).all():
        raise InvalidField(field, "a number that is not finite", "every number must be finite")
    return found


def _finite(value: float, field: str) -> float:
    if not math.isfinite(value):
        raise InvalidField(field, value, "must be finite")
    return value

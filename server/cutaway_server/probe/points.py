"""The points of a model: every inner value that has a name, in the order they are computed.

Names and meaning are TransformerLens's, with weights as they are (nothing folded or centred). The batch axis is
dropped. What differs from it is said in a point's description.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum

from cutaway_server.architecture import ModelConfig
from cutaway_server.errors import InvalidField

NEAREST = 3  # names told beside an unknown one


class Cost(Enum):
    """What reading a point adds to a step."""

    COPY = "copy"
    OPEN = "open"
    CONTEXT = "context"
    MATRIX = "matrix"


@dataclass(frozen=True, slots=True)
class Point:
    """An inner value. `axes` are outermost first; `name` has {i} for the layer where every layer has one."""

    name: str
    axes: tuple[str, ...]
    cost: Cost
    description: str
    writable: bool = False
    exists: Callable[[ModelConfig], bool] = lambda _: True

    @property
    def layered(self) -> bool:
        """Whether each layer has one."""
        return "{i}" in self.name

    @property
    def keyed(self) -> bool:
        """Whether it has a value for each query and key."""
        return "k_pos" in self.axes

    @property
    def short(self) -> str:
        """Its last word, which with the layer's number is an alias: resid_post.10."""
        return self.name.rpartition(".")[2].removeprefix("hook_")


RESID, HEADS, KV = ("pos", "d_model"), ("pos", "head", "d_head"), ("pos", "kv_head", "d_head")
PATTERN, MLP = ("head", "q_pos", "k_pos"), ("pos", "d_mlp")
A, M = "blocks.{i}.attn.", "blocks.{i}.mlp."


def _norms(name: str, what: str, exists: Callable[[ModelConfig], bool], cost: Cost = Cost.OPEN) -> tuple[Point, ...]:
    normalized = "the input over its scale: before the gain (RMSNorm), or after gain and bias (LayerNorm)"
    return (
        Point(f"{name}.hook_scale", ("pos", "one"), cost, f"{what}: what its input is divided by", exists=exists),
        Point(f"{name}.hook_normalized", RESID, cost, f"{what}: {normalized}", exists=exists),
    )


POINTS: tuple[Point, ...] = (
    Point("hook_embed", RESID, Cost.COPY, "token embeddings, scaled as the family does"),
    Point(
        "hook_pos_embed", RESID, Cost.COPY, "learned position embeddings",
        exists=lambda config: config.learned_positions,
    ),
    Point("blocks.{i}.hook_resid_pre", RESID, Cost.COPY, "the residual stream that the block reads", writable=True),
    *_norms("blocks.{i}.ln1", "the norm before attention", lambda config: config.pre_norm),
    Point(A + "hook_q", HEADS, Cost.OPEN, "queries before QK-norm and rotation", writable=True),
    Point(A + "hook_k", KV, Cost.OPEN, "keys before QK-norm and rotation", writable=True),
    Point(A + "hook_v", KV, Cost.OPEN, "values", writable=True),
    Point(A + "hook_rot_q", HEADS, Cost.COPY, "queries after QK-norm and rotation", writable=True),
    Point(A + "hook_rot_k", KV, Cost.OPEN, "keys after QK-norm and rotation, as the cache has them", writable=True),
    Point(
        A + "hook_attn_scores", PATTERN, Cost.CONTEXT,
        "scaled and soft-capped scores, whose softmax is the pattern; -inf where a key is hidden",
    ),
    Point(A + "hook_lse", ("pos", "head"), Cost.COPY, "log-sum-exp of the scores of each query"),
    Point(A + "hook_pattern", PATTERN, Cost.CONTEXT, "attention probabilities; 0 where a key is hidden"),
    Point(A + "hook_z", HEADS, Cost.COPY, "each head's weighted sum of values", writable=True),
    Point(
        A + "hook_result", ("pos", "head", "d_model"), Cost.MATRIX,
        "z through W_O, head by head, before the bias and a norm after attention",
    ),
    *_norms("blocks.{i}.ln1_post", "the norm of what attention adds", lambda config: config.post_norm),
    Point("blocks.{i}.hook_attn_out", RESID, Cost.OPEN, "what attention adds to the residual stream", writable=True),
    Point("blocks.{i}.hook_resid_mid", RESID, Cost.COPY, "the residual stream after attention", writable=True),
    *_norms("blocks.{i}.ln2", "the norm before the MLP", lambda config: config.pre_norm),
    Point(M + "hook_pre", MLP, Cost.OPEN, "what the activation function takes (the gate, where there is one)", True),
    Point(
        M + "hook_pre_linear", MLP, Cost.OPEN, "what multiplies the activated gate", True, lambda config: config.gated
    ),
    Point(M + "hook_post", MLP, Cost.COPY, "the neurons: what the MLP's last matrix takes", writable=True),
    *_norms("blocks.{i}.ln2_post", "the norm of what the MLP adds", lambda config: config.post_norm),
    Point("blocks.{i}.hook_mlp_out", RESID, Cost.OPEN, "what the MLP adds to the residual stream", writable=True),
    Point("blocks.{i}.hook_resid_post", RESID, Cost.COPY, "the residual stream after the block", writable=True),
    *_norms("ln_final", "the final norm", lambda _: True, Cost.MATRIX),
    Point("ln_final.hook_out", RESID, Cost.MATRIX, "the final norm's output: after gain and bias"),
    Point("logits", ("pos", "d_vocab"), Cost.MATRIX, "logits, soft-capped as the family does, before sampling rules"),
)  # fmt: skip


def points_of(config: ModelConfig) -> tuple[Point, ...]:
    """The points that a model has."""
    return tuple(point for point in POINTS if point.exists(config))


def size_of(config: ModelConfig, axis: str) -> int:
    """How many places an axis has; 0 for those that grow with the text."""
    sizes = {
        "one": 1, "d_model": config.d_model, "d_head": config.d_head, "head": config.n_heads,
        "kv_head": config.n_kv_heads, "d_mlp": config.d_mlp, "d_vocab": config.d_vocab,
    }  # fmt: skip
    return sizes.get(axis, 0)


def aliases_of(config: ModelConfig, point: Point) -> tuple[str, ...]:
    """The other names of a point."""
    names = []
    short = [other for other in points_of(config) if other.short == point.short]
    if len(short) == 1 and point.short != point.name:
        names.append(f"{point.short}.{{i}}" if point.layered else point.short)
    if point.name == "blocks.{i}.hook_resid_pre":
        names.append("hidden_states.{i}")
    if point.name == A + "hook_pattern":
        names.append("attentions.{i}")
    if point.name == "ln_final.hook_out":
        names.append(f"hidden_states.{config.n_layers}")
    return tuple(names)


@dataclass(frozen=True, slots=True)
class Found:
    """A point that a name means: of one layer, of all ("*"), or of the model (neither)."""

    point: Point
    layer: int | None
    every: bool


def find(config: ModelConfig, name: str, field: str) -> Found:
    """The point that `name` means: canonical or an alias, with a layer's number or "*".

    Raises:
        InvalidField: nothing is called so; the nearest names are told.
    """
    for point in points_of(config):
        for known in (point.name, *aliases_of(config, point)):
            if "{i}" not in known:
                if name == known:
                    return Found(point, None, every=False)
                continue
            match = re.fullmatch(re.escape(known).replace(r"\{i\}", r"(\*|[0-9]{1,9})"), name)
            if match is None:
                continue
            if match[1] == "*":
                return Found(point, None, every=True)
            if int(match[1]) < config.n_layers:
                return Found(point, int(match[1]), every=False)
            if known.startswith("hidden_states"):
                continue  # the last one is another point
            raise InvalidField(field, name, f"the model has layers 0 to {config.n_layers - 1}")
    raise InvalidField(field, name, f"no point is called so; the nearest: {', '.join(nearest(config, name))}")


def nearest(config: ModelConfig, name: str) -> list[str]:
    """The names most like one that is unknown."""
    number = next(iter(re.findall(r"[0-9]+|\*", name)), "0")
    layer = number if number == "*" or int(number) < config.n_layers else "0"
    known = [
        other.replace("{i}", layer)
        for point in points_of(config)
        for other in (point.name, *aliases_of(config, point))
    ]  # fmt: skip
    return get_close_matches(name, known, NEAREST, cutoff=0.0)

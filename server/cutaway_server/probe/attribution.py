"""Direct logit attribution: how much each part of the network adds to a logit, with every norm held at its scale.

A logit before soft-capping is linear in the last residual once the final norm's scale is known, and the residual is a
sum: of the embeddings, and of what each layer's attention and MLP add. So the logit is a sum too, and each part of it
the product of what was added with one direction. Heads and neurons are parts of those parts in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cutaway_server.architecture import ModelConfig
from cutaway_server.kernels.reading import WeightReader, times
from cutaway_server.kernels.weights import Norm

Doubles = NDArray[np.float64]
A, M = "blocks.{i}.attn.", "blocks.{i}.mlp."
EDITED = ("blocks.{i}.hook_attn_out", "blocks.{i}.hook_mlp_out", A + "hook_z", M + "hook_post")


def needed(config: ModelConfig, *, neurons: bool) -> tuple[str, ...]:
    """The points that `attribute` computes with."""
    names = ["hook_embed", *EDITED[:3], "ln_final.hook_scale", "ln_final.hook_out"]
    if config.learned_positions:
        names.append("hook_pos_embed")
    if neurons:
        names.append(EDITED[3])
    if config.post_norm:
        names += ["blocks.{i}.ln1_post.hook_scale", "blocks.{i}.ln2_post.hook_scale"]
    return tuple(names)


@dataclass(frozen=True, slots=True)
class Inner:
    """What one layer's operation adds, as seen from inside: of heads [head, d_head] or neurons [d_mlp]."""

    direction: Tensor
    bias: float  # of its last matrix; goes through a norm after it, too
    norm_bias: float  # of a norm after it


@dataclass(frozen=True, slots=True)
class Directions:
    """What values are multiplied with to find what they add to a logit, but for the norms' scales."""

    token: Doubles  # [d_model]: of the unembedding
    residual: Doubles  # [d_model]: through the final norm's gain
    norm_bias: float
    heads: tuple[Inner, ...]
    neurons: tuple[Inner, ...]  # empty: nobody wants to know


def directions(
    config: ModelConfig, reader: WeightReader, target: int, minus: int | None, *, neurons: bool
) -> Directions:
    """Those of a token's logit, or of the difference of two."""
    rows = reader.outer("unembed", torch.tensor([target] if minus is None else [target, minus]))
    token = rows[0] if minus is None else rows[0] - rows[1]
    residual, bias = _through(config, reader.final_norm, token)
    layers = range(config.n_layers)
    heads = tuple(_heads(config, reader, layer, residual) for layer in layers)
    inner = tuple(_neurons(config, reader, layer, residual) for layer in layers) if neurons else ()
    return Directions(token.double().cpu().numpy(), residual.double().cpu().numpy(), bias, heads, inner)


def _through(config: ModelConfig, norm: Norm | None, direction: Tensor) -> tuple[Tensor, float]:
    """A direction before a norm (but for its scale), and what the norm's bias adds along it."""
    if norm is None:
        return direction, 0.0
    before = norm.gain * direction
    if config.norm == "layer":
        before = before - before.mean()  # LayerNorm takes the mean out of what it reads
    return before, 0.0 if norm.bias is None else float(norm.bias.double() @ direction.double())


def _heads(config: ModelConfig, reader: WeightReader, layer: int, residual: Tensor) -> Inner:
    before, norm_bias = _through(config, reader.norm("norm1_post", layer), residual)
    flat = times(reader, "attention_out", layer, before)
    bias = reader.bias("attention_out", layer)
    return Inner(
        torch.unflatten(flat, 0, (config.n_heads, config.d_head)), 0.0 if bias is None else float(bias @ before),
        norm_bias,
    )  # fmt: skip


def _neurons(config: ModelConfig, reader: WeightReader, layer: int, residual: Tensor) -> Inner:
    before, norm_bias = _through(config, reader.norm("norm2_post", layer), residual)
    bias = reader.bias("mlp_out", layer)
    return Inner(times(reader, "mlp_out", layer, before), 0.0 if bias is None else float(bias @ before), norm_bias)


@dataclass(frozen=True, slots=True)
class Contribution:
    """What a part adds, and the names of its axes."""

    axes: tuple[str, ...]
    values: NDArray[np.float32] | NDArray[np.int32]


def attribute(
    config: ModelConfig, along: Directions, values: Mapping[str, NDArray[np.float32]], top_k: int
) -> dict[str, Contribution]:
    """Every part of the logit at the rows of `values`, which has the points `needed`.

    Values are [pos, ...], or [layer, pos, ...] of layered points.
    """
    scale = values["ln_final.hook_scale"][..., 0].astype(np.float64)  # [pos]

    def adds(name: str) -> Doubles:
        found: Doubles = values[name].astype(np.float64) @ along.residual / scale
        return found

    logit = values["ln_final.hook_out"].astype(np.float64) @ along.token
    parts = {"embed": adds("hook_embed"), "norm_bias": np.full_like(scale, along.norm_bias)}
    if "hook_pos_embed" in values:
        parts["pos_embed"] = adds("hook_pos_embed")
    attn, mlp = adds("blocks.{i}.hook_attn_out"), adds("blocks.{i}.hook_mlp_out")
    told = {
        "logit": logit, **parts, "attn": attn, "mlp": mlp,
        "unexplained": logit - sum(parts.values()) - attn.sum(0) - mlp.sum(0),
    }  # fmt: skip
    made = {name: _told(("pos",) if part.ndim == 1 else ("layer", "pos"), part) for name, part in told.items()}
    by_head = _inside(along.heads, values[A + "hook_z"], _post(values, "ln1_post"), scale, attn)
    made |= {"heads": _told(("layer", "pos", "head"), by_head.parts.sum(-1))}
    made |= {"attn_bias": _told(("layer", "pos"), by_head.bias)}
    made |= {"attn_rest": _told(("layer", "pos"), attn - by_head.bias - by_head.parts.sum((-1, -2)))}
    if along.neurons:
        by_neuron = _inside(along.neurons, values[M + "hook_post"], _post(values, "ln2_post"), scale, mlp)
        made |= _largest(by_neuron, mlp, top_k)
    assert config.n_layers == len(attn)
    return made


@dataclass(frozen=True, slots=True)
class _Inside:
    """What the values inside an operation add [layer, pos, ...], and its biases [layer, pos]."""

    parts: Doubles
    bias: Doubles


def _post(values: Mapping[str, NDArray[np.float32]], norm: str) -> Doubles | None:
    """Scales [layer, pos] of a norm after an operation."""
    found = values.get(f"blocks.{{i}}.{norm}.hook_scale")
    return None if found is None else found[..., 0].astype(np.float64)


def _inside(
    inner: tuple[Inner, ...], values: NDArray[np.float32], post: Doubles | None, scale: Doubles, whole: Doubles
) -> _Inside:
    along = torch.stack([each.direction for each in inner]).double().cpu().numpy()  # [layer, ...]
    through = np.ones_like(whole) if post is None else post
    shape = through.shape + (1,) * (values.ndim - 2)
    parts = values.astype(np.float64) * along[:, None] / (through * scale).reshape(shape)
    bias = np.array([[each.bias] for each in inner]) / (through * scale)
    return _Inside(parts, bias + np.array([[each.norm_bias] for each in inner]) / scale)


def _largest(by_neuron: _Inside, whole: Doubles, top_k: int) -> dict[str, Contribution]:
    """The neurons that add or take most, most first."""
    parts = by_neuron.parts
    order = np.argsort(-np.abs(parts), axis=-1, kind="stable")[..., :top_k]
    top = np.take_along_axis(parts, order, -1)
    axes = ("layer", "pos", "top")
    return {
        "neurons": _told(axes, top),
        "neuron_indices": Contribution(axes, order.astype(np.int32)),
        "mlp_bias": _told(axes[:2], by_neuron.bias),
        "mlp_rest": _told(axes[:2], whole - by_neuron.bias - top.sum(-1)),
    }


def _told(axes: tuple[str, ...], values: Doubles) -> Contribution:
    return Contribution(axes, values.astype(np.float32))

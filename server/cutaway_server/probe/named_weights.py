"""The weights by the names and in the layout that TransformerLens gives them, read a selection at a time.

Nothing is folded or centred, and nothing repeated: keys' and values' weights have an axis `kv_head`. Gains of Gemma are
what values are multiplied by (1 + what its checkpoints hold), as in TransformerLens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

import torch
from torch import Tensor

from cutaway_server.architecture import ModelConfig
from cutaway_server.errors import InvalidField
from cutaway_server.kernels.reading import LayerMatrix, LayerNorm, WeightReader
from cutaway_server.kernels.weights import Norm

NEAREST = 3  # names told beside an unknown one
MAX_NAME = 128


@dataclass(frozen=True, slots=True)
class Source:
    """Where a selection is read: `picks` are the places of each axis."""

    config: ModelConfig
    reader: WeightReader
    layer: int
    picks: tuple[Tensor, ...]


Read = Callable[[Source], Tensor]


@dataclass(frozen=True, slots=True)
class Named:
    """A weight. `name` has {i} where every layer has one."""

    name: str
    axes: tuple[str, ...]
    read: Read
    exists: Callable[[WeightReader], bool] = lambda _: True

    @property
    def layered(self) -> bool:
        """Whether each layer has one."""
        return "{i}" in self.name


def size_of(config: ModelConfig, axis: str) -> int:
    """How many places an axis has."""
    return {
        "d_vocab": config.d_vocab, "d_model": config.d_model, "pos": config.max_context, "head": config.n_heads,
        "kv_head": config.n_kv_heads, "d_head": config.d_head, "d_mlp": config.d_mlp,
        "heads_joined": config.n_heads * config.d_head, "kv_heads_joined": config.n_kv_heads * config.d_head,
    }[axis]  # fmt: skip


def named_weights(config: ModelConfig, reader: WeightReader) -> tuple[Named, ...]:
    """Every weight that a model has."""
    return tuple(
        each for each in (*_outer(), *_attention(config), *_mlp(config), *_norms(config)) if each.exists(reader)
    )


def find(config: ModelConfig, reader: WeightReader, name: str) -> tuple[Named, int | None, bool]:
    """The weight called so, its layer (None: it has none, or all are meant), and whether "*" stood for all.

    Raises:
        InvalidField: nothing is called so; the nearest names are told.
    """
    known = named_weights(config, reader)
    for each in known:
        if not each.layered:
            if name in (each.name, each.name.partition(".")[2] if "embed." in each.name else each.name):
                return each, None, False
            continue
        match = re.fullmatch(re.escape(each.name).replace(r"\{i\}", r"(\*|[0-9]{1,9})"), name)
        if match is not None and match[1] == "*":
            return each, None, True
        if match is not None:
            if int(match[1]) >= config.n_layers:
                raise InvalidField("name", name, f"the model has layers 0 to {config.n_layers - 1}")
            return each, int(match[1]), False
    near = get_close_matches(name[:MAX_NAME], [each.name for each in known], NEAREST, cutoff=0.0)
    raise InvalidField("name", name, f"no weight is called so; the nearest: {', '.join(near)}")


def _outer() -> tuple[Named, ...]:
    def embed(s: Source) -> Tensor:
        return s.reader.outer("embed", s.picks[0])[:, s.picks[1]]

    def unembed(s: Source) -> Tensor:
        return s.reader.outer("unembed", s.picks[1])[:, s.picks[0]].T

    def positions(s: Source) -> Tensor:
        found = s.reader.positions(s.picks[0])
        assert found is not None
        return found[:, s.picks[1]]

    def has_positions(reader: WeightReader) -> bool:
        return reader.positions(torch.tensor([0])) is not None

    return (
        Named("embed.W_E", ("d_vocab", "d_model"), embed),
        Named("pos_embed.W_pos", ("pos", "d_model"), positions, has_positions),
        Named("unembed.W_U", ("d_model", "d_vocab"), unembed),
    )


def _has_bias(name: LayerMatrix) -> Callable[[WeightReader], bool]:
    return lambda reader: reader.bias(name, 0) is not None


def _attention(config: ModelConfig) -> tuple[Named, ...]:
    attn, width = "blocks.{i}.attn.", config.d_head
    q, kv = config.n_heads * width, config.n_kv_heads * width
    made = []
    for letter, axis, first in (("Q", "head", 0), ("K", "kv_head", q), ("V", "kv_head", q + kv)):

        def weight(s: Source, first: int) -> Tensor:
            heads, model, inner = s.picks
            rows = (first + heads[:, None] * width + inner).flatten()
            found = s.reader.rows("qkv", s.layer, rows)[:, model]
            return torch.unflatten(found, 0, (len(heads), len(inner))).transpose(1, 2)

        def bias(s: Source, first: int) -> Tensor:
            heads, inner = s.picks
            return _bias(s, "qkv")[first + heads[:, None] * width + inner]

        made.append(Named(f"{attn}W_{letter}", (axis, "d_model", "d_head"), partial(weight, first=first)))
        made.append(Named(f"{attn}b_{letter}", (axis, "d_head"), partial(bias, first=first), _has_bias("qkv")))

    def output(s: Source) -> Tensor:
        heads, inner, model = s.picks
        columns = (heads[:, None] * width + inner).flatten()
        found = s.reader.rows("attention_out", s.layer, model)[:, columns]
        return torch.unflatten(found.T, 0, (len(heads), len(inner)))

    made.append(Named(f"{attn}W_O", ("head", "d_head", "d_model"), output))
    made.append(
        Named(f"{attn}b_O", ("d_model",), lambda s: _bias(s, "attention_out")[s.picks[0]], _has_bias("attention_out"))
    )
    return tuple(made)


def _mlp(config: ModelConfig) -> tuple[Named, ...]:
    mlp, made = "blocks.{i}.mlp.", []
    parts = (("gate", 0), ("in", config.d_mlp)) if config.gated else (("in", 0),)
    for name, first in parts:

        def weight(s: Source, first: int) -> Tensor:
            model, neurons = s.picks
            return s.reader.rows("mlp_in", s.layer, first + neurons)[:, model].T

        def bias(s: Source, first: int) -> Tensor:
            return _bias(s, "mlp_in")[first + s.picks[0]]

        made.append(Named(f"{mlp}W_{name}", ("d_model", "d_mlp"), partial(weight, first=first)))
        made.append(Named(f"{mlp}b_{name}", ("d_mlp",), partial(bias, first=first), _has_bias("mlp_in")))

    def out(s: Source) -> Tensor:
        neurons, model = s.picks
        return s.reader.rows("mlp_out", s.layer, model)[:, neurons].T

    made.append(Named(f"{mlp}W_out", ("d_mlp", "d_model"), out))
    made.append(Named(f"{mlp}b_out", ("d_model",), lambda s: _bias(s, "mlp_out")[s.picks[0]], _has_bias("mlp_out")))
    return tuple(made)


NORMS: tuple[tuple[str, LayerNorm], ...] = (
    ("ln1", "norm1"), ("ln1_post", "norm1_post"), ("ln2", "norm2"), ("ln2_post", "norm2_post"),
    ("attn.q_norm", "q_norm"), ("attn.k_norm", "k_norm"),
)  # fmt: skip


def _norms(config: ModelConfig) -> tuple[Named, ...]:
    made = []
    for name, kept in NORMS:
        axis = "d_model"
        if kept in ("q_norm", "k_norm"):
            joined = "heads_joined" if kept == "q_norm" else "kv_heads_joined"
            axis = "d_head" if config.qk_norm == "head" else joined
        made += _norm(f"blocks.{{i}}.{name}", axis, partial(_of_layer, kept=kept))
    return (*made, *_norm("ln_final", "d_model", lambda reader, _: reader.final_norm))


def _of_layer(reader: WeightReader, layer: int, kept: LayerNorm) -> Norm | None:
    return reader.norm(kept, layer)


def _norm(name: str, axis: str, of: Callable[[WeightReader, int], Norm | None]) -> list[Named]:
    def gain(s: Source) -> Tensor:
        found = of(s.reader, s.layer)
        assert found is not None
        return found.gain[s.picks[0].to(found.gain.device)]

    def bias(s: Source) -> Tensor:
        found = of(s.reader, s.layer)
        assert found is not None
        assert found.bias is not None
        return found.bias[s.picks[0].to(found.bias.device)]

    def has_bias(reader: WeightReader) -> bool:
        found = of(reader, 0)
        return found is not None and found.bias is not None

    return [
        Named(f"{name}.w", (axis,), gain, lambda reader: of(reader, 0) is not None),
        Named(f"{name}.b", (axis,), bias, has_bias),
    ]


def _bias(s: Source, name: LayerMatrix) -> Tensor:
    found = s.reader.bias(name, s.layer)
    assert found is not None
    return found

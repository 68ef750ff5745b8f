"""What a checkpoint is, whatever its format: a config, where each weight lies, and a reader of rows.

`huggingface.py` and `gguf_file.py` each open a path as a `Checkpoint`; `load_weights` turns one into `Weights`, row by
row from the memory map straight into the target dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from cutaway_server.architecture import ModelConfig
from cutaway_server.errors import ModelError
from cutaway_server.kernels.quantized import Quantized
from cutaway_server.kernels.weights import LayerWeights, Matrix, Norm, Weights
from cutaway_server.model.layout import Layout, Piece, TensorReader, halves_apart
from cutaway_server.model.quantized import read_quantized
from cutaway_server.model.shapes import Shape, part_shapes
from cutaway_server.request import SamplingOptions
from cutaway_server.text.tokenizer import TextModel

CHUNK_BYTES = 16 << 20  # fp32 values read at a time

Progress = Callable[[int, int], None]  # values loaded so far, values in all


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint."""

    config: ModelConfig
    layout: Layout
    reader: TensorReader
    text: TextModel
    eos_token_ids: frozenset[int]
    defaults: SamplingOptions = field(default_factory=SamplingOptions)  # from generation_config
    ignored: frozenset[str] = frozenset()  # tensors known to carry nothing (rotary tables and the like)


def load_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: Progress | None = None, *,
    as_is: bool = False,
) -> Weights:  # fmt: skip
    """Every weight: matrices in `dtype`, norms and biases in fp32.

    `as_is` keeps matrices quantised that the checkpoint has so, in a type that is served.

    Raises:
        ModelError: names tensors that are missing, unexpected, of another shape, or too large for `dtype`.
    """
    _check_names(checkpoint)
    shapes = {path: _shape(checkpoint, path) for path in checkpoint.layout}
    total, done = sum(prod(shape) for shape in shapes.values()), 0

    def advance(values: int) -> None:
        nonlocal done
        done += values
        if progress is not None:
            progress(done, total)

    tensors: dict[str, Matrix] = {}
    for path, shape in shapes.items():
        if as_is and (quantized := read_quantized(path, checkpoint.layout[path], checkpoint.reader)) is not None:
            tensors[path] = quantized
            advance(prod(shape))
            continue
        kept = dtype if len(shape) > 1 else torch.float32
        plain = torch.empty(shape, dtype=kept, device=device)
        _fill(plain, checkpoint.layout[path], checkpoint.reader, advance)
        tensors[path] = plain
    return _assemble(checkpoint.config, tensors)


def _check_names(checkpoint: Checkpoint) -> None:
    present = checkpoint.reader.names()
    wanted = {piece.name for pieces in checkpoint.layout.values() for piece in pieces}
    if missing := sorted(wanted - present):
        raise ModelError(f"the checkpoint lacks {_listed(missing)}")
    if unexpected := sorted(present - wanted - checkpoint.ignored):
        raise ModelError(f"the checkpoint has tensors that no part of this model takes: {_listed(unexpected)}")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _shape(checkpoint: Checkpoint, path: str) -> Shape:
    """The shape at `path`, once its pieces are found to have theirs."""
    pieces, parts = checkpoint.layout[path], part_shapes(checkpoint.config, path)
    whole = (sum(part[0] for part in parts), *parts[0][1:])
    assert len(pieces) in (1, len(parts)), path
    for piece, part in zip(pieces, parts if len(pieces) > 1 else (whole,), strict=True):
        expected = part[::-1] if piece.transpose else part
        found = tuple(checkpoint.reader.shape(piece.name))
        if found != expected:
            raise ModelError(f"tensor {piece.name} has shape {list(found)}; the config asks for {list(expected)}")
    return whole


def _fill(target: Tensor, pieces: tuple[Piece, ...], reader: TensorReader, advance: Callable[[int], None]) -> None:
    """Copy pieces one below the other into `target`."""
    offset = 0
    for piece in pieces:
        shape = reader.shape(piece.name)
        height = shape[1] if piece.transpose else shape[0]
        _copy(target[offset : offset + height], piece, reader, advance)
        offset += height


def _copy(target: Tensor, piece: Piece, reader: TensorReader, advance: Callable[[int], None]) -> None:
    """Copy one piece in chunks of whole heads, converting on the way."""
    shape = reader.shape(piece.name)
    unit = piece.head_width or 1
    step = unit * max(1, CHUNK_BYTES // (4 * prod(shape[1:]) * unit))
    for start in range(0, shape[0], step):
        rows = reader.rows(piece.name, start, min(start + step, shape[0]))
        into = target[:, start : start + step] if piece.transpose else target[start : start + step]
        if piece.head_width is not None:
            rows = halves_apart(rows, piece.head_width)
        if piece.add:
            rows = rows.float() + piece.add
        into.copy_(rows.t() if piece.transpose else rows)
        if target.dtype == torch.float16 and not into.isfinite().all():
            raise ModelError(f"tensor {piece.name} has values that float16 cannot hold; serve it in another dtype")
        advance(rows.numel())


def _assemble(config: ModelConfig, tensors: Mapping[str, Matrix]) -> Weights:
    embed = _required(tensors, "embed")
    final_norm = _norm(tensors, "final_norm")
    assert final_norm is not None, "the layout has no final norm"
    return Weights(
        embed=embed,
        layers=tuple(_layer(tensors, f"layers.{layer}") for layer in range(config.n_layers)),
        final_norm=final_norm,
        unembed=tensors.get("unembed", embed),
        positions=_plain(tensors, "positions") if config.learned_positions else None,
    )


def _layer(tensors: Mapping[str, Matrix], path: str) -> LayerWeights:
    return LayerWeights(
        qkv=_required(tensors, f"{path}.qkv"),
        attention_out=_required(tensors, f"{path}.attention_out"),
        mlp_in=_required(tensors, f"{path}.mlp_in"),
        mlp_out=_required(tensors, f"{path}.mlp_out"),
        qkv_bias=_plain(tensors, f"{path}.qkv_bias"),
        attention_out_bias=_plain(tensors, f"{path}.attention_out_bias"),
        mlp_in_bias=_plain(tensors, f"{path}.mlp_in_bias"),
        mlp_out_bias=_plain(tensors, f"{path}.mlp_out_bias"),
        norm1=_norm(tensors, f"{path}.norm1"),
        norm1_post=_norm(tensors, f"{path}.norm1_post"),
        norm2=_norm(tensors, f"{path}.norm2"),
        norm2_post=_norm(tensors, f"{path}.norm2_post"),
        q_norm=_norm(tensors, f"{path}.q_norm"),
        k_norm=_norm(tensors, f"{path}.k_norm"),
    )


def _norm(tensors: Mapping[str, Matrix], path: str) -> Norm | None:
    gain = _plain(tensors, f"{path}.gain")
    return None if gain is None else Norm(gain, _plain(tensors, f"{path}.bias"))


def _plain(tensors: Mapping[str, Matrix], path: str) -> Tensor | None:
    """What is never kept quantised."""
    tensor = tensors.get(path)
    assert not isinstance(tensor, Quantized), path
    return tensor


def _required(tensors: Mapping[str, Matrix], path: str) -> Matrix:
    assert path in tensors, f"the layout has nothing for {path}"
    return tensors[path]

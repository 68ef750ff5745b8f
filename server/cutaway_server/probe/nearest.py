"""Which tokens a vector of the residual stream is about."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from cutaway_server.architecture import ModelConfig
from cutaway_server.kernels.reading import WeightReader
from cutaway_server.kernels.weights import Norm

ROWS_AT_ONCE = 8192  # of the vocabulary


class Measure(Enum):
    """How tokens are compared with a vector."""

    LOGIT = "logit"
    UNEMBED_COSINE = "unembed cosine"
    EMBED_COSINE = "embed cosine"


def scores(config: ModelConfig, reader: WeightReader, vector: Tensor, measure: Measure) -> Tensor:
    """The score of every token [d_vocab], fp32: see the wire's Measure."""
    if measure is Measure.LOGIT:
        vector = gained(config, reader.final_norm, vector)
    found = []
    for start in range(0, config.d_vocab, ROWS_AT_ONCE):
        tokens = torch.arange(start, min(start + ROWS_AT_ONCE, config.d_vocab))
        rows = reader.outer("embed" if measure is Measure.EMBED_COSINE else "unembed", tokens)
        product = rows @ vector.to(rows.device)
        if measure is not Measure.LOGIT:
            product = torch.where(product == 0, product, product / (rows.norm(dim=-1) * vector.norm()))
        found.append(product)
    return torch.cat(found).cpu()


def gained(config: ModelConfig, norm: Norm | None, vector: Tensor) -> Tensor:
    """A vector through a norm, but for the norm's scale and bias."""
    if norm is None:
        return vector
    vector = vector.to(norm.gain.device)
    if config.norm == "layer":
        vector = vector - vector.mean()
    return vector * norm.gain


def neuron_vector(config: ModelConfig, reader: WeightReader, layer: int, index: int) -> Tensor:
    """What a neuron adds to the residual stream [d_model], for an activation of 1 and a post-norm's scale of 1."""
    column = reader.rows("mlp_out", layer, torch.arange(config.d_model))[:, index]
    return gained(config, reader.norm("norm2_post", layer), column)

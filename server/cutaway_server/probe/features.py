"""What a sparse autoencoder makes of some rows: its most active features. A row's do not depend on other rows.

Computed in fp32, as SAELens computes autoencoders whose dtype is float32.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cutaway_server.captures import Sae
from cutaway_server.kernels.linear import linear

ACTIVATIONS_AT_ONCE = 2**24  # of all features of some rows: 64 MiB
EPSILON = 1e-5  # added to the deviation, by "layer_norm"
NONE = -1


def features(sae: Sae, top_k: int, rows: Tensor) -> dict[str, Tensor]:
    """Rows fp32 [n, d_in] to "values" and "indices" [n, top_k], most active first, and "active" [n], their number."""
    step = max(1, ACTIVATIONS_AT_ONCE // len(sae.b_enc))
    tiles = [_largest(activations(sae, some), top_k) for some in torch.split(rows, step)]
    return {name: torch.cat([tile[name] for tile in tiles]) for name in tiles[0]}


def activations(sae: Sae, rows: Tensor) -> Tensor:
    """Rows fp32 [n, d_in] to the activations of all features [n, d_sae]."""

    def here(values: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(values).to(rows.device)

    rows = _normalized(sae.normalize, rows)
    if sae.b_in is not None:
        rows = rows - here(sae.b_in)
    product = linear(rows, here(sae.w_enc).T)
    pre = product + here(sae.b_enc)
    match sae.architecture:
        case "gated":
            assert sae.r_mag is not None
            assert sae.b_mag is not None
            magnitudes = product * here(sae.r_mag).exp() + here(sae.b_mag)
            return torch.relu(magnitudes) * (pre > 0)
        case "jumprelu":
            assert sae.threshold is not None
            return torch.relu(pre) * (pre > here(sae.threshold))
        case "topk":
            pre = pre if sae.scales is None else pre * here(sae.scales)
            kept = pre.topk(min(sae.k, pre.shape[-1]), dim=-1)
            return torch.zeros_like(pre).scatter_(-1, kept.indices, kept.values.relu())
    return torch.relu(pre)


def _normalized(how: str, rows: Tensor) -> Tensor:
    if how == "layer_norm":
        rows = rows - rows.mean(-1, keepdim=True)
        return rows / (rows.std(-1, keepdim=True) + EPSILON)
    if how == "constant_norm_rescale":
        coefficients: Tensor = rows.shape[-1] ** 0.5 / rows.norm(dim=-1, keepdim=True)
        return rows * coefficients
    return rows


def _largest(found: Tensor, top_k: int) -> dict[str, Tensor]:
    values, indices = found.topk(min(top_k, found.shape[-1]), dim=-1)
    indices = indices.int().masked_fill(values <= 0, NONE)
    if missing := top_k - values.shape[-1]:
        values = torch.nn.functional.pad(values, (0, missing))
        indices = torch.nn.functional.pad(indices, (0, missing), value=NONE)
    return {"values": values, "indices": indices, "active": (found > 0).sum(-1).int()}

"""What must hold of a transformer's inner values, whatever its weights: tested on captured values.

Each identity compares values that were taken at different points, most of them by different code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cutaway_server.architecture import ModelConfig

Floats = NDArray[np.float32]
Values = Mapping[str, Floats]  # by template, [layers, ...] where there are layers

B = "blocks.{i}."
A, M = B + "attn.", B + "mlp."
NEEDED = (
    "hook_embed", "hook_pos_embed", B + "hook_resid_pre", B + "hook_attn_out", B + "hook_resid_mid",
    B + "hook_mlp_out", B + "hook_resid_post", A + "hook_rot_q", A + "hook_rot_k", A + "hook_v",
    A + "hook_attn_scores", A + "hook_lse", A + "hook_pattern", A + "hook_z", B + "ln1.hook_scale",
    B + "ln1.hook_normalized", "ln_final.hook_scale", "ln_final.hook_normalized", "ln_final.hook_out", "logits",
)  # fmt: skip
# By what pages hold: of what goes through them, or through products in the served dtype.
TOLERANCES = {
    "F32": 2e-5,
    "BF16": 2e-2,
    "F16": 4e-3,
    "I8": 4e-2,
    "F8_E4M3": 1e-1,
}


@dataclass(frozen=True, slots=True)
class Identity:
    """One that was tested. `exact`: both sides must have the same bits."""

    name: str
    description: str
    error: float
    tolerance: float
    exact: bool = False

    @property
    def holds(self) -> bool:
        """Whether the error is one that the dtype may cause."""
        return self.error <= self.tolerance


def identities(config: ModelConfig, values: Values, dtype: str, token: int, logprob: float) -> Iterator[Identity]:
    """Test every identity that the model has.

    Args:
        config: the network.
        values: the points of NEEDED that the model has, of one whole prompt, fp32.
        dtype: what keys and values are stored in.
        token: what was served after the prompt.
        logprob: with which log-probability.
    """
    fp32, stored = TOLERANCES["F32"], TOLERANCES[dtype]
    pre, mid, post = (values[B + f"hook_resid_{place}"] for place in ("pre", "mid", "post"))
    embedded = values["hook_embed"] + values.get("hook_pos_embed", np.float32(0))
    yield _exact("first_residual", "resid_pre of layer 0 = embeddings", pre[0], embedded)
    yield _exact("residual_flows", "resid_pre of a layer = resid_post of the one before", pre[1:], post[:-1])
    yield _exact("attention_is_added", "resid_mid = resid_pre + attn_out", mid, pre + values[B + "hook_attn_out"])
    yield _exact("mlp_is_added", "resid_post = resid_mid + mlp_out", post, mid + values[B + "hook_mlp_out"])
    pattern, scores = values[A + "hook_pattern"], values[A + "hook_attn_scores"]
    yield _near("pattern_sums_to_one", "each query's pattern sums to 1", pattern.sum(-1), np.ones(1), fp32 * 5)
    lse = np.logaddexp.reduce(scores.astype(np.float64), axis=-1)
    theirs = values[A + "hook_lse"].swapaxes(1, 2)
    yield _near("lse_is_of_the_scores", "hook_lse = log-sum-exp of the scores", theirs, lse, fp32 * 5)
    group = config.group
    v = np.repeat(values[A + "hook_v"], group, 2)
    z = np.einsum("lhqk,lkhd->lqhd", pattern, v, optimize=True)
    yield _near("pattern_times_values", "z = pattern @ v", values[A + "hook_z"], z, stored)
    if config.attention_softcap is None:
        yield _scores(config, values, stored)
    yield from _norms(config, values, fp32)
    logits = values["logits"][-1].astype(np.float64)
    mine, best = logits[token] - np.logaddexp.reduce(logits), float(logits.max() - logits[token])
    told = "the token served is the likeliest of the last row's logits, with the log-probability they give it"
    yield Identity("logits_are_served", told, max(abs(mine - logprob), best), fp32)


def _scores(config: ModelConfig, values: Values, tolerance: float) -> Identity:
    keys = np.repeat(values[A + "hook_rot_k"], config.group, 2)
    products = np.einsum("lqhd,lkhd->lhqk", values[A + "hook_rot_q"], keys, optimize=True) * config.scale
    scores = values[A + "hook_attn_scores"]
    seen = np.isfinite(scores)
    mine, theirs = np.where(seen, scores, 0), np.where(seen, products, 0)
    return _near("scores_are_products", "scores = scale x rot_q . rot_k, where a key is seen", mine, theirs, tolerance)


def _norms(config: ModelConfig, values: Values, tolerance: float) -> Iterator[Identity]:
    """What a norm divides by, and that its parts belong together."""
    parts = [("ln_final", "ln_final", values[B + "hook_resid_post"][-1])]
    if config.pre_norm:
        parts.append(("ln1", B + "ln1", values[B + "hook_resid_pre"]))
    for name, point, x in parts:
        wide = x.astype(np.float64)
        if config.norm == "layer":
            wide = wide - wide.mean(-1, keepdims=True)
        scale = np.sqrt((wide**2).mean(-1, keepdims=True) + config.norm_eps)
        told = f"{name}.hook_scale = root of the mean square of its input"
        yield _near(f"{name}_scale", told, values[f"{point}.hook_scale"], scale, tolerance)
        if config.norm == "rms":
            told = f"{name}.hook_normalized = its input / hook_scale"
            yield _near(f"{name}_normalized", told, values[f"{point}.hook_normalized"], wide / scale, tolerance)


def _exact(name: str, description: str, mine: Floats, other: Floats) -> Identity:
    return Identity(name, description, _error(mine, other), 0.0, exact=True)


def _near(name: str, description: str, mine: Floats, other: NDArray[np.floating], tolerance: float) -> Identity:
    return Identity(name, description, _error(mine, other), tolerance)


def _error(mine: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """The largest difference, relative to the largest value of its row where that is above 1; NaN counts as endless."""
    if not mine.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        rows = np.maximum(1.0, np.abs(np.atleast_1d(other)).max(-1, keepdims=True))
        error = float((np.abs(mine.astype(np.float64) - other) / rows).max())
    return error if np.isfinite(error) else float("inf")

"""What to read of a request's inner values: selected, reduced and named, with every field checked already."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cutaway_server.positions import Rows


@dataclass(frozen=True, slots=True)
class TopK:
    """The k largest of each row."""

    k: int


@dataclass(frozen=True, slots=True)
class Pool:
    """A pattern over the prompt as size x size cells."""

    size: int


@dataclass(frozen=True, slots=True)
class Norm:
    """The Euclidean norm over the last axis."""


@dataclass(frozen=True, slots=True, eq=False)
class Project:
    """Scalar products with vectors fp32 [n, last axis]."""

    vectors: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SumKeys:
    """The sum of a pattern over each span of keys."""


@dataclass(frozen=True, slots=True)
class HeadSummary:
    """What a head does, in numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class Translator:
    """What a tuned lens does to one layer's residual h: h + h W^T + b. fp32 [d_model, d_model] and [d_model]."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Lens:
    """A residual through the final norm and the unembedding; through its layer's translator before, if it has one."""

    top_k: int
    token_ids: tuple[int, ...]
    translators: tuple[Translator | None, ...] = ()  # for each layer of the capture; empty: none at all


@dataclass(frozen=True, slots=True, eq=False)
class Sae:
    """The encoder of a sparse autoencoder, all fp32.

    x (less `mean` of its own and divided by its deviation, or brought to the norm sqrt(d_in), by `normalize`) less
    `b_in`, times `w_enc` [d_in, d_sae], plus `b_enc` is h [d_sae]. Features are relu(h); of "jumprelu" where h is above
    `threshold`; of "topk" the `k` largest of h times `scales`; of "gated" relu(h - b_enc, times exp(r_mag), plus b_mag)
    where h is above 0.
    """

    architecture: str
    hook_name: str
    normalize: str  # "none", "layer_norm", "constant_norm_rescale"
    w_enc: NDArray[np.float32]
    b_enc: NDArray[np.float32]
    b_in: NDArray[np.float32] | None = None
    threshold: NDArray[np.float32] | None = None
    k: int = 0
    scales: NDArray[np.float32] | None = None
    r_mag: NDArray[np.float32] | None = None
    b_mag: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Features:
    """The most active features of a sparse autoencoder."""

    sae: Sae
    top_k: int


Reduction = TopK | Pool | Norm | Project | SumKeys | HeadSummary | Lens | Features
Spans = tuple[tuple[int, int], ...]  # [start, stop), ascending, apart

EVERYWHERE = Rows.everywhere()
SUMMARIES = ("entropy", "first", "previous", "induction", "distance")


@dataclass(frozen=True, slots=True)
class Capture:
    """Values of one point. `template` has {i} for the layer; `layers` is empty where it has none."""

    template: str
    layers: tuple[int, ...] = ()
    stacked: bool = False  # asked for with "*": the layers are an axis
    heads: tuple[int, ...] | None = None  # None: all
    rows: Rows = EVERYWHERE
    keys: Spans = ()  # empty: all
    elements: tuple[int, ...] | None = None
    reduction: Reduction | None = None
    dtype: str = "F32"
    after_edits: bool = False  # see the value as edits of the same point leave it

    @property
    def name(self) -> str:
        """The canonical name of what is sent."""
        if not self.layers:
            return self.template
        return self.template.replace("{i}", "*" if self.stacked else str(self.layers[0]))


Places = range | tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One tensor of a capture: `axes` are names and what the places stand for; `data` are its elements on the host."""

    name: str  # "": the value itself
    dtype: str  # as safetensors names it
    axes: tuple[tuple[str, Places], ...]
    data: NDArray[np.generic]


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """What a step computed for capture `number` of a request, of completion `index` (None: of the prompt)."""

    number: int
    name: str
    index: int | None
    step: int
    revisited: int
    parts: tuple[Part, ...]

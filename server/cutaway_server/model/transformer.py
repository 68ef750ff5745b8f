"""The network: one sequence of operations, whatever the family, for a flat batch over a paged KV cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cutaway_server.cache.pages import Pages
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.interface import OpenKernels
from cutaway_server.model.probed import Probe, ProbedStep


class Transformer:
    """A transformer as its config says; `kernels` hold the weights and compute."""

    def __init__(self, kernels: OpenKernels) -> None:
        self.kernels = kernels
        self.config = kernels.config

    @torch.inference_mode()
    def forward(
        self, batch: Batch, pages: Pages, before_layers: Callable[[], None] = lambda: None, probe: Probe | None = None
    ) -> Tensor:
        """Compute a step: stores K and V in `pages`, returns the last residual [R, d_model] of the rows asked for.

        `before_layers` is called when all is prepared and the long computation begins. `probe` looks inside.
        """
        kernels = self.kernels
        plan = kernels.plan(batch)
        if probe is not None:
            return ProbedStep(probe, plan, pages).run(before_layers)[batch.logit_rows]
        residual = kernels.embed(plan)
        before_layers()
        residual = kernels.layers(0, self.config.n_layers, residual, plan, pages)
        return residual[batch.logit_rows]

    @torch.inference_mode()
    def logits(self, residual: Tensor) -> Tensor:
        """Logits fp32 [R, vocab] of last residuals [R, d_model]."""
        return self.kernels.unembed(residual)

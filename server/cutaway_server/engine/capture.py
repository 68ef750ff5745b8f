"""Recording device work once, to replay it with other values in the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
Replay = Callable[[], None]


class Capture(Protocol):
    """Runs work and records it. Replays write the same outputs, which live until the next replay of any recording."""

    def __call__(self, work: Callable[[], T]) -> tuple[T, Replay]:
        """The outputs, already computed, and what computes them anew from what the inputs hold then."""


class CudaCapture:
    """CUDA graphs that share one pool of memory: one launch instead of hundreds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], T]) -> tuple[T, Replay]:
        """Run twice beside the stream (kernels are compiled, libraries take their workspace), record, and replay."""
        aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(aside):
            work()
            work()
        torch.cuda.current_stream(self._device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = work()
        graph.replay()
        return outputs, graph.replay


class EagerCapture:
    """The same without a graph, on any device: work of fixed tensors is run again, and writes the same outputs."""

    def __call__(self, work: Callable[[], T]) -> tuple[T, Replay]:
        """Run, and run again into the outputs of the first time."""
        outputs = work()

        def replay() -> None:
            for old, new in zip(_tensors(outputs), _tensors(work()), strict=True):
                old.copy_(new)

        return outputs, replay


def _tensors(outputs: object) -> list[torch.Tensor]:
    assert isinstance(outputs, tuple)
    return [part for part in outputs if isinstance(part, torch.Tensor)]

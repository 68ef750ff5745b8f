"""`--quantize`: what it asks of a model and a machine, and what became of it."""

from __future__ import annotations

import torch

from cutaway_server.errors import ModelError
from cutaway_server.kernels.cpu import DTYPES
from cutaway_server.kernels.quantized import KINDS
from cutaway_server.kernels.rounding import NO_ROUNDING, ROUNDINGS, Rounding
from cutaway_server.kernels.weights import Weights
from cutaway_server.model.checkpoint import Checkpoint
from cutaway_server.model.quantized import blown_up, formats_of

NONE, AS_IS = "none", "as-is"


def check_quantize(quantize: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what cannot be had.

    Raises:
        ModelError: names the option and what to do.
    """
    if quantize == NONE:
        return
    if device.type != "cpu" or dtype not in DTYPES:
        here = f"{str(dtype).removeprefix('torch.')} on {device.type}"
        raise ModelError(
            f"--quantize {quantize}: is served on a CPU in bfloat16 or float32, not in {here}; give --quantize none"
        )
    reader = checkpoint.reader
    if quantize == AS_IS and not any(reader.format(name) in KINDS for name in reader.names()):
        raise ModelError(
            f"--quantize as-is: no tensor of this checkpoint is quantised in a type that is served so "
            f"({', '.join(KINDS)}, in a GGUF file); --quantize int8 or int4 rounds any checkpoint"
        )


def rounding_of(quantize: str) -> Rounding:
    """What float matrices become."""
    return ROUNDINGS.get(quantize, NO_ROUNDING)


def quantization(quantize: str, checkpoint: Checkpoint, weights: Weights) -> str:
    """What is served, as clients are told: "none", "int8", "int4", "as-is: Q4_1, Q8_0"."""
    if quantize != AS_IS:
        return quantize
    served = ", ".join(name for name, _ in formats_of(weights).most_common())
    others = blown_up(checkpoint.reader, weights)
    return f"as-is: {served}" + (f"; as floats: {', '.join(sorted(others))}" if others else "")

"""PutRun: what a request captures, kept on the shelf in place of being sent."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from cutaway.v1 import inference_pb2

from cutaway_server.architecture import ModelConfig
from cutaway_server.edits import Floats
from cutaway_server.errors import InvalidField
from cutaway_server.probe.points import find
from cutaway_server.service.gathering import Gathered
from cutaway_server.service.shelf import Kept, Kind


def check_kept(request: inference_pb2.GenerateRequest, config: ModelConfig) -> None:
    """Check that what a request captures can be kept.

    Raises:
        InvalidField: it captures nothing, or what is no value of the network itself; or there are several completions.
    """
    if not request.captures:
        raise InvalidField("generate.captures", [], "must name what is to be kept")
    if request.sampling.n > 1:
        raise InvalidField("generate.sampling.n", request.sampling.n, "must be 1")
    for i, capture in enumerate(request.captures):
        field = f"generate.captures[{i}]"
        if (reduction := capture.WhichOneof("reduction")) is not None:
            raise InvalidField(f"{field}.{reduction}", "set", "must not be set: values are kept as they are")
        if capture.dtype not in ("", "F32"):
            raise InvalidField(f"{field}.dtype", capture.dtype, "must be F32")
        for name in ("heads", "elements"):
            if capture.HasField(name):
                raise InvalidField(f"{field}.{name}", "set", "must not be set: whole rows are kept")
        point = find(config, capture.point, f"{field}.point").point
        if point.keyed or not point.writable:
            raise InvalidField(f"{field}.point", capture.point, f"{point.name} cannot be set by an edit")


def run_of(gathered: Gathered, captures: int, name: str) -> Kept:
    """What was captured, each layer by its own name. Its id is a hash of names, positions and values."""
    tensors: dict[str, Floats] = {}
    positions: dict[str, tuple[int, ...]] = {}
    for number in range(captures):
        for point, values in gathered.by_layer(number):
            tensors[point], positions[point] = np.ascontiguousarray(values), gathered.positions(number)
    digest = blake2b(digest_size=16)
    for point, tensor in sorted(tensors.items()):
        digest.update(repr((point, tensor.shape, positions[point])).encode())
        digest.update(tensor.tobytes())
    return Kept(digest.hexdigest(), name, Kind.RUN, tensors, positions=positions)

"""Files put aside on the server, put on the wire and read from it: shared by both clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from cutaway.stored import Sae, StoredFile, StoredFiles
from cutaway.v1 import stored_pb2 as pb

PART_BYTES = 2**20
KINDS = {
    pb.STORED_KIND_VECTORS: "vectors",
    pb.STORED_KIND_TUNED_LENS: "tuned lens",
    pb.STORED_KIND_SAE: "sae",
    pb.STORED_KIND_RUN: "run",
}
SAE_CONFIG, SAE_WEIGHTS = "cfg.json", "sae_weights.safetensors"


def upload(source: object, name: str) -> Iterator[pb.PutVectorsRequest]:
    """The messages that bring a file: a path of one or of an autoencoder's directory, arrays by name, or one array.

    Raises:
        OSError: the file cannot be read.
        ValueError, TypeError: the arrays are none of numbers.
    """
    if isinstance(source, str | Path) and Path(source).is_dir():
        config = (Path(source) / SAE_CONFIG).read_text(encoding="utf-8")
        return _messages(name, _read(open(Path(source) / SAE_WEIGHTS, "rb")), config)
    if isinstance(source, str | Path):
        return _messages(name, _read(open(source, "rb")))
    import numpy as np

    from cutaway.safetensors import encoded

    named = source if isinstance(source, Mapping) else {"vector": source}
    arrays = {key: np.asarray(values, np.float32) for key, values in named.items()}
    return _messages(name, encoded(arrays, {}))


def _messages(name: str, parts: Iterable[bytes], sae_config: str = "") -> Iterator[pb.PutVectorsRequest]:
    yield pb.PutVectorsRequest(header=pb.VectorsHeader(name=name, sae_config=sae_config))
    for data in parts:
        for start in range(0, len(data), PART_BYTES):
            yield pb.PutVectorsRequest(data=data[start : start + PART_BYTES])


def _read(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while data := file.read(PART_BYTES):
            yield data


def stored_file(wire: pb.StoredFile) -> StoredFile:
    """A file as the wire tells it."""
    tensors = {tensor.name: tuple(tensor.shape) for tensor in wire.tensors}
    sae = None
    if wire.HasField("sae"):
        sae = Sae(wire.sae.architecture, wire.sae.hook_name, wire.sae.d_in, wire.sae.d_sae)
    positions = {tensor.name: tuple(tensor.positions) for tensor in wire.tensors if tensor.positions}
    kind = KINDS.get(wire.kind, "unspecified")
    return StoredFile(wire.id, wire.name, kind, wire.bytes, tensors, wire.shared, sae, positions)


def stored_files(wire: pb.ListVectorsResponse) -> StoredFiles:
    """All files."""
    return StoredFiles(tuple(map(stored_file, wire.files)), wire.bytes, wire.max_bytes)

"""Safetensors files that are put aside: read from their bytes, or from where the operator has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

import numpy as np

from cutaway_server.edits import Floats
from cutaway_server.errors import InvalidField, ModelError
from cutaway_server.model.safetensors_header import Entry, entries_of
from cutaway_server.service.sae import CONFIG, WEIGHTS, sae_of
from cutaway_server.service.shelf import Kept, Kind

TRANSLATOR = re.compile(r"\d{1,4}\.(weight|bias)")
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
UPLOADED = Path("the file")
MAX_NAME = 256  # characters of a tensor's name


def read_file(data: bytearray, name: str, sae_config: str = "") -> Kept:
    """A file that a client has sent.

    Raises:
        InvalidField: it is no safetensors file, or holds what is no finite number, or does not fit its config.
    """
    try:
        return _kept(data, name, UPLOADED, sae_config.encode())
    except ModelError as error:
        raise InvalidField("data", f"{len(data)} bytes", str(error)) from None


def load_files(path: Path) -> list[Kept]:
    """The operator's: a safetensors file, an autoencoder's directory, or all those of a directory.

    A file goes by its name without suffix, an autoencoder by its directory's.

    Raises:
        ModelError: one is missing, damaged, or holds what is no finite number; or two have one name.
    """
    places = [path]
    if path.is_dir() and not (path / CONFIG).exists():
        places = sorted([*path.glob("*.safetensors"), *(config.parent for config in path.glob(f"*/{CONFIG}"))])
    if not places:
        raise ModelError(f"--vectors: {path} has no .safetensors file, and no autoencoder's directory")
    found = [_loaded(place) for place in places]
    for kept in found:
        if sum(kept.name == other.name for other in found) > 1:
            raise ModelError(f"--vectors: two in {path} go by the name {kept.name}")
    return found


def _loaded(path: Path) -> Kept:
    try:
        if not path.is_dir():
            return _kept(bytearray(path.read_bytes()), path.stem, path)
        data, config = bytearray((path / WEIGHTS).read_bytes()), (path / CONFIG).read_bytes()
    except OSError as error:
        raise ModelError(f"--vectors: {error.filename} cannot be read ({error.strerror})") from error
    return _kept(data, path.name, path, config)


def _kept(data: bytearray, name: str, path: Path, sae_config: bytes = b"") -> Kept:
    if len(data) < 8:
        raise ModelError(f"{path}: damaged: {len(data)} bytes are no safetensors file")
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise ModelError(f"{path}: damaged: its header claims {length:,} bytes, and it has {len(data):,}")
    entries = entries_of(bytes(data[8 : 8 + length]), path, len(data))
    if not entries:
        raise ModelError(f"{path}: has no tensor")
    if (long := max(map(len, entries))) > MAX_NAME:
        raise ModelError(f"{path}: a tensor's name has {long} characters, and may have {MAX_NAME}")
    tensors = {name: _floats(data, name, entry) for name, entry in entries.items()}
    digest = blake2b(data, digest_size=16)
    if not sae_config:
        return Kept(digest.hexdigest(), name, _kind(tensors), tensors)
    sae = sae_of(sae_config, tensors, path)
    digest.update(sae_config)
    return Kept(digest.hexdigest(), name, Kind.SAE, tensors, sae)


def _floats(data: bytearray, name: str, entry: Entry) -> Floats:
    """A tensor in fp32, in memory of its own."""
    if entry.dtype not in DTYPES:
        raise ModelError(f"{entry.path}: tensor {name} is {entry.dtype}; it must be {', '.join(DTYPES)}")
    stored = np.frombuffer(memoryview(data)[entry.start : entry.stop], DTYPES[entry.dtype])
    with np.errstate(over="ignore"):  # what F32 cannot hold is found below
        bf16 = entry.dtype == "BF16"
        values = (stored.astype(np.uint32) << 16).view(np.float32) if bf16 else stored.astype(np.float32)
    if not np.isfinite(values).all():
        raise ModelError(f"{entry.path}: tensor {name} has a number that is not finite (in F32)")
    return values.reshape(entry.shape)


def _kind(tensors: Mapping[str, Floats]) -> Kind:
    return Kind.TUNED_LENS if all(map(TRANSLATOR.fullmatch, tensors)) else Kind.VECTORS

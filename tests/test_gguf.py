"""GGUF files: read like the reference reads them, refused with a reason when damaged, served like the original."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from cutaway_server.errors import ModelError
from cutaway_server.kernels.reference import ReferenceKernels
from cutaway_server.model.checkpoint import Checkpoint, load_weights
from cutaway_server.model.gguf_ends import end_tokens
from cutaway_server.model.gguf_families import read_config
from cutaway_server.model.gguf_file import GgufReader, open_gguf
from cutaway_server.model.gguf_header import SUPPORTED, parse
from cutaway_server.model.gguf_names import read_layout
from cutaway_server.model.huggingface import open_directory
from cutaway_server.model.transformer import Transformer
from gguf import GGMLQuantizationType, GGUFWriter
from networks import flat, pages_for
from tiny import save_tiny
from tiny_gguf import add, finish, write_model

CPU = torch.device("cpu")
KINDS = sorted(SUPPORTED, key=lambda kind: kind.name)


# The file.


def random_blocks(kind: GGMLQuantizationType, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows of random quants with scales that are finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, width // block, size), dtype=np.uint8)
    scales = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind.name, (0,) if kind.name != "F32" else ())
    scales = (0, 2) if kind.name in ("Q4_1", "Q5_1") else scales
    for at in scales:
        raw[..., at : at + 2] = np.frombuffer(np.float16(0.013 * (at + 1)).tobytes(), np.uint8)
    return raw.reshape(rows, -1)


def file_of(path: Path, kind: GGMLQuantizationType, rows: int = 7, width: int = 512) -> Path:
    writer = GGUFWriter(path, "llama")
    if kind.name in ("F32", "F16", "BF16"):
        add(writer, "w", np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32), kind)
    else:
        writer.add_tensor("w", random_blocks(kind, rows, width), raw_dtype=kind)
    finish(writer)
    return path


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_of_every_type_are_those_of_the_whole_tensor_as_the_gguf_package_dequantises_it(
    kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    path = file_of(tmp_path / "a.gguf", kind)
    whole = gguf.GGUFReader(path).tensors[0]
    expected = torch.from_numpy(gguf.dequantize(whole.data, kind).copy())
    assert expected.std() > 0.01
    reader = GgufReader(path)
    assert reader.shape("w") == (7, 512)
    for start, stop in [(0, 7), (0, 1), (3, 5), (6, 7), (2, 2)]:
        rows = reader.rows("w", start, stop)
        assert rows.shape == (stop - start, 512)
        assert torch.equal(rows.float(), expected[start:stop])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_dequantised_values_follow_the_formula_of_the_type(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.gguf", kind, rows=1, width=256)
    raw = gguf.GGUFReader(path).tensors[0].data.tobytes()
    values = GgufReader(path).rows("w", 0, 1).float().flatten().tolist()
    expected = naive_values(kind.name, raw)
    assert values == pytest.approx(expected, rel=1e-6, abs=1e-7)


def naive_values(kind: str, raw: bytes) -> list[float]:
    """The formats of ggml-common.h, value by value."""
    if kind in ("F32", "F16"):
        return [value for (value,) in struct.iter_unpack("<f" if kind == "F32" else "<e", raw)]
    if kind == "BF16":
        return [struct.unpack("<f", b"\0\0" + raw[at : at + 2])[0] for at in range(0, len(raw), 2)]
    if kind in ("Q4_K", "Q5_K"):
        return naive_k(raw, five=kind == "Q5_K")
    if kind == "Q6_K":
        return naive_q6(raw)
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24}[kind]
    return [value for at in range(0, len(raw), size) for value in naive_block(kind, raw[at : at + size])]


def half(raw: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", raw, at)[0])


def naive_block(kind: str, raw: bytes) -> list[float]:
    scale, base = half(raw, 0), half(raw, 2) if kind.endswith("_1") else 0.0
    if kind == "Q8_0":
        return [scale * q for q in struct.unpack("<32b", raw[2:])]
    high = int.from_bytes(raw[-20:-16], "little") if kind.startswith("Q5") else 0
    middle = 0 if kind.endswith("_1") else 16 if kind.startswith("Q5") else 8
    quants = [byte & 15 for byte in raw[-16:]] + [byte >> 4 for byte in raw[-16:]]
    return [scale * ((q | (high >> n & 1) << 4) - middle) + base for n, q in enumerate(quants)]


def naive_k(raw: bytes, *, five: bool) -> list[float]:
    scale, least, packed = half(raw, 0), half(raw, 2), raw[4:16]
    high, low = (raw[16:48], raw[48:]) if five else (bytes(32), raw[16:])
    values = []
    for part in range(8):
        if part < 4:
            d, m = packed[part] & 63, packed[part + 4] & 63
        else:
            d = packed[part + 4] & 15 | packed[part - 4] >> 6 << 4
            m = packed[part + 4] >> 4 | packed[part] >> 6 << 4
        for n in range(32):
            q = low[part // 2 * 32 + n] >> 4 * (part % 2) & 15 | (high[n] >> part & 1) << 4
            values.append(scale * d * q - least * m)
    return values


def naive_q6(raw: bytes) -> list[float]:
    scales, scale = struct.unpack("<16b", raw[192:208]), half(raw, 208)
    values = []
    for n in range(256):
        side, part, at = n // 128, n % 128 // 32, n % 32
        low = raw[side * 64 + part % 2 * 32 + at] >> 4 * (part // 2) & 15
        q = low | (raw[128 + side * 32 + at] >> 2 * part & 3) << 4
        values.append(scale * scales[n // 16] * (q - 32))
    return values


def test_the_header_is_read_as_the_gguf_package_reads_it(smollm2_gguf: Path) -> None:
    theirs, ours = gguf.GGUFReader(smollm2_gguf), GgufReader(smollm2_gguf)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert set(ours.metadata) == set(fields)
    for name, value in fields.items():
        assert ours.metadata[name] == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value), name
    assert ours.names() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        assert ours.shape(tensor.name) == tuple(tensor.shape.tolist()[::-1])


def test_the_digest_follows_the_weights_and_not_the_metadata(tmp_path: Path) -> None:
    def digest(value: float, name: str) -> str:
        writer = GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        writer.add_name(name)
        add(writer, "w", np.full((2, 2), value, np.float32), GGMLQuantizationType.F32)
        finish(writer)
        return GgufReader(tmp_path / f"{name}.gguf").digest()

    assert digest(1.0, "one") == digest(1.0, "other")
    assert digest(1.0, "one") != digest(1.5, "one")
    assert len(digest(1.0, "one")) == 32


# Damage.


def small_file(path: Path) -> Path:
    """A complete llama, in 3 KB."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(4)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_feed_forward_length(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b", "</s>"])
    writer.add_token_types([1, 1, 3])
    writer.add_token_scores([0.5, 1.0, 2.0])
    writer.add_eos_token_id(2)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    shapes = {f"blk.0.{name}.weight": (4, 4) for name in names}
    shapes |= {f"blk.0.{name}.weight": (4,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {"output_norm.weight": (4,), "token_embd.weight": (3, 4), "rope_freqs.weight": (1,)}
    for name, shape in shapes.items():
        add(writer, name, np.ones(shape, np.float32), GGMLQuantizationType.F32)
    finish(writer)
    return path


def read_all(path: Path) -> None:
    """Everything that opening and loading a file does, but for its text."""
    reader = GgufReader(path)
    config = read_config(reader.metadata, reader, str(path))
    layout = read_layout(config, reader.names())
    ends = end_tokens(reader.metadata, config.d_vocab, str(path))
    checkpoint = Checkpoint(
        config, layout, reader, text=None, eos_token_ids=ends, ignored=frozenset(["rope_freqs.weight"])
    )  # type: ignore[arg-type]
    load_weights(checkpoint, torch.float32, CPU)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = small_file(tmp_path / "whole.gguf").read_bytes()
    read_all(tmp_path / "whole.gguf")
    last = whole.rstrip(b"\0")  # padding after the last tensor carries nothing
    for size in range(1, len(last)):
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            parse(memoryview(whole)[:size], "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(last[:-1])
    with pytest.raises(ModelError, match="goes past the end"):
        GgufReader(tmp_path / "cut.gguf")


def test_flipped_bytes_in_the_header_never_end_in_anything_but_a_model_error(tmp_path: Path) -> None:
    whole = small_file(tmp_path / "whole.gguf").read_bytes()
    header = whole.index(struct.pack("<f", 1.0) * 4)
    chance = random.Random(5)
    bad = tmp_path / "bad.gguf"
    refused = 0
    tracemalloc.start()
    try:
        for _ in range(1500):
            damaged = bytearray(whole)
            for _ in range(chance.choice([1, 1, 2, 8])):
                damaged[chance.randrange(header)] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
            bad.write_bytes(damaged)
            try:
                read_all(bad)
            except ModelError:
                refused += 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused > 700
    assert peak < 20e6


def header(*pairs: bytes, tensors: int = 0, described: bytes = b"", version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, len(pairs)) + b"".join(pairs) + described


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes = b"w", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


FILL = bytes(4096)
HUGE = 1 << 60


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\3\4" + FILL, r"no GGUF file: it starts with b'PK"),
        (header(version=1) + FILL, "version 1; versions 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + FILL, "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0) + FILL, f"{HUGE} tensors are said to follow"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 60_000) + FILL, "60000 metadata pairs are said to follow and the file"),
        (header(struct.pack("<Q", HUGE)) + FILL, f"metadata key 0 is said to have {HUGE} bytes"),
        (header(struct.pack("<Q", 10_000)) + FILL, "metadata key 0 needs 10000 bytes and the file has"),
        (header(text(b"\xff\xfe") + struct.pack("<IB", 0, 1)) + FILL, "metadata key 0 is not UTF-8"),
        (header(text(b"k") + struct.pack("<IB", 77, 1)) + FILL, "'k' is of type 77, which GGUF does not have"),
        (header(*[text(b"k") + struct.pack("<IB", 0, 1)] * 2) + FILL, "'k' comes twice"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 0, HUGE)) + FILL, f"{HUGE} elements of 'k' are said to follow"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 4, 5000)) + FILL, "5000 elements of 'k' .* too short"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 9, 1)) + FILL, "array of arrays"),
        (header(tensors=2, described=tensor() + tensor(offset=128)) + FILL, "two tensors 'w'"),
        (header(tensors=1, described=tensor(shape=())) + FILL, "'w' has 0 dimensions"),
        (header(tensors=1, described=tensor(shape=(1,) * 5)) + FILL, "'w' has 5 dimensions"),
        (header(tensors=1, described=tensor(shape=(0, 4))) + FILL, "impossible shape"),
        (header(tensors=1, described=tensor(shape=(1 << 40, 1 << 40))) + FILL, "impossible shape"),
        (header(tensors=1, described=tensor(shape=(48,), kind=2)) + FILL, "rows of 48, no multiple of the 32 of Q4_0"),
        (header(tensors=1, described=tensor(kind=999)) + FILL, "unknown type 999"),
        (header(tensors=1, described=tensor(shape=(256,), kind=10)) + FILL, "stored as Q2_K, which is not supported"),
        (header(tensors=1, described=tensor(offset=7)) + FILL, "'w' is at 7, not aligned to 32"),
        (header(tensors=1, described=tensor(offset=1 << 20)) + FILL, "'w' of 128 bytes .* past the end"),
        (header(tensors=2, described=tensor() + tensor(b"v", offset=96)) + FILL, "'w' and 'v' overlap"),
        (header(text(b"general.alignment") + struct.pack("<II", 4, 24)) + FILL, "alignment is 24"),
        (header(text(b"general.alignment") + struct.pack("<II", 4, 0)) + FILL, "alignment is 0"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        GgufReader(path)


def test_arrays_that_together_are_too_long_are_refused(tmp_path: Path) -> None:
    one = struct.pack("<IIQ", 9, 0, 5_000_000) + bytes(5_000_000)
    path = tmp_path / "bad.gguf"
    path.write_bytes(header(text(b"a") + one, text(b"b") + one))
    with pytest.raises(ModelError, match="array elements, which is not believed"):
        GgufReader(path)


def test_a_missing_file_and_a_part_of_a_split_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.gguf cannot be read"):
        GgufReader(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="one part of a split GGUF"):
        GgufReader(small_file(tmp_path / "a-00001-of-00002.gguf"))
    with pytest.raises(ModelError, match="there is no tensor 'nothing'"):
        GgufReader(small_file(tmp_path / "a.gguf")).rows("nothing", 0, 1)


# The families.

GEMMA = {"query_pre_attn_scalar": 24}  # a GGUF file cannot say another
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: family, overrides of its config, further keys of the file
    "llama": ("llama", {}, {}),
    "llama with biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, {}),
    "llama with llama3 scaling": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {},
    ),
    "llama with linear scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
    ),
    "qwen2": ("qwen2", {"use_sliding_window": False}, {}),
    "qwen2 with yarn": (
        "qwen2",
        {
            "use_sliding_window": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 128,
        },
    ),
    "qwen3": ("qwen3", {}, {}),
    "gemma2": ("gemma2", GEMMA, {}),
    "gemma3": ("gemma3", {**GEMMA, "num_hidden_layers": 7, "sliding_window_pattern": 6}, {}),
    "gemma3 that says its pattern": ("gemma3", GEMMA, {"attention__sliding_window_pattern": 2}),
    "gemma3 that says each layer": ("gemma3", GEMMA, {"attention__sliding_window_pattern": [True, False, True]}),
    "gpt2": ("gpt2", {}, {}),
    "phi3": ("phi3", {}, {}),
    "phi3 with a window and partial rotation": (
        "phi3",
        {
            "sliding_window": 20,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        },
        {},
    ),
    "olmo2": ("olmo2", {}, {}),
}


Pair = tuple[Any, Checkpoint, Checkpoint]


@pytest.fixture(params=VARIANTS, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tiny model of transformers, its directory and its GGUF file."""
    family, overrides, extra = VARIANTS[request.param]
    directory = tmp_path_factory.mktemp("tiny")
    model = save_tiny(family, directory / "hf", **overrides)
    write_model(model, directory / "tiny.gguf", directory / "tokenizer", **extra)
    return model, open_directory(directory / "hf"), open_gguf(directory / "tiny.gguf")


def test_the_config_is_that_of_the_directory(pair: Pair) -> None:
    _, directory, file = pair
    for name in directory.config.__slots__:
        ours, theirs = getattr(file.config, name), getattr(directory.config, name)
        if name == "layers" and "factors" in str(ours):
            continue  # llama3 scaling comes as its factors; the logits check it
        assert ours == theirs, name


def test_the_weights_are_those_of_the_directory(pair: Pair) -> None:
    _, directory, file = pair
    ours, theirs = (load_weights(each, torch.float32, CPU) for each in (file, directory))
    n_tensors = 0
    for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert torch.equal(a, b)
        n_tensors += 1
    assert n_tensors >= 2 + 6 * directory.config.n_layers


def test_the_logits_are_those_of_transformers(pair: Pair) -> None:
    model, _, file = pair
    ids = torch.randint(4, 512, (90,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    assert (served_logits(file, ids.tolist()) - expected).abs().max() <= 1e-4


def served_logits(checkpoint: Checkpoint, ids: list[int]) -> torch.Tensor:
    weights = load_weights(checkpoint, torch.float32, CPU)
    blocks = -(-len(ids) // 16)
    batch = flat([(ids, 0, len(ids), [*range(1, blocks + 1)])], 16)
    model = Transformer(ReferenceKernels(checkpoint.config, weights, checkpoint.config.max_context))
    return model.logits(model.forward(batch, pages_for(checkpoint.config, blocks + 1, 16)))


def test_a_quantised_model_serves_what_transformers_reads_from_the_same_file(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "hf", hidden_size=64, intermediate_size=128)
    write_model(model, tmp_path / "tiny.gguf", tmp_path / "tokenizer", GGMLQuantizationType.Q4_0)
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    loaded = load_gguf_checkpoint(tmp_path / "tiny.gguf", return_tensors=True, model_to_load=model)
    model.load_state_dict(loaded["tensors"])
    ids = list(range(10, 70))
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    assert (served_logits(open_gguf(tmp_path / "tiny.gguf"), ids) - expected).abs().max() <= 1e-4


def llama_metadata(**changes: object) -> dict[str, object]:
    metadata: dict[str, object] = {
        "general.architecture": "llama",
        "llama.context_length": 16,
        "llama.embedding_length": 4,
        "llama.block_count": 1,
        "llama.attention.head_count": 2,
        "llama.feed_forward_length": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "mamba"}, "architecture 'mamba' is not served; these are: llama, qwen2"),
        ({"general__architecture": None}, "general.architecture is missing"),
        ({"general__architecture": 7}, "general.architecture is 7; it must be a string"),
        ({"llama__block_count": None}, "block_count is missing"),
        ({"llama__block_count": 4_000_000}, "block_count is 4000000; it is more than there are tensors"),
        ({"llama__block_count": "one"}, "block_count is 'one'"),
        ({"llama__embedding_length": -4}, "embedding_length is -4"),
        ({"llama__attention__head_count_kv": 3}, "head_count_kv is 3; it must divide the 2"),
        ({"llama__attention__value_length": 7}, "value_length is 7"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
        ({"llama__expert_count": 8}, "expert_count is 8; it is not served: no mixture of experts"),
        ({"llama__rope__dimension_count": 3}, "rope.dimension_count is 3"),
        ({"llama__attention__key_length": 4}, "rope_freqs.weight must have 2 factors"),
        ({"llama__rope__scaling__type": "longrope"}, "rope.scaling.type is 'longrope'; it is not served"),
    ],
)
def test_metadata_that_is_not_served_is_named(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    reader = GgufReader(small_file(tmp_path / "a.gguf"))
    with pytest.raises(ModelError, match=message):
        read_config(llama_metadata(**changes), reader, "a.gguf")


def test_end_tokens_are_those_named_and_those_known_by_their_text() -> None:
    tokens = ["<|end_of_text|>", "</s>", "<|eot_id|>", "<|im_end|>", "<|eom_id|>", "x"]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 4, 3, 1, 4, 1],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 5,
    }
    assert end_tokens(metadata, 6, "a.gguf") == {0, 2, 4, 5}  # not 1, which is HTML in Gemma, nor 3, a normal token
    with pytest.raises(ModelError, match="below the vocabulary's 5"):
        end_tokens(metadata, 5, "a.gguf")


# The real models.


def test_smollm2_is_what_transformers_makes_of_the_same_file(smollm2_gguf: Path, smollm2_hf: Any) -> None:
    checkpoint = open_gguf(smollm2_gguf)
    config = checkpoint.config
    assert (config.d_model, config.n_heads, config.n_kv_heads, config.d_head) == (576, 9, 3, 64)
    assert (config.d_vocab, config.max_context, config.norm_eps) == (49152, 8192, 1e-5)
    assert config.tied_embeddings
    assert checkpoint.eos_token_ids == {0, 2}  # <|endoftext|>, <|im_end|>
    compare_weights(checkpoint, smollm2_hf, lambda gain: gain)


def test_gemma3_is_what_transformers_makes_of_the_same_file(gemma3_gguf: Path, gemma3_hf: Any) -> None:
    checkpoint = open_gguf(gemma3_gguf)
    config = checkpoint.config
    assert config.windows == (*(512,) * 5, None) * 3
    assert [layer.rope.theta for layer in config.layers[4:7] if layer.rope] == [1e4, 1e6, 1e4]
    assert (config.d_head, config.n_kv_heads, config.attention_scale) == (256, 1, 1 / 16)
    assert checkpoint.eos_token_ids == {1, 106}  # <eos>, <end_of_turn>
    compare_weights(checkpoint, gemma3_hf, lambda gain: gain + 1)


def compare_weights(checkpoint: Checkpoint, model: Any, gain: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Every parameter of transformers' model has its place in ours, and equals it."""
    weights = load_weights(checkpoint, torch.float32, CPU)
    theirs = dict(model.named_parameters())

    def same(ours: torch.Tensor, *names: str) -> None:
        expected = torch.cat([theirs.pop(f"model.{name}.weight").detach() for name in names])
        expected = gain(expected) if names[0].endswith("norm") else expected
        assert (ours - expected).abs().max() <= 1e-6, names

    same(weights.embed, "embed_tokens")
    same(weights.final_norm.gain, "norm")
    post = checkpoint.config.post_norm
    for number, layer in enumerate(weights.layers):
        at = f"layers.{number}."
        same(layer.qkv, *(f"{at}self_attn.{name}_proj" for name in "qkv"))
        same(layer.attention_out, f"{at}self_attn.o_proj")
        same(layer.mlp_in, f"{at}mlp.gate_proj", f"{at}mlp.up_proj")
        same(layer.mlp_out, f"{at}mlp.down_proj")
        norms = {
            "input_layernorm": layer.norm1,
            "post_attention_layernorm": layer.norm1_post if post else layer.norm2,
            "pre_feedforward_layernorm": layer.norm2 if post else None,
            "post_feedforward_layernorm": layer.norm2_post,
            "self_attn.q_norm": layer.q_norm,
            "self_attn.k_norm": layer.k_norm,
        }
        for name, norm in norms.items():
            if norm is not None:
                same(norm.gain, at + name)
    assert not theirs

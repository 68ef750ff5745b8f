"""Quantised models as they are served: from GGUF files as they are, and rounded from floats."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from cutaway_server.config import Config, ConfigError, read_config
from cutaway_server.engine.build import build_engine
from cutaway_server.engine.quantize import check_quantize, quantization, rounding_of
from cutaway_server.errors import ModelError
from cutaway_server.kernels.build_native import variants
from cutaway_server.kernels.cpu import CpuKernels
from cutaway_server.kernels.dequantise import dequantised
from cutaway_server.kernels.library import Library, load_library
from cutaway_server.kernels.packing_quantized import PackedStack
from cutaway_server.kernels.quantized import KINDS, Quantized
from cutaway_server.kernels.reference import ReferenceKernels
from cutaway_server.kernels.rounding import NO_ROUNDING
from cutaway_server.kernels.weights import Weights
from cutaway_server.model.checkpoint import Checkpoint, load_weights
from cutaway_server.model.gguf_file import open_gguf
from cutaway_server.model.gguf_names import read_layout
from cutaway_server.model.huggingface import open_directory
from cutaway_server.model.transformer import Transformer
from cutaway_server.request import Request, Sampled, SamplingParams
from cutaway_server.text.tokenizer import TextModel
from gguf import GGMLQuantizationType
from networks import PLAIN, SHAPES, flat, pages_for, random_weights
from test_gguf import random_blocks
from test_kernels import logits, tokens
from tiny import save_tiny

CPU = torch.device("cpu")
# Q and K are permuted by the loader; joined and alternating parts have one kind, or several, or floats among them.
CONFIG = replace(
    PLAIN, family="llama", d_model=256, n_heads=4, n_kv_heads=2, d_head=64, d_mlp=256, tied_embeddings=True,
    layers=(PLAIN.layers[0],) * 2,
)  # fmt: skip
TYPES = {
    "token_embd": "Q8_0",
    "blk.0.attn_q": "Q5_0", "blk.0.attn_k": "Q8_0", "blk.0.attn_v": "Q8_0", "blk.0.attn_output": "Q4_1",
    "blk.0.ffn_gate": "Q5_1", "blk.0.ffn_up": "Q5_1", "blk.0.ffn_down": "Q6_K",
    "blk.1.attn_q": "Q4_K", "blk.1.attn_k": "Q4_K", "blk.1.attn_v": "Q6_K", "blk.1.attn_output": "Q5_K",
    "blk.1.ffn_gate": "Q4_0", "blk.1.ffn_up": "Q4_K", "blk.1.ffn_down": "Q4_0",
}  # fmt: skip


class BlockReader:
    """A reader of random blocks, dequantised by the gguf package where floats are asked for."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        for i, (name, kind) in enumerate(TYPES.items()):
            raw = random_blocks(GGMLQuantizationType[kind], 61 if "embd" in name else self.height(name), 256, i)
            self.tensors[f"{name}.weight"] = torch.from_numpy(raw).clone()
        norms = [f"blk.{i}.{name}.weight" for i in (0, 1) for name in ("attn_norm", "ffn_norm")]
        self.norms = {name: torch.ones(256) for name in (*norms, "output_norm.weight")}

    def height(self, name: str) -> int:
        return 128 if name.endswith(("attn_k", "attn_v")) else 256

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors) | frozenset(self.norms)

    def format(self, name: str) -> str:
        return "F32" if name in self.norms else TYPES[name.removesuffix(".weight")]

    def shape(self, name: str) -> tuple[int, ...]:
        return (256,) if name in self.norms else (len(self.tensors[name]), 256)

    def blocks(self, name: str) -> torch.Tensor:
        return self.tensors[name].clone()

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name in self.norms:
            return self.norms[name][start:stop]
        kind = GGMLQuantizationType[self.format(name)]
        return torch.from_numpy(gguf.dequantize(self.tensors[name][start:stop].numpy(), kind))

    def digest(self) -> str:
        return ""


@pytest.fixture
def checkpoint() -> Checkpoint:
    reader = BlockReader()
    text = TextModel.__new__(TextModel)
    return Checkpoint(CONFIG, read_layout(CONFIG, reader.names()), reader, text, frozenset())


@pytest.fixture(scope="module")
def library() -> Library:
    found = load_library()
    if found is None:
        pytest.skip("no C compiler here")
    return found


@pytest.fixture(scope="module", params=variants())
def variant(request: pytest.FixtureRequest, library: Library) -> str:
    if request.param not in library.supported():
        pytest.skip(f"untested: this machine does not run {request.param}")
    return str(request.param)


def same(a: Weights, b: Weights) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def test_what_is_kept_as_it_is_has_the_values_of_the_floats(checkpoint: Checkpoint) -> None:
    kept, floats = (
        load_weights(checkpoint, torch.float32, CPU, as_is=True),
        load_weights(checkpoint, torch.float32, CPU),
    )
    assert kept.unembed is kept.embed
    assert isinstance(kept.layers[0].qkv, Quantized)
    assert kept.layers[0].qkv.formats == ("Q5_0", "Q8_0", "Q8_0")
    assert isinstance(kept.layers[1].qkv, Quantized)
    assert isinstance(kept.layers[1].mlp_in, torch.Tensor)  # gate and up of two kinds
    assert same(dequantised(kept, torch.float32, NO_ROUNDING), floats)
    assert kept.n_parameters == floats.n_parameters
    assert kept.n_bytes < floats.n_bytes / 3
    told = quantization("as-is", checkpoint, kept)
    kept_types, _, floats_of = told.removeprefix("as-is: ").partition("; as floats: ")
    assert set(kept_types.split(", ")) == set(TYPES.values())
    assert floats_of == "Q4_0, Q4_K"


def test_native_operations_give_what_the_reference_gives_of_the_floats(
    checkpoint: Checkpoint, variant: str, library: Library
) -> None:
    """But for what rounding activations in groups costs."""
    kept, floats = (
        load_weights(checkpoint, torch.float32, CPU, as_is=True),
        load_weights(checkpoint, torch.float32, CPU),
    )
    kernels = CpuKernels(CONFIG, kept, 1024, library, variant, consume=True)
    reference = ReferenceKernels(CONFIG, floats, 1024)
    batch = flat([(tokens(40), 0, 40, [4, 2, 7])], 16)
    plan, other = kernels.plan(batch), reference.plan(batch)
    residual = reference.embed(other)
    assert torch.equal(kernels.embed(plan), residual)
    for layer in (0, 1):
        opened, expected = (
            k.open_attention_input(layer, residual, p) for k, p in ((kernels, plan), (reference, other))
        )
        assert close(opened.rot_q, expected.rot_q)
        assert close(opened.rot_k, expected.rot_k)
        assert close(opened.v, expected.v)
        z = torch.randn(40, 4, 64, generator=torch.Generator().manual_seed(0))
        none = torch.zeros_like(residual)
        assert close(kernels.attention_output(layer, z, none), reference.attention_output(layer, z, none))
        hidden = reference.mlp_input(layer, residual)
        assert close(kernels.mlp_input(layer, residual), hidden)
        assert close(kernels.mlp_output(layer, hidden, none), reference.mlp_output(layer, hidden, none))
    assert close(kernels.unembed(residual), reference.unembed(residual))
    assert all(blocks.raw.untyped_storage().nbytes() == 0 for blocks in kept.layers[1].attention_out.parts)
    assert any(isinstance(matrix.packed, PackedStack) for matrix in kernels._matrices)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Each row within 4 % of its norm."""
    return bool(((ours - theirs).flatten(1).norm(dim=1) <= 0.04 * theirs.flatten(1).norm(dim=1)).all())


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", ["plain", "layernorm, learned positions", "pre- and post-norm"])
def test_rounded_weights_serve_what_the_reference_serves_of_them(
    name: str, quantize: str, variant: str, library: Library
) -> None:
    config, rounding = SHAPES[name], rounding_of(quantize)
    kernels = CpuKernels(config, random_weights(config), 1024, library, variant, rounding=rounding)
    rounded = dequantised(random_weights(config), torch.float32, rounding)
    batch = flat([(tokens(40), 0, 40, [4, 2, 7])], 16)
    ours = logits(Transformer(kernels), batch, pages_for(config, 12, 16))
    theirs = logits(Transformer(ReferenceKernels(config, rounded, 1024)), batch, pages_for(config, 12, 16))
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
    residual = torch.randn(5, 32)
    assert torch.equal(kernels.mlp_input(0, residual), kernels.open_mlp_input(0, residual).post)
    assert torch.equal(kernels.mlp_input(0, residual)[2:3], kernels.mlp_input(0, residual[2:3]))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_chunks_and_neighbours_never_change_a_rows_bits(quantize: str, variant: str, library: Library) -> None:
    config, ids, blocks = SHAPES["windows"], tokens(150, 1), list(range(1, 20))
    kernels = CpuKernels(config, random_weights(config), 1024, library, variant, rounding=rounding_of(quantize))
    model = Transformer(kernels)
    whole = logits(model, flat([(ids, 0, 150, blocks)], 16), pages_for(config, 60, 16))
    pages, parts = pages_for(config, 60, 16), []
    for start, stop in [(0, 1), (1, 33), (33, 150)]:
        batch = flat([(tokens(7, 9), 0, 7, [40]), (ids, start, stop, blocks), (tokens(20, 3), 0, 20, [41, 42])], 16)
        parts.append(logits(model, batch, pages)[7 : 7 + stop - start])
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", ["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_real_files_are_kept_to_the_bit(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint = open_gguf(Path(request.getfixturevalue(f"{name}_gguf")))
    kept = load_weights(checkpoint, torch.bfloat16, CPU, as_is=True)
    assert all(isinstance(matrix, Quantized) for matrix in kept.matrices())
    for path, matrix in [("embed", kept.embed), ("layers.1.qkv", kept.layers[1].qkv)]:
        pieces = checkpoint.layout[path]
        stored = torch.cat([checkpoint.reader.rows(p.name, 0, 64).float() for p in pieces if p.head_width is None])
        assert isinstance(matrix, Quantized)
        start = 0 if pieces[0].head_width is None else 768  # V comes after Q and K, which are permuted
        assert torch.equal(matrix.cut(start, start + 64).values(torch.float32), stored[:64])
    told = quantization("as-is", checkpoint, kept)
    assert told == {"smollm2": "as-is: Q4_1, Q8_0", "gemma3": "as-is: Q8_0, Q5_0, Q4_K, Q6_K"}[name]


@pytest.mark.parametrize("quantize", ["as-is", "int8"])
def test_a_quantised_model_says_something_sensible(quantize: str, smollm2_gguf: Path) -> None:
    checkpoint = open_gguf(smollm2_gguf)
    config = Config(quantize=quantize, max_context=256, kv_cache_memory=2**28)
    engine, facts = build_engine(config, checkpoint)
    assert facts.quantization == {"as-is": "as-is: Q4_1, Q8_0", "int8": "int8"}[quantize]
    assert facts.n_parameters == 134_515_008
    prompt = tuple(checkpoint.text.encode("The capital of France is").ids)
    engine.add(Request("a", prompt, SamplingParams(seed=0, max_tokens=8, temperature=0.0), time.monotonic()))
    found = []
    while engine.has_work:
        found += [event.token for _, event in engine.step() if isinstance(event, Sampled)]
    assert "Paris" in checkpoint.text.decode(found)


def refusal(quantize: str, checkpoint: Any, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> str:
    with pytest.raises(ModelError) as found:
        check_quantize(quantize, checkpoint, torch.device(device), dtype)
    return str(found.value)


def test_what_cannot_be_quantised_is_refused_with_what_to_do(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for quantize in ("none", "int8", "int4", "as-is"):
        check_quantize(quantize, checkpoint, CPU, torch.bfloat16)
    assert "bfloat16 on cuda; give --quantize none" in refusal("int8", checkpoint, "cuda")
    assert "float16 on cpu; give --quantize none" in refusal("as-is", checkpoint, dtype=torch.float16)
    save_tiny("llama", tmp_path)
    plain = open_directory(tmp_path)
    assert "--quantize int8 or int4 rounds any checkpoint" in refusal("as-is", plain)
    check_quantize("int4", plain, CPU, torch.float32)


def test_scales_that_are_not_finite_are_refused_by_name(checkpoint: Checkpoint) -> None:
    assert isinstance(checkpoint.reader, BlockReader)
    checkpoint.reader.tensors["blk.1.attn_v.weight"][0, 208:210] = torch.tensor([0, 0x7C], dtype=torch.uint8)
    with pytest.raises(ModelError, match=r"blk\.1\.attn_v\.weight has scales that are not finite"):
        load_weights(checkpoint, torch.float32, CPU, as_is=True)


def test_the_option_is_read_and_other_values_are_refused() -> None:
    assert read_config(["--quantize", "as-is"], {}).quantize == "as-is"
    assert read_config([], {"CUTAWAY_QUANTIZE": "int4"}).quantize == "int4"
    with pytest.raises(ConfigError, match=r"--quantize: 'int3' is not allowed: .*'none', 'int8', 'int4' or 'as-is'"):
        read_config(["--quantize", "int3"], {})
    assert set(KINDS) == set(TYPES.values())

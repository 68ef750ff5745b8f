"""Hugging Face directories: weights end up where they belong, and whatever is damaged is refused with the place."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from cutaway_server.errors import ModelError
from cutaway_server.kernels.weights import Weights
from cutaway_server.model.checkpoint import CHUNK_BYTES, Checkpoint, load_weights
from cutaway_server.model.families import ignored, layout, read_config
from cutaway_server.model.huggingface import open_directory
from cutaway_server.model.safetensors_files import open_safetensors
from cutaway_server.request import SamplingOptions
from cutaway_server.text.tokenizer import TextModel
from safetensors.torch import load_file, save_file
from torch import Tensor

CPU = torch.device("cpu")


class Tensors:
    """A reader of tensors in memory that remembers how much was asked for at once."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.most = 0

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        assert 0 <= start < stop <= len(self.tensors[name])
        rows = self.tensors[name][start:stop]
        self.most = max(self.most, 4 * rows.numel())
        return rows

    def digest(self) -> str:
        return ""


def checkpoint(raw: dict[str, Any], reader: Any) -> Checkpoint:
    """A checkpoint without text."""
    names = reader.names()
    text = TextModel.__new__(TextModel)
    return Checkpoint(read_config(raw), layout(raw, names), reader, text, frozenset(), ignored=ignored(raw, names))


def opened(path: Path) -> Checkpoint:
    return checkpoint(json.loads((path / "config.json").read_text()), open_safetensors(path))


def load(path: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(opened(path), dtype, CPU)


def state(family: str, path: Path, **overrides: Any) -> dict[str, Tensor]:
    return dict(tiny.save_tiny(family, path, **overrides).state_dict())


def test_llama_weights_lie_where_they_belong_bit_for_bit(tmp_path: Path) -> None:
    theirs, ours = state("llama", tmp_path, attention_bias=True, mlp_bias=True), load(tmp_path)
    for i, layer in enumerate(ours.layers):
        at = f"model.layers.{i}."
        for suffix, qkv, out, mlp_in, mlp_out in (
            ("weight", layer.qkv, layer.attention_out, layer.mlp_in, layer.mlp_out),
            ("bias", layer.qkv_bias, layer.attention_out_bias, layer.mlp_in_bias, layer.mlp_out_bias),
        ):
            assert torch.equal(qkv, torch.cat([theirs[f"{at}self_attn.{n}_proj.{suffix}"] for n in "qkv"]))
            assert torch.equal(out, theirs[f"{at}self_attn.o_proj.{suffix}"])
            assert torch.equal(mlp_in, torch.cat([theirs[f"{at}mlp.{n}_proj.{suffix}"] for n in ("gate", "up")]))
            assert torch.equal(mlp_out, theirs[f"{at}mlp.down_proj.{suffix}"])
        assert torch.equal(layer.norm1.gain, theirs[f"{at}input_layernorm.weight"])
        assert torch.equal(layer.norm2.gain, theirs[f"{at}post_attention_layernorm.weight"])
    assert torch.equal(ours.embed, theirs["model.embed_tokens.weight"])
    assert torch.equal(ours.unembed, theirs["lm_head.weight"])
    assert torch.equal(ours.final_norm.gain, theirs["model.norm.weight"])
    assert ours.n_parameters == sum(tensor.numel() for tensor in theirs.values())


def test_gpt2_weights_are_transposed(tmp_path: Path) -> None:
    theirs, ours = state("gpt2", tmp_path), load(tmp_path)
    for i, layer in enumerate(ours.layers):
        assert torch.equal(layer.qkv, theirs[f"transformer.h.{i}.attn.c_attn.weight"].t())
        assert torch.equal(layer.mlp_out, theirs[f"transformer.h.{i}.mlp.c_proj.weight"].t())
        assert torch.equal(layer.qkv_bias, theirs[f"transformer.h.{i}.attn.c_attn.bias"])
        assert torch.equal(layer.norm2.bias, theirs[f"transformer.h.{i}.ln_2.bias"])
        assert layer.qkv.is_contiguous()
    assert torch.equal(ours.positions, theirs["transformer.wpe.weight"])
    assert ours.unembed is ours.embed


def test_gains_of_gemma_are_one_more_than_stored_added_in_fp32(tmp_path: Path) -> None:
    tiny.save_tiny("gemma3", tmp_path, dtype=torch.bfloat16)
    theirs, ours = load_file(tmp_path / "model.safetensors"), load(tmp_path, torch.bfloat16)
    gain = ours.layers[0].q_norm.gain
    assert gain.dtype == torch.float32
    assert torch.equal(gain, theirs["model.layers.0.self_attn.q_norm.weight"].float() + 1)
    assert not torch.equal(gain, gain.bfloat16().float()), "added in bf16 it would have been rounded"


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("served", [torch.float32, torch.float16, torch.bfloat16])
def test_matrices_come_in_the_served_dtype_and_vectors_in_fp32(
    stored: torch.dtype, served: torch.dtype, tmp_path: Path
) -> None:
    tiny.save_tiny("qwen2", tmp_path, dtype=stored)
    theirs, ours = load_file(tmp_path / "model.safetensors"), load(tmp_path, served)
    assert theirs["model.embed_tokens.weight"].dtype == stored
    assert torch.equal(ours.layers[1].mlp_out, theirs["model.layers.1.mlp.down_proj.weight"].to(served))
    assert ours.layers[1].mlp_out.dtype == served
    biases = torch.cat([theirs[f"model.layers.1.self_attn.{n}_proj.bias"] for n in "qkv"])
    assert ours.layers[1].qkv_bias.dtype == ours.final_norm.gain.dtype == torch.float32
    assert torch.equal(ours.layers[1].qkv_bias, biases.float())


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    tiny.save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][3, 4] = 70_000.0
    save_file(stored, tmp_path / "model.safetensors")
    load(tmp_path, torch.bfloat16)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight.*float16"):
        load(tmp_path, torch.float16)


@pytest.mark.parametrize("transposed", [False, True])
def test_large_tensors_are_read_in_chunks_and_come_out_whole(transposed: bool) -> None:
    raw = gpt2_raw() if transposed else llama_raw(intermediate_size=3000, vocab_size=9000, hidden_size=1024)
    reader = Tensors(random_tensors(raw))
    steps: list[tuple[int, int]] = []
    opened = checkpoint(raw, reader)
    weights = load_weights(opened, torch.float32, CPU, lambda done, total: steps.append((done, total)))
    assert CHUNK_BYTES // 2 < reader.most <= CHUNK_BYTES
    stored = reader.tensors
    if transposed:
        assert torch.equal(weights.layers[0].mlp_in, stored["h.0.mlp.c_fc.weight"].t())
    else:
        joined = torch.cat([stored["model.layers.0.mlp.gate_proj.weight"], stored["model.layers.0.mlp.up_proj.weight"]])
        assert torch.equal(weights.layers[0].mlp_in, joined)
        assert torch.equal(weights.embed, stored["model.embed_tokens.weight"])
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    assert steps[-1] == (weights.n_parameters, weights.n_parameters)


def llama_raw(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        **changes,
    }


def gpt2_raw() -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 64,
        "n_embd": 1024,
        "n_head": 4,
        "n_layer": 1,
        "n_inner": 5000,
        "n_positions": 8,
    }


def random_tensors(raw: dict[str, Any]) -> dict[str, Tensor]:
    """A state dict for `raw`, with the names of our layout and the shapes of transformers."""
    import transformers

    kind = {"LlamaForCausalLM": transformers.LlamaConfig, "GPT2LMHeadModel": transformers.GPT2Config}
    config = kind[raw["architectures"][0]](**{k: v for k, v in raw.items() if k != "architectures"})
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    return {n.removeprefix("transformer."): torch.randn(t.shape) for n, t in theirs.items() if n != "lm_head.weight"}


def test_the_permutation_of_llama_cpp_is_undone() -> None:
    """llama.cpp's permutation is written here as its converter has it; transformers undoes it in its own way."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    raw = llama_raw(num_attention_heads=4, num_key_value_heads=2, hidden_size=2048, head_dim=1024, attention_bias=True)
    tensors = random_tensors(raw)
    permuted = dict(tensors)
    places = dict(checkpoint(raw, Tensors(tensors)).layout)
    for module, heads in (("q_proj", 4), ("k_proj", 2)):
        for kind in ("weight", "bias"):
            name = f"model.layers.0.self_attn.{module}.{kind}"
            w = tensors[name].numpy()
            swapped = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
            permuted[name] = torch.from_numpy(np.ascontiguousarray(swapped))
    reference = LlamaTensorProcessor()._reverse_permute_weights(
        permuted["model.layers.0.self_attn.q_proj.weight"].numpy(), 4, 4
    )
    assert np.array_equal(reference, tensors["model.layers.0.self_attn.q_proj.weight"].numpy())

    for path in ("layers.0.qkv", "layers.0.qkv_bias"):
        q, k, v = places[path]
        places[path] = (replace(q, head_width=1024), replace(k, head_width=1024), v)
    reader = Tensors(permuted)
    opened = replace(checkpoint(raw, reader), layout=places)
    layer = load_weights(opened, torch.float32, CPU).layers[0]
    assert reader.most > CHUNK_BYTES // 2, "several chunks of whole heads"
    for kind, ours in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
        assert torch.equal(ours, torch.cat([tensors[f"model.layers.0.self_attn.{n}_proj.{kind}"] for n in "qkv"]))


def test_missing_unexpected_and_misshapen_tensors_are_named() -> None:
    raw, tensors = llama_raw(), random_tensors(llama_raw())
    gate = "model.layers.0.mlp.gate_proj.weight"
    with pytest.raises(ModelError, match=r"lacks model\.layers\.0\.mlp\.gate_proj\.weight"):
        load_weights(checkpoint(raw, Tensors({n: t for n, t in tensors.items() if n != gate})), torch.float32, CPU)
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight"):
        load_weights(checkpoint({**raw, "tie_word_embeddings": False}, Tensors(tensors)), torch.float32, CPU)
    extra = {**tensors, "model.layers.1.mlp.gate_proj.weight": tensors[gate]}
    with pytest.raises(ModelError, match=r"no part of this model takes: model\.layers\.1\.mlp"):
        load_weights(checkpoint(raw, Tensors(extra)), torch.float32, CPU)
    for shape in ((47, 32), (48, 31), (48,), (48, 32, 1)):
        wrong = {**tensors, gate: torch.zeros(shape)}
        with pytest.raises(ModelError, match=rf"{gate} has shape \[.*\]; the config asks for \[48, 32\]"):
            load_weights(checkpoint(raw, Tensors(wrong)), torch.float32, CPU)


# Files


def test_shards_are_one_checkpoint_with_the_same_digest(tmp_path: Path) -> None:
    one, many, other = tmp_path / "one", tmp_path / "many", tmp_path / "other"
    tiny.save_tiny("qwen3", one)
    tiny.save_tiny("qwen3", many, max_shard_size="200KB")
    tiny.save_tiny("qwen3", other, seed=1)
    assert len(list(many.glob("*.safetensors"))) > 2
    for a, b in zip(load(one).tensors(), load(many).tensors(), strict=True):
        assert torch.equal(a, b)
    digests = [open_safetensors(path).digest() for path in (one, many, other)]
    assert len(digests[0]) == 32
    assert digests[0] == digests[1] != digests[2]
    data = bytearray((one / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (one / "model.safetensors").write_bytes(data)
    assert open_safetensors(one).digest() != digests[0]


Header = dict[str, Any]


def write_raw(path: Path, header: object, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "model.safetensors").write_bytes((length or len(text)).to_bytes(8, "little") + text + data)


def entry(start: int, stop: int, shape: list[Any], dtype: str = "F32") -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry(0, 16, [4])}, 12, "truncated: tensor a ends at byte .*, the file at"),
        ({"a": entry(0, 16, [4])}, 20, r"4 bytes follow the last tensor \(a\)"),
        ({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, 24, "tensor b starts .* overlaps a"),
        ({"a": entry(0, 16, [4]), "b": entry(20, 36, [4])}, 36, "tensor b starts .* leaves a hole after a"),
        ({"a": entry(0, 16, [5])}, 16, r"tensor a \(F32 \[5\]\) needs 20 bytes, but .* hold 16"),
        ({"a": entry(16, 0, [4])}, 16, "tensor a .* needs 16 bytes, but .* hold -16"),
        ({"a": entry(0, 16, [4], "Q4")}, 16, "tensor a has the unknown dtype 'Q4'"),
        ({"a": entry(0, 16, [4], 3)}, 16, "tensor a has the unknown dtype 3"),
        ({"a": entry(0, 16, [-4])}, 16, "tensor a has shape"),
        ({"a": entry(0, 16, [2**62, 2**62])}, 16, "tensor a .* needs"),
        ({"a": entry(0, 16, [True, 4])}, 16, "tensor a has shape"),
        ({"a": {"dtype": "F32", "shape": [4]}}, 16, "tensor a must have"),
        ({"a": 3}, 16, "tensor a must have"),
        ([1], 0, "list where an object is expected"),
        (b'{"a": ', 0, "not JSON at line 1, column 7"),
        (b'{"a": 1, "a": 2}', 0, "'a' is given twice"),
        (b"\xff\xfe", 0, "not UTF-8 at byte 0"),
        (b"[" * 100_000, 0, "nested too deeply"),
    ],
)
def test_a_damaged_header_is_refused_with_what_is_wrong(header: object, data: int, words: str, tmp_path: Path) -> None:
    write_raw(tmp_path, {"a": entry(0, 16, [4])}, bytes(16))
    open_safetensors(tmp_path)
    write_raw(tmp_path, header, bytes(data))
    with pytest.raises(ModelError, match=words) as refusal:
        open_safetensors(tmp_path)
    assert "model.safetensors" in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"1234567", (2**63).to_bytes(8, "little") + b"{}", b"version https://git"])
def test_a_file_too_short_for_its_header_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="its header claims"):
        open_safetensors(tmp_path)


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ModelError):
            open_safetensors(tmp_path)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    tiny.save_tiny("llama", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.norm.weight"] = stored["model.norm.weight"].to(torch.int8)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.norm\.weight is I8; weights must be F32, F16, BF16"):
        load(tmp_path)


def test_a_pickle_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        open_safetensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle, which can run code"):
        open_safetensors(tmp_path)


def _drop_shard(path: Path, index: Header) -> None:
    (path / sorted(set(index["weight_map"].values()))[1]).unlink()


def _invent_tensor(path: Path, index: Header) -> None:
    index["weight_map"]["model.extra.weight"] = sorted(set(index["weight_map"].values()))[0]


def _swap_files(path: Path, index: Header) -> None:
    names = sorted(index["weight_map"])
    index["weight_map"][names[0]] = next(
        file for file in index["weight_map"].values() if file != index["weight_map"][names[0]]
    )


def _climb(path: Path, index: Header) -> None:
    name = sorted(index["weight_map"])[0]
    index["weight_map"][name] = f"../{path.name}/{index['weight_map'][name]}"


def _no_map(path: Path, index: Header) -> None:
    index["weight_map"] = []


def _twice(path: Path, index: Header) -> None:
    first, second = sorted(set(index["weight_map"].values()))[:2]
    both = {**load_file(path / second), **dict([next(iter(load_file(path / first).items()))])}
    save_file(both, path / second)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop_shard, "names the file .* which is missing"),
        (_invent_tensor, r"says that model\.extra\.weight is in .* but it is not"),
        (_swap_files, "says that .* is in .* but it is not"),
        (_climb, "is not the name of a file beside it"),
        (_no_map, r"weight_map is \[\]; it must be an object"),
        (_twice, "is in .* too"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    damage: Callable[[Path, Header], None], words: str, tmp_path: Path
) -> None:
    tiny.save_tiny("llama", tmp_path, max_shard_size="200KB")
    load(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    damage(tmp_path, index)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=words):
        open_safetensors(tmp_path)


# The directory


def test_a_directory_opens_with_its_text_and_end_tokens(tmp_path: Path) -> None:
    tiny.save_tiny("qwen2", tmp_path)
    opened = open_directory(tmp_path)
    assert opened.config.family == "qwen2"
    assert opened.eos_token_ids == {1}
    assert opened.defaults == SamplingOptions()
    assert load_weights(opened, torch.float32, CPU).n_parameters > 100_000


def test_generation_config_sets_only_what_it_sets(tmp_path: Path) -> None:
    tiny.save_tiny("llama", tmp_path)
    write_json(tmp_path / "generation_config.json", eos_token_id=[3, 2], do_sample=False, temperature=0.6, top_k=20)
    opened = open_directory(tmp_path)
    assert opened.defaults == SamplingOptions(temperature=0.0, top_k=20), "do_sample=false is greedy, whatever else"
    assert opened.eos_token_ids == {1, 2, 3}, "its own and the tokenizer's"
    write_json(tmp_path / "generation_config.json", top_p=0.9, min_p=0.1, typical_p=0.8, repetition_penalty=1.1)
    assert open_directory(tmp_path).defaults == SamplingOptions(
        top_p=0.9, min_p=0.1, typical_p=0.8, repetition_penalty=1.1
    )
    (tmp_path / "generation_config.json").unlink()
    change_json(tmp_path / "config.json", eos_token_id=2)
    assert open_directory(tmp_path).eos_token_ids == {1, 2}, "config.json's where there is no other"


def test_stop_strings_of_generation_config_are_stops(tmp_path: Path) -> None:
    tiny.save_tiny("llama", tmp_path)
    for given, stop in (("###", ("###",)), (["a", "b"], ("a", "b")), (None, ())):
        write_json(tmp_path / "generation_config.json", stop_strings=given)
        assert open_directory(tmp_path).defaults == SamplingOptions(stop=stop)


def test_what_generation_config_asks_for_in_vain_is_told_in_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.save_tiny("llama", tmp_path)
    unheeded = {
        "num_beams": 4, "no_repeat_ngram_size": 3, "suppress_tokens": [5], "max_new_tokens": 20,
        "min_new_tokens": 2, "bad_words_ids": [[7]], "forced_bos_token_id": 0, "guidance_scale": 1.5,
        "max_length": 20, "somebody_elses": "key", "sequence_bias": [[[7], -1.0]] * 100,
    }  # fmt: skip
    write_json(tmp_path / "generation_config.json", temperature=0.5, eos_token_id=1, pad_token_id=0, **unheeded)
    assert open_directory(tmp_path).defaults == SamplingOptions(temperature=0.5), "nothing that could refuse a request"
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    message = warning.getMessage()
    _, _, told = message.partition("generation_config.json: not followed: ")
    assert re.findall(r"(\w+)=", told) == sorted(unheeded)
    assert "num_beams=4" in told
    assert len(message) < 600


def test_neutral_values_in_generation_config_are_worth_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.save_tiny("llama", tmp_path)
    write_json(
        tmp_path / "generation_config.json", do_sample=True, num_beams=1, no_repeat_ngram_size=0, max_new_tokens=None,
        max_length=512, suppress_tokens=[], guidance_scale=1.0, length_penalty=2.0, use_cache=True, top_k=5, top_p=0.9,
        transformers_version="5.0", bos_token_id=0, pad_token_id=[0], eos_token_id=[1], stop_strings=["x"],
    )  # fmt: skip
    open_directory(tmp_path)
    assert caplog.records == []
    theirs = transformers.GenerationConfig(bos_token_id=0, eos_token_id=1, do_sample=True, temperature=0.5)
    theirs.save_pretrained(tmp_path)
    open_directory(tmp_path)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stop_strings": 7}, r"generation_config.json.*stop_strings is 7; it must be a list of strings"),
        ({"stop_strings": ["a", ""]}, r"generation_config.json: sampling.stop\[1\]: '' .* 1 to 1024 bytes"),
        ({"temperature": -1.0}, "generation_config.json.*temperature.*-1.0"),
        ({"temperature": "hot"}, "generation_config.json.*temperature.*'hot'"),
        ({"top_k": 2.5}, "generation_config.json.*top_k.*2.5"),
        ({"eos_token_id": 512}, "generation_config.json.*eos_token_id 512"),
        ({"eos_token_id": ["</s>"]}, "generation_config.json.*eos_token_id"),
    ],
)
def test_a_senseless_generation_config_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    tiny.save_tiny("llama", tmp_path)
    write_json(tmp_path / "generation_config.json", **changes)
    with pytest.raises(ModelError, match=words):
        open_directory(tmp_path)


def test_damaged_json_is_refused_with_file_line_and_column(tmp_path: Path) -> None:
    tiny.save_tiny("llama", tmp_path)
    whole = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(whole[:-20])
    with pytest.raises(ModelError, match=r"config\.json: not JSON at line \d+, column \d+"):
        open_directory(tmp_path)
    (tmp_path / "config.json").write_text(whole)
    (tmp_path / "tokenizer.json").write_text("")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not JSON at line 1, column 1: Expecting value"):
        open_directory(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        open_directory(tmp_path)


def test_a_stored_unembedding_is_tied_only_if_it_equals_the_embedding(tmp_path: Path) -> None:
    tiny.save_tiny("qwen3", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    tied = open_directory(tmp_path)
    weights = load_weights(tied, torch.float32, CPU)
    assert tied.config.tied_embeddings
    assert weights.unembed is weights.embed
    stored["lm_head.weight"][511, 63] += 1
    save_file(stored, tmp_path / "model.safetensors")
    untied = open_directory(tmp_path)
    assert not untied.config.tied_embeddings
    assert torch.equal(load_weights(untied, torch.float32, CPU).unembed, stored["lm_head.weight"])


def write_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(fields))


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# Memory

LOAD_AND_MEASURE = """
import json, sys, threading, torch
from pathlib import Path
from cutaway_server.model.checkpoint import Checkpoint, load_weights
from cutaway_server.model.families import layout, read_config
from cutaway_server.model.safetensors_files import open_safetensors

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

torch.set_num_threads(1)
path, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
torch.ones(64, 64, dtype=torch.bfloat16).float()
raw = json.loads((path / "config.json").read_text())
reader = open_safetensors(path)
checkpoint = Checkpoint(read_config(raw), layout(raw, reader.names()), reader, None, frozenset())
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

thread = threading.Thread(target=watch)
thread.start()
weights = load_weights(checkpoint, dtype, torch.device("cpu"))
done.set()
thread.join()
print(json.dumps({"resident": weights.n_bytes, "peak": max(peak[0], anonymous()) - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    raw = llama_raw(hidden_size=1024, intermediate_size=2816, num_hidden_layers=5, vocab_size=16_000)
    write_json(tmp_path / "config.json", **raw)
    stored = {name: tensor.bfloat16() for name, tensor in random_tensors(raw).items()}
    save_file(stored, tmp_path / "model.safetensors")
    for dtype, least in (("bfloat16", 140e6), ("float32", 280e6)):
        ran = subprocess.run(
            [sys.executable, "-c", LOAD_AND_MEASURE, str(tmp_path), dtype], capture_output=True, text=True, check=True
        )
        measured = json.loads(ran.stdout)
        assert measured["resident"] > least
        assert 0.9 * measured["resident"] < measured["peak"] <= 1.3 * measured["resident"], measured
        print(measured)

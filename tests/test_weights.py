"""Weights by TransformerLens's names, and the tokens that vectors are about, against transformers' own tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cutaway import AsyncClient, Client, FailedPrecondition, InvalidArgument, PermissionDenied, ResourceExhausted
from secured import write_keys
from serving import serving
from torch import Tensor

A, M = "blocks.1.attn.", "blocks.1.mlp."
H, K, D = 4, 2, 24  # of the tiny qwen3 and Gemmas


def by_head(weight: Tensor, heads: int) -> Tensor:
    """nn.Linear's [heads * d_head, d_model] as [head, d_model, d_head]."""
    return weight.unflatten(0, (heads, -1)).transpose(1, 2)


def gpt2(model: Any) -> dict[str, Tensor]:
    """TransformerLens's layout of transformers' GPT-2, whose Conv1D is in-features first."""
    block = model.transformer.h[1]
    q, k, v = block.attn.c_attn.weight.split(64, 1)
    bq, bk, bv = block.attn.c_attn.bias.split(64)
    return {
        "embed.W_E": model.transformer.wte.weight,
        "pos_embed.W_pos": model.transformer.wpe.weight,
        "unembed.W_U": model.lm_head.weight.T,
        **{A + f"W_{n}": w.unflatten(1, (4, 16)).transpose(0, 1) for n, w in zip("QKV", (q, k, v), strict=True)},
        **{A + f"b_{n}": b.unflatten(0, (4, 16)) for n, b in zip("QKV", (bq, bk, bv), strict=True)},
        A + "W_O": block.attn.c_proj.weight.unflatten(0, (4, 16)),
        A + "b_O": block.attn.c_proj.bias,
        M + "W_in": block.mlp.c_fc.weight,
        M + "b_in": block.mlp.c_fc.bias,
        M + "W_out": block.mlp.c_proj.weight,
        M + "b_out": block.mlp.c_proj.bias,
        "blocks.1.ln1.w": block.ln_1.weight,
        "blocks.1.ln1.b": block.ln_1.bias,
        "blocks.1.ln2.w": block.ln_2.weight,
        "ln_final.w": model.transformer.ln_f.weight,
        "ln_final.b": model.transformer.ln_f.bias,
    }


def gated(model: Any) -> dict[str, Tensor]:
    """TransformerLens's layout of Qwen 3 and Gemma 3."""
    block, gemma = model.model.layers[1], model.config.model_type.startswith("gemma")
    attention, mlp, one = block.self_attn, block.mlp, 1.0 if gemma else 0.0
    before_mlp = block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm
    found = {
        "embed.W_E": model.model.embed_tokens.weight,
        "unembed.W_U": model.lm_head.weight.T,
        A + "W_Q": by_head(attention.q_proj.weight, H),
        A + "W_K": by_head(attention.k_proj.weight, K),
        A + "W_V": by_head(attention.v_proj.weight, K),
        A + "W_O": attention.o_proj.weight.T.unflatten(0, (H, D)),
        A + "q_norm.w": one + attention.q_norm.weight,
        A + "k_norm.w": one + attention.k_norm.weight,
        M + "W_gate": mlp.gate_proj.weight.T,
        M + "W_in": mlp.up_proj.weight.T,
        M + "W_out": mlp.down_proj.weight.T,
        "blocks.1.ln1.w": one + block.input_layernorm.weight,
        "blocks.1.ln2.w": one + before_mlp.weight,
        "ln_final.w": one + model.model.norm.weight,
    }
    if gemma:
        found["blocks.1.ln1_post.w"] = one + block.post_attention_layernorm.weight
        found["blocks.1.ln2_post.w"] = one + block.post_feedforward_layernorm.weight
    return found


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma3"])
def test_every_weight_is_transformers_in_the_layout_of_transformerlens(family: str, tmp_path: Path) -> None:
    model = tiny.save_tiny(family, tmp_path)
    expected = gpt2(model) if family == "gpt2" else gated(model)
    with serving(tmp_path, serve_weights=True) as live, Client(live.address) as client:
        for name, weight in expected.items():
            told = client.weights(name)
            assert (told.name, told.model_hash) == (name, client.model().model_hash)
            assert told.shape == tuple(weight.shape), name
            assert np.array_equal(told, weight.detach().numpy()), name
        for absent in ("blocks.1.attn.b_Q",) if family == "qwen3" else ():
            with pytest.raises(InvalidArgument, match=f"name: '{absent}'"):
                client.weights(absent)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny.save_tiny("gemma3", path)
    with serving(path, serve_weights=True, max_capture_bytes=100_000) as live, Client(live.address) as client:
        yield SimpleNamespace(client=client, live=live, model=model, weights=gated(model))


def test_slices_say_which_places_they_are_of(served: SimpleNamespace) -> None:
    out = served.weights[A + "W_O"].detach().numpy()
    told = served.client.weights(A + "W_O", head=2, d_model=[5, -1], d_head=range(4, 9))
    assert told.axes == ("head", "d_head", "d_model")
    assert (told.at["head"], told.at["d_head"], told.at["d_model"]) == (range(2, 3), range(4, 9), (5, 63))
    assert np.array_equal(told, out[[2]][:, 4:9][:, :, [5, 63]])
    assert np.array_equal(
        served.client.weights("W_E", d_vocab=[300, 7]), served.weights["embed.W_E"].detach()[[7, 300]]
    )
    assert np.array_equal(served.client.weights("W_U", d_vocab=7)[:, 0], served.weights["unembed.W_U"].detach()[:, 7])


def test_several_layers_are_one_tensor(served: SimpleNamespace) -> None:
    every = served.client.weights("blocks.*.mlp.W_out", d_mlp=[3, 100])
    assert every.axes == ("layer", "d_mlp", "d_model")
    for layer, block in enumerate(served.model.model.layers):
        assert np.array_equal(every[layer], block.mlp.down_proj.weight.T.detach()[[3, 100]])
    some = served.client.weights("blocks.*.mlp.W_out", layers=[2, 0], d_mlp=[3, 100], dtype="BF16")
    assert some.at["layer"] == (0, 2)
    assert np.allclose(some, every.values[[0, 2]], rtol=1e-2)
    assert np.array_equal(some.values, some.to_torch().bfloat16().float())
    assert served.client.weights("blocks.*.ln1.w", dtype="F16").dtype == np.float16


def test_the_largest_come_within_the_limits_of_the_request_and_the_server(served: SimpleNamespace) -> None:
    size = 4 * 3 * 64 * 112
    with pytest.raises(ResourceExhausted, match=f"{size} bytes, and {size - 1} are allowed"):
        served.client.weights("blocks.*.mlp.W_in", max_bytes=size - 1)
    assert served.client.weights("blocks.*.mlp.W_in", max_bytes=size).shape == (3, 64, 112)
    with pytest.raises(ResourceExhausted, match=f"{4 * 512 * 64} bytes, and 100000 are allowed"):
        served.client.weights("W_E", max_bytes=2**40)


def logit_effects(model: Any, vector: Tensor) -> Tensor:
    with torch.no_grad():
        return model.lm_head(vector * (1 + model.model.norm.weight))


def test_a_vectors_tokens_are_those_whose_logits_it_moves(served: SimpleNamespace) -> None:
    vector = torch.randn(64, generator=torch.Generator().manual_seed(2))
    told = served.client.nearest_tokens(vector.numpy(), top_k=5)
    effects = logit_effects(served.model, vector)
    for mine, largest in ((told.largest, True), (told.smallest, False)):
        top = effects.topk(5, largest=largest)
        assert [token.id for token in mine] == top.indices.tolist()
        assert [token.score for token in mine] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert told.largest[0].text == served.client.detokenize([told.largest[0].id]).text
    file = served.client.put_vectors({"v": vector.numpy()})
    assert served.client.nearest_tokens(file["v"], top_k=5) == told


@pytest.mark.parametrize("measure", ["unembed cosine", "embed cosine"])
def test_a_tokens_own_row_is_nearest_to_it(served: SimpleNamespace, measure: Any) -> None:
    rows = served.model.lm_head.weight if measure == "unembed cosine" else served.model.model.embed_tokens.weight
    told = served.client.nearest_tokens(rows[123].detach().numpy() * 3, measure=measure, top_k=4)
    assert told.largest[0].id == 123
    assert told.largest[0].score == pytest.approx(1, abs=1e-5)
    cosines = torch.cosine_similarity(rows, rows[123:124]).topk(4)
    assert [token.score for token in told.largest] == pytest.approx(cosines.values.tolist(), abs=1e-5)


def test_a_neurons_tokens_are_those_that_its_row_moves(served: SimpleNamespace) -> None:
    block = served.model.model.layers[2]
    row = block.mlp.down_proj.weight[:, 40] * (1 + block.post_feedforward_layernorm.weight)
    told = served.client.nearest_tokens(neuron=(2, 40), top_k=3)
    effects = logit_effects(served.model, row.detach())
    assert [token.id for token in told.largest] == effects.topk(3).indices.tolist()
    assert [token.id for token in told.smallest] == effects.topk(3, largest=False).indices.tolist()


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda c: c.weights("blocks.1.attn.W_X"), "nearest: blocks.{i}.attn.W_"),
        (lambda c: c.weights("blocks.3.attn.W_Q"), "layers 0 to 2"),
        (lambda c: c.weights("blocks.1.attn.W_Q", layers=[1]), "layers"),
        (lambda c: c.weights("blocks.1.attn.W_Q", kv_head=[1]), r"select\[0\].axis: 'kv_head'.*head, d_model, d_head"),
        (lambda c: c.weights("blocks.1.attn.W_Q", head=[4]), r"select\[0\].indices: 4"),
        (lambda c: c.weights("W_E", dtype="F8"), "dtype: 'F8'"),
        (lambda c: c.nearest_tokens(np.zeros(63)), "vector"),
        (lambda c: c.nearest_tokens(np.zeros((2, 64))), "vector: '128 numbers'"),
        (lambda c: c.nearest_tokens(np.full(64, np.nan)), "finite"),
        (lambda c: c.nearest_tokens(neuron=(3, 0)), "neuron.layer: 3"),
        (lambda c: c.nearest_tokens(neuron=(0, 112)), "neuron.index: 112"),
        (lambda c: c.nearest_tokens(np.zeros(64), top_k=513), "top_k: 513"),
        (lambda c: c.nearest_tokens(), "give a vector or a neuron"),
        (lambda c: c.nearest_tokens(np.zeros(64), measure="near"), "measure"),
    ],
)
def test_what_is_impossible_is_refused(served: SimpleNamespace, ask: Any, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        ask(served.client)


def test_weights_are_closed_unless_the_operator_and_the_scope_allow_them(tmp_path: Path) -> None:
    tiny.save_tiny("llama", tmp_path / "tiny")
    keys = write_keys(tmp_path / "keys.toml", {"w": (["weights"], "t"), "i": (["introspect"], "t")})
    with serving(tmp_path / "tiny") as live, Client(live.address) as client:
        for ask in (lambda: client.weights("W_E"), lambda: client.nearest_tokens(neuron=(0, 0))):
            with pytest.raises(FailedPrecondition, match="--serve-weights"):
                ask()
    with serving(tmp_path / "tiny", api_keys=str(tmp_path / "keys.toml"), serve_weights=True) as live:
        with Client(live.address, api_key=keys["w"]) as client:
            assert client.weights("ln_final.w").shape == (64,)
        with Client(live.address, api_key=keys["i"]) as client, pytest.raises(PermissionDenied, match="weights"):
            client.weights("ln_final.w")


async def test_the_asynchronous_client_reads_weights_too(served: SimpleNamespace) -> None:
    async with AsyncClient(served.live.address) as client:
        assert np.array_equal(await client.weights(A + "W_V"), served.client.weights(A + "W_V"))
        assert await client.nearest_tokens(neuron=(1, 1)) == served.client.nearest_tokens(neuron=(1, 1))
        with pytest.raises(InvalidArgument):
            await client.weights("W_X")

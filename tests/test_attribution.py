"""What each part adds to a logit, against transformers' values and weights taken apart by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cutaway import AsyncClient, Client, Edit, InvalidArgument
from hooked import Hooked
from serving import serving
from torch import Tensor

PROMPT = list(range(40, 75))
TARGET, MINUS = 17, 203


class ByHand:
    """Contributions the other way round: each part through W_O or W_out, the norm after it, and the final norm."""

    def __init__(self, model: Any, ids: list[int]) -> None:
        self.oracle, self.model = Hooked(model, ids), model
        self.kind = model.config.model_type
        self.gpt2 = self.kind == "gpt2"
        inner = model.transformer if self.gpt2 else model.model
        self.final = inner.ln_f if self.gpt2 else inner.norm
        self.token = model.lm_head.weight[TARGET] - model.lm_head.weight[MINUS]

    def gain(self, norm: Any) -> Tensor:
        return 1 + norm.weight if self.kind.startswith("gemma") else norm.weight

    def through_final(self, x: Tensor) -> Tensor:
        """What rows [..., pos, d_model] of a part of the residual add to the logits."""
        if self.gpt2:
            x = x - x.mean(-1, keepdim=True)
        return x * self.gain(self.final) / self.oracle.values["ln_final.hook_scale"] @ self.token

    def added(self, layer: int, name: str, x: Tensor) -> Tensor:
        """A part of what attention ("ln1") or the MLP ("ln2") of a layer gives, after the norm that follows it."""
        block = self.oracle.blocks[layer]
        scale = self.oracle.values.get(f"blocks.{layer}.{name}_post.hook_scale")
        if scale is None:
            return x
        norm = block.post_attention_layernorm if name == "ln1" else block.post_feedforward_layernorm
        return x / scale * self.gain(norm)

    def heads(self, layer: int) -> Tensor:
        results = self.oracle.values[f"blocks.{layer}.attn.hook_result"].transpose(0, 1)  # [head, pos, d_model]
        return self.through_final(self.added(layer, "ln1", results)).T

    def neurons(self, layer: int) -> Tensor:
        mlp = self.oracle.blocks[layer].mlp
        weight = mlp.c_proj.weight.T if self.gpt2 else mlp.down_proj.weight  # [d_model, d_mlp]
        parts = self.oracle.values[f"blocks.{layer}.mlp.hook_post"].T[:, :, None] * weight.T[:, None]
        return self.through_final(self.added(layer, "ln2", parts)).T


def near(mine: Any, theirs: Tensor, scale: float) -> bool:
    return bool(np.allclose(np.asarray(mine), theirs.detach().numpy(), atol=1e-4 * max(1.0, scale)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_part_of_every_family_is_what_its_values_and_weights_make(family: str, tmp_path: Path) -> None:
    by_hand = ByHand(tiny.save_tiny(family, tmp_path), PROMPT)
    values = by_hand.oracle.values
    with serving(tmp_path) as live, Client(live.address) as client:
        width = client.model().architecture.d_mlp
        told = client.attribution(token_ids=PROMPT, target=TARGET, minus=MINUS, positions="all", neurons=width)
        served = client.trace(token_ids=PROMPT, points=["logits"])["logits"].values
        one = client.attribution(token_ids=PROMPT, target=TARGET, positions="all").logit.values
        other = client.attribution(token_ids=PROMPT, target=MINUS, positions="all").logit.values
    cap = getattr(by_hand.model.config, "final_logit_softcapping", None)
    for mine, token in ((one, TARGET), (other, MINUS)):  # before soft-capping
        assert np.allclose(cap * np.tanh(mine / cap) if cap else mine, served[:, token], atol=1e-4), token
    assert np.allclose(told.logit, one - other, atol=1e-4)
    size = float(np.abs(told.logit.values).max())
    assert near(told.embed, by_hand.through_final(values["hook_embed"]), size)
    for layer in range(3):
        for mine, name in ((told.attn, "hook_attn_out"), (told.mlp, "hook_mlp_out")):
            assert near(mine[layer], by_hand.through_final(values[f"blocks.{layer}.{name}"]), size), (layer, name)
        assert near(told.heads[layer], by_hand.heads(layer), size), layer
        neurons = np.zeros((len(PROMPT), width), np.float32)
        np.put_along_axis(neurons, told.neuron_indices[layer].astype(int), told.neurons[layer], -1)
        assert near(neurons, by_hand.neurons(layer), size), layer
    whole = told.embed.values + told.norm_bias.values + told.attn.values.sum(0) + told.mlp.values.sum(0)
    whole = whole + (0 if told.pos_embed is None else told.pos_embed.values)
    assert np.allclose(whole, told.logit, atol=1e-3 * max(1, size)), "contributions add up to the logit"
    for rest in (told.unexplained, told.attn_rest, told.mlp_rest):
        assert np.abs(rest.values).max() < 1e-4 * max(1, size), "nothing is left over but rounding"
    assert (told.pos_embed is not None) == (family == "gpt2")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny.save_tiny("gemma3", path)
    with serving(path, max_batch_tokens=16, max_running=8) as live, Client(live.address) as client:
        yield SimpleNamespace(client=client, live=live, model=model)


def test_positions_and_neurons_are_chosen_and_axes_say_which(served: SimpleNamespace) -> None:
    whole = served.client.attribution(token_ids=PROMPT, target=TARGET, positions="all", neurons=112)
    some = served.client.attribution(token_ids=PROMPT, target=TARGET, positions=[-1, 3], neurons=4)
    assert some.heads.axes == ("layer", "pos", "head")
    assert some.heads.positions == (3, 34)
    assert some.heads.shape == (3, 2, 4)
    assert np.array_equal(some.heads, whole.heads.values[:, [3, 34]])
    assert np.array_equal(some.neuron_indices, whole.neuron_indices.values[:, [3, 34], :4])
    assert (np.diff(np.abs(some.neurons.values), axis=-1) <= 0).all()
    left_out = whole.neurons.values[:, [3, 34], 4:].sum(-1)
    assert np.allclose(some.mlp_rest, left_out + whole.mlp_rest.values[:, [3, 34]], atol=1e-5)
    last = served.client.attribution(token_ids=PROMPT, target=TARGET, neurons=0)
    assert (last.logit.positions, last.neurons, last.mlp_rest) == ((34,), None, None)
    assert np.array_equal(last.attn, whole.attn.values[:, 34:])


def test_generated_rows_are_taken_apart_too(served: SimpleNamespace) -> None:
    stream = served.client.complete(token_ids=PROMPT, max_tokens=4, temperature=0, ignore_eos=True)
    ids = [*PROMPT, *stream.token_ids[:3]]
    whole = served.client.attribution(token_ids=ids, target=TARGET, positions="all")
    last = served.client.attribution(token_ids=ids, target=TARGET)
    assert np.array_equal(last.heads, whole.heads.values[:, -1:])


def test_edits_are_seen_and_those_of_the_residual_are_unexplained(served: SimpleNamespace) -> None:
    ask = {"token_ids": PROMPT, "target": TARGET}
    ablated = served.client.attribution(**ask, edits=[Edit.zero("z.2", heads=[1])])
    assert np.abs(ablated.heads.values[2, :, 1]).max() == 0
    assert np.abs(ablated.unexplained.values).max() < 1e-3
    steered = served.client.attribution(**ask, edits=[Edit.add("resid_post.1", np.ones(64), scale=9)])
    assert np.abs(steered.unexplained.values).max() > 1e-2


def test_tokens_are_named_by_id_or_by_a_text_that_is_one(served: SimpleNamespace) -> None:
    text = served.client.detokenize([300]).text
    assert served.client.tokenize(text, add_special_tokens=False).ids == (300,)
    by_text = served.client.attribution(token_ids=PROMPT, target=text)
    assert np.array_equal(by_text.logit, served.client.attribution(token_ids=PROMPT, target=300).logit)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "target: name the token"),
        ({"target": 512}, r"target.id: 512 .* \[0, 512\)"),
        ({"target": 3, "minus": -1}, "minus: -1 cannot be sent"),
        ({"target": "several words are no token"}, "target.text.*must be one token, and is"),
        ({"target": 3, "neurons": 113}, "neurons: 113.*at most 112"),
        ({"target": 3, "positions": [99]}, "captures.*positions.*99"),
        ({"target": 3, "minus": ""}, "minus.text.*is 0"),
    ],
)
def test_what_is_impossible_is_refused(served: SimpleNamespace, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        served.client.attribution(token_ids=PROMPT, **options)


async def test_the_asynchronous_client_asks_for_several(served: SimpleNamespace) -> None:
    alone = served.client.attribution(token_ids=PROMPT, target=TARGET)
    async with AsyncClient(served.live.address) as client:
        both = await client.attribution(prompts=[PROMPT, PROMPT[:4]], target=TARGET)
    assert np.array_equal(both[0].heads, alone.heads)
    assert both[1].logit.positions == (3,)


def test_bf16_tells_what_rounding_leaves_over(tmp_path: Path) -> None:
    tiny.save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    with serving(tmp_path, dtype="bfloat16") as live, Client(live.address) as client:
        told = client.attribution(token_ids=PROMPT, target=TARGET, minus=MINUS, neurons=112)
        served = client.trace(token_ids=PROMPT, points=["logits"], positions="last")["logits"].values[0]
    assert np.allclose(told.logit, served[TARGET] - served[MINUS], atol=0.05)
    whole = told.embed.values + told.norm_bias.values + told.attn.values.sum(0) + told.mlp.values.sum(0)
    assert np.allclose(whole + told.unexplained.values, told.logit, atol=1e-4)
    assert np.allclose(told.heads.values.sum(-1) + told.attn_bias.values + told.attn_rest.values, told.attn, atol=1e-4)
    for rest in (told.unexplained, told.attn_rest, told.mlp_rest):
        assert 0 < np.abs(rest.values).max() < 0.1

"""Sweeps on a real server against the same patches and ablations made one by one by hooks in transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cutaway import (
    AsyncClient,
    Client,
    Divergence,
    Edit,
    InvalidArgument,
    Logit,
    LogitDifference,
    PermissionDenied,
    Probability,
)
from hooked import Hooked
from secured import write_keys
from serving import eventually, serving

CLEAN, CORRUPT = [5, 60, 61, 62, 63, 64, 65, 66], [5, 60, 99, 62, 63, 64, 65, 66]
TARGET, MINUS = 17, 203


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny.save_tiny("qwen3", path)
    with serving(path, max_batch_tokens=64, max_running=16) as live, Client(live.address) as client:
        yield SimpleNamespace(client=client, live=live, model=model, clean=Hooked(model, CLEAN).values)


def changed(model: Any, module: Any, change: Callable[[torch.Tensor], None], ids: list[int] = CORRUPT) -> torch.Tensor:
    """The last row's logits of a prompt with a module's input changed in place."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = (args[0] if args else kwargs["hidden_states"]).clone()
        change(values[0])
        return ((values, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": values})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    handle.remove()
    return logits


def last_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


def difference(logits: torch.Tensor) -> float:
    return float(logits[TARGET] - logits[MINUS])


def test_patching_each_layer_and_position_is_what_hooks_do(served: SimpleNamespace) -> None:
    result = served.client.sweep(
        CLEAN, CORRUPT, point="hook_resid_pre", over=("layer", "pos"), metric=LogitDifference(TARGET, MINUS)
    )
    assert result.effects.axes == ("layer", "pos")
    assert result.effects.positions == tuple(range(8))
    assert result.unchanged == pytest.approx(difference(last_logits(served.model, CORRUPT)), abs=1e-4)
    assert result.clean == pytest.approx(difference(last_logits(served.model, CLEAN)), abs=1e-4)
    for layer in range(3):
        for position in range(8):
            clean = served.clean[f"blocks.{layer}.hook_resid_pre"]

            def patch(x: torch.Tensor, clean: torch.Tensor = clean, position: int = position) -> None:
                x[position] = clean[position]

            expected = difference(changed(served.model, served.model.model.layers[layer], patch))
            assert result.effects[layer, position] == pytest.approx(expected, abs=1e-4)
    assert result.effects[0, 2] == pytest.approx(result.clean, abs=1e-4), "the one token that differs"
    assert result.effects[0, 1] == pytest.approx(result.unchanged, abs=1e-4)


@pytest.mark.parametrize("ablate", ["zero", "mean"])
def test_ablating_each_head_is_what_hooks_do(served: SimpleNamespace, ablate: Any) -> None:
    result = served.client.sweep(CLEAN, point="z.*", over=("head", "layer"), metric=Divergence(), ablate=ablate)
    assert result.effects.axes == ("layer", "head"), "axes are in one order"
    assert result.clean is None
    assert result.unchanged == 0
    plain = torch.log_softmax(last_logits(served.model, CLEAN), -1)
    for layer in range(3):
        for head in range(4):

            def cut(x: torch.Tensor, head: int = head) -> None:
                z = x.view(8, 4, 24)
                z[:, head] = z[:, head].mean(0) if ablate == "mean" else 0

            module = served.model.model.layers[layer].self_attn.o_proj
            logprobs = torch.log_softmax(changed(served.model, module, cut, CLEAN), -1)
            expected = float((plain.exp() * (plain - logprobs)).sum())
            assert result.effects[layer, head] == pytest.approx(expected, abs=1e-4)


def test_all_at_once_where_an_axis_is_not_gone_over(served: SimpleNamespace) -> None:
    ask = {"point": "z.*", "metric": Probability(TARGET), "layers": [1], "heads": [0, 2]}
    whole = served.client.sweep(CLEAN, CORRUPT, over=(), **ask)
    z = served.clean["blocks.1.attn.hook_z"]

    def patch(x: torch.Tensor) -> None:
        x.view(8, 4, 24)[:, [0, 2]] = z[:, [0, 2]]

    logits = changed(served.model, served.model.model.layers[1].self_attn.o_proj, patch)
    assert whole.effects.shape == ()
    assert float(whole.effects.values) == pytest.approx(float(logits.softmax(-1)[TARGET]), abs=1e-5)
    by_head = served.client.sweep(CLEAN, CORRUPT, over="head", positions=[2, -1], **ask)
    assert by_head.effects.at["head"] == (0, 2)


def test_own_edits_are_made_in_every_case(served: SimpleNamespace) -> None:
    edit = Edit.zero("mlp_out.2")
    ask = {"point": "resid_pre.*", "metric": Logit(TARGET), "over": "layer", "edits": [edit]}
    result = served.client.sweep(CLEAN, CORRUPT, **ask)
    plain = served.client.trace(token_ids=CORRUPT, points=["logits"], edits=[edit], positions="last")["logits"]
    assert result.unchanged == pytest.approx(float(plain[0, TARGET]), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric": Logit(512)}, r"metric\.target\.id: 512"),
        ({"metric": None}, "metric: None"),
        ({"point": "resid_pre.1"}, 'point.*with "\\*" in place of a layer'),
        ({"point": "pattern.*"}, "writable"),
        ({"over": ("layer", "head")}, "over: 'head'.*layer, pos"),
        ({"over": ("depth",)}, "over: 'depth'"),
        ({"heads": [0]}, "has no heads"),
        ({"layers": [3]}, "layers: 3"),
        ({"positions": [8]}, "positions.*8"),
        ({"ablate": "zero"}, "give a prompt to patch into, or ablate"),
        ({"over": "pos", "edits": [Edit.zero("mlp_out.0")] * 14}, "at most 2 can be changed at once"),
    ],
)
def test_what_is_impossible_is_refused(served: SimpleNamespace, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        served.client.sweep(CLEAN, CORRUPT, **{"point": "resid_pre.*", "metric": Logit(TARGET), **options})
    assert eventually(served.live.is_clean)


def test_prompts_of_different_lengths_are_refused(served: SimpleNamespace) -> None:
    with pytest.raises(InvalidArgument, match=r"7 tokens.*as generate's prompt, which has 8"):
        served.client.sweep(CLEAN[1:], CORRUPT, point="resid_pre.*", metric=Logit(TARGET))


def test_sweeps_leave_nothing_behind_and_neighbours_as_they_are(served: SimpleNamespace) -> None:
    ask = {"token_ids": list(range(30, 60)), "max_tokens": 30, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    alone = served.client.complete(**ask)
    stream = served.client.generate(**ask)
    next(stream)
    served.client.sweep(CLEAN, CORRUPT, point="resid_mid.*", metric=Logit(TARGET))
    list(stream)
    beside = stream.answer()
    assert beside.token_ids == alone.token_ids
    mine, theirs = ([token.logprob for token in answer.completions[0].tokens] for answer in (alone, beside))
    assert mine == theirs
    assert eventually(served.live.is_clean)
    assert served.live.server._generation._held == 0


def test_a_sweep_asks_for_both_scopes(tmp_path: Any) -> None:
    tiny.save_tiny("llama", tmp_path / "tiny")
    keys = write_keys(tmp_path / "keys.toml", {"i": (["introspect"], "t"), "b": (["introspect", "edit"], "t")})
    ask = {"point": "resid_pre.*", "metric": Logit(TARGET), "over": "layer", "ablate": "zero"}
    with serving(tmp_path / "tiny", api_keys=str(tmp_path / "keys.toml")) as live:
        with Client(live.address, api_key=keys["i"]) as client, pytest.raises(PermissionDenied, match="scope edit"):
            client.sweep(CLEAN, **ask)
        with Client(live.address, api_key=keys["b"]) as client:
            assert np.isfinite(client.sweep(CLEAN, **ask).effects).all()


async def test_the_asynchronous_client_sweeps_too(served: SimpleNamespace) -> None:
    ask = {"point": "resid_pre.*", "metric": LogitDifference(TARGET, MINUS)}
    mine = served.client.sweep(CLEAN, CORRUPT, **ask)
    async with AsyncClient(served.live.address) as client:
        theirs = await client.sweep(CLEAN, CORRUPT, **ask)
        with pytest.raises(InvalidArgument):
            await client.sweep(CLEAN, CORRUPT, point="resid_pre.*", metric=Logit(512))
    assert np.array_equal(mine.effects, theirs.effects)

"""Runs kept on the server, and patches made from them, against the same patches made by hooks in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cutaway import (
    AsyncClient,
    Capture,
    Client,
    Edit,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from hooked import Hooked
from secured import write_keys
from serving import serving

CLEAN, CORRUPT = list(range(40, 70)), [*range(40, 50), 7, *range(51, 70)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny.save_tiny("qwen3", path)
    with serving(path, max_batch_tokens=16, max_running=8, stored_bytes=2**18) as live, Client(live.address) as client:
        yield SimpleNamespace(client=client, live=live, model=model, clean=Hooked(model, CLEAN))


def patched(model: Any, module: Any, change: Any) -> np.ndarray:
    """The corrupt prompt's logits with a module's input changed in place."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = (args[0] if args else kwargs["hidden_states"]).clone()
        change(values[0])
        return ((values, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": values})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        logits = model(torch.tensor([CORRUPT])).logits[0].numpy()
    handle.remove()
    return logits


def logits(client: Client, *edits: Edit) -> np.ndarray:
    return client.trace(token_ids=CORRUPT, points=["logits"], edits=edits)["logits"].values


def test_patches_from_a_run_are_those_of_hooks(served: SimpleNamespace) -> None:
    run = served.client.put_run(CLEAN, points=["resid_pre.*", "z.1"], name="clean")
    assert (run.kind, run.name) == ("run", "clean")
    assert run.tensors == {f"blocks.{i}.hook_resid_pre": (30, 64) for i in range(3)} | {
        "blocks.1.attn.hook_z": (30, 4, 24)
    }
    values = served.clean.values
    block = served.model.model.layers[1]

    def residual(x: torch.Tensor) -> None:
        x[[10, 29]] = values["blocks.1.hook_resid_pre"][[10, 29]]

    def heads(x: torch.Tensor) -> None:
        x.view(30, 4, 24)[10:, [1, 3]] = values["blocks.1.attn.hook_z"][10:, [1, 3]]

    def moved(x: torch.Tensor) -> None:
        x[20, :8] = values["blocks.1.hook_resid_pre"][3, :8]

    cases = {
        Edit.set("resid_pre.1", run, positions=[10, -1]): (block, residual),
        Edit.set("z.1", run, positions=range(10, 30), heads=[1, 3]): (block.self_attn.o_proj, heads),
        Edit.set("resid_pre.1", run, positions=[20], from_positions=[3], elements=range(8)): (block, moved),
    }
    plain = logits(served.client)
    for edit, (module, change) in cases.items():
        mine, theirs = logits(served.client, edit), patched(served.model, module, change)
        assert np.abs(mine - theirs).max() < 1e-4
        assert np.abs(mine - plain).max() > 1e-3
    served.client.delete_vectors(run)


def test_patching_every_layer_gives_each_its_own_and_the_clean_answer(served: SimpleNamespace) -> None:
    run = served.client.put_run(CLEAN, points=["resid_pre.*"])
    mine = logits(served.client, Edit.set("resid_pre.*", run))
    assert np.abs(mine - served.clean.values["logits"].detach().numpy()).max() < 1e-4
    served.client.delete_vectors(run)


def test_generated_rows_and_edited_values_are_kept_too(served: SimpleNamespace) -> None:
    made = served.client.complete(token_ids=CLEAN, max_tokens=4, temperature=0, ignore_eos=True)
    run = served.client.put_run(CLEAN, points=["mlp_out.2"], max_tokens=4, temperature=0, ignore_eos=True)
    assert run.positions["blocks.2.hook_mlp_out"] == tuple(range(33))
    ids = [*CLEAN, *made.token_ids[:3]]
    plain = served.client.trace(token_ids=ids, points=["logits"])["logits"]
    same = served.client.trace(token_ids=ids, points=["logits"], edits=[Edit.set("mlp_out.2", run)])["logits"]
    assert np.array_equal(plain, same), "what is set to what it is stays what it is"
    again = served.client.put_run(CLEAN, points=["mlp_out.2"], max_tokens=4, temperature=0, ignore_eos=True)
    assert again.id == run.id, "an id is a hash of the content"
    after = Capture("mlp_out.2", after_edits=True)
    zeroed = served.client.put_run(CLEAN, captures=[after], edits=[Edit.zero("mlp_out.2")])
    ablated = logits(served.client, Edit.set("mlp_out.2", zeroed))
    assert np.array_equal(ablated, logits(served.client, Edit.zero("mlp_out.2")))
    for file in (run, zeroed):
        served.client.delete_vectors(file)


def test_the_quota_refuses_before_anything_is_computed(served: SimpleNamespace) -> None:
    steps = served.live.engine.steps
    with pytest.raises(ResourceExhausted, match=f"max_capture_bytes is {2**18}"):
        served.client.put_run(CLEAN * 6, points=["resid_pre.*", "post.*"])
    assert served.live.engine.steps == steps
    assert served.client.list_vectors().bytes == 0


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda c, r: c.put_run(CLEAN, captures=[Capture("resid_pre.1", norm=True)]), "captures.0..norm"),
        (lambda c, r: c.put_run(CLEAN, points=["pattern.1"]), "cannot be set by an edit"),
        (lambda c, r: c.put_run(CLEAN, points=["logits"]), "cannot be set by an edit"),
        (lambda c, r: c.put_run(CLEAN, captures=[Capture("z.1", heads=[0])]), "whole rows are kept"),
        (lambda c, r: c.put_run(CLEAN, captures=[Capture("z.1", dtype="F16")]), "must be F32"),
        (lambda c, r: c.put_run(CLEAN, points=["z.1"], n=2, max_tokens=1), "sampling.n"),
        (lambda c, r: c.put_run(CLEAN, points=["z.1"], name="a b"), "name"),
        (lambda c, r: logits(c, Edit.set("resid_pre.2", r)), "is no tensor of"),
        (lambda c, r: logits(c, Edit.set("resid_pre.1", r)), "0 is not allowed: .* has not kept"),
        (lambda c, r: logits(c, Edit.set("resid_pre.1", r, positions=[5], from_positions=[5, 6])), "2 positions"),
        (lambda c, r: logits(c, Edit.set("resid_pre.1", c.put_vectors(np.ones(64)))), "is no run"),
    ],
)
def test_what_is_impossible_is_refused(served: SimpleNamespace, ask: Any, words: str) -> None:
    run = served.client.put_run(CLEAN, points=["resid_pre.1"], positions=[5, 6])
    with pytest.raises(InvalidArgument, match=words):
        ask(served.client, run)
    for file in served.client.list_vectors():
        served.client.delete_vectors(file)


def test_runs_are_a_tenants_own(tmp_path: Path) -> None:
    tiny.save_tiny("llama", tmp_path / "tiny")
    every = ["introspect", "edit", "generate"]
    keys = write_keys(tmp_path / "keys.toml", {"a": (every, "one"), "b": (every, "two")})
    with (
        serving(tmp_path / "tiny", api_keys=str(tmp_path / "keys.toml")) as live,
        Client(live.address, api_key=keys["a"]) as a,
        Client(live.address, api_key=keys["b"]) as b,
    ):
        run = a.put_run(CLEAN, points=["resid_pre.1"])
        with pytest.raises(InvalidArgument, match=r"set\.run\.id.*no file of this id"):
            logits(b, Edit.set("resid_pre.1", run))
        with pytest.raises(NotFound):
            b.delete_vectors(run)
        assert np.isfinite(logits(a, Edit.set("resid_pre.1", run))).all()


async def test_the_asynchronous_client_keeps_runs_too(served: SimpleNamespace) -> None:
    mine = served.client.put_run(CLEAN, points=["z.1"])
    async with AsyncClient(served.live.address) as client:
        assert (await client.put_run(CLEAN, points=["z.1"])).id == mine.id
        await client.delete_vectors(mine)

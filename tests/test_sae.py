"""Sparse autoencoders in SAELens's directories, served, against what SAELens encodes (tests/data/sae/make.py)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cutaway import AsyncClient, Capture, Client, Edit, InvalidArgument
from cutaway_server.captures import Sae
from cutaway_server.errors import ModelError
from cutaway_server.probe import features as probe_features
from cutaway_server.service.files import load_files
from safetensors.numpy import load_file
from serving import serving

DATA = Path(__file__).parent / "data" / "sae"
EXPECTED = load_file(DATA / "expected.safetensors")
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
PROMPT = list(range(40, 60))
ROWS = [2, 3, 5, 8, 13, 19]  # where the inputs that SAELens encoded are put
X = EXPECTED["x"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.save_tiny("llama", path, hidden_size=16, intermediate_size=40)
    with serving(path, max_batch_tokens=16, max_running=8, vectors=str(DATA)) as live, Client(live.address) as client:
        yield SimpleNamespace(client=client, live=live)


def put_there(name: str) -> Edit:
    """What makes the model's values the ones that SAELens encoded."""
    point = "blocks.1.attn.hook_z" if name == "hook_z" else "blocks.1.hook_resid_pre"
    values = X.reshape(6, 4, 4) if name == "hook_z" else X
    return Edit.set(point, values, positions=ROWS)


def dense(array: Any) -> np.ndarray:
    """All features of each row, of the most active ones."""
    whole = np.zeros((len(array), 24), np.float32)
    for row, (values, indices) in enumerate(zip(array.values, array.indices.values, strict=True)):
        assert (np.diff(values) <= 0).all()
        found = indices >= 0
        assert (values[~found] == 0).all()
        whole[row, indices[found]] = values[found]
    return whole


@pytest.mark.parametrize("name", NAMES)
def test_directories_load_unchanged_and_give_the_features_that_saelens_gives(
    served: SimpleNamespace, name: str
) -> None:
    file = served.client.put_vectors(DATA / name)
    assert (file.kind, file.sae.d_in, file.sae.d_sae) == ("sae", 16, 24)
    assert file.sae.hook_name == ("blocks.1.attn.hook_z" if name == "hook_z" else "blocks.1.hook_resid_pre")
    capture = Capture(sae=file, top_k=24, positions=ROWS, after_edits=True)
    [seen] = served.client.trace(token_ids=PROMPT, captures=[capture], edits=[put_there(name)]).values()
    assert (seen.name, seen.axes, seen.positions) == (file.sae.hook_name, ("pos", "top"), tuple(ROWS))
    assert np.allclose(dense(seen), EXPECTED[name], atol=1e-5)
    assert seen.parts["active"].values.tolist() == (EXPECTED[name] > 0).sum(-1).tolist()
    served.client.delete_vectors(file)


def test_the_most_active_of_the_operators_by_name_at_any_point(served: SimpleNamespace) -> None:
    whole = served.client.features(token_ids=PROMPT, sae="jumprelu", top_k=24)
    assert whole.positions == tuple(range(20)), "chunked prompts come whole"
    top = served.client.features(token_ids=PROMPT, sae="jumprelu", top_k=3, positions="last")
    assert np.array_equal(top, whole.values[-1:, :3])
    assert np.array_equal(top.indices, whole.indices.values[-1:, :3])
    assert np.array_equal(top.parts["active"], whole.parts["active"].values[-1:])
    layers = served.client.features(token_ids=PROMPT, sae="jumprelu", point="resid_pre.*", top_k=3)
    assert layers.axes == ("layer", "pos", "top")
    assert np.array_equal(layers.values[1], whole.values[:, :3])


def test_features_come_with_generated_tokens_whatever_runs_beside(served: SimpleNamespace) -> None:
    ask = {"token_ids": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    capture = Capture(sae="topk", top_k=4, positions="generated")
    alone = served.client.generate(**ask, captures=[capture])
    list(alone)
    with served.client.generate(token_ids=PROMPT[:7], max_tokens=80, ignore_eos=True) as other:
        next(other)
        beside = served.client.generate(**ask, captures=[capture])
        tokens = list(beside)
    [first], [second] = alone.captures.values(), beside.captures.values()
    assert first.positions == tuple(range(20, 25))
    assert np.array_equal(first, second)
    assert np.array_equal(first.indices, second.indices)
    assert len(tokens[2].captures["blocks.1.hook_resid_pre"]) == 1


def test_a_features_direction_steers(served: SimpleNamespace) -> None:
    file = served.client.put_vectors(DATA / "standard")
    decoder = load_file(DATA / "standard" / "sae_weights.safetensors")["W_dec"]
    logits = [
        served.client.trace(token_ids=PROMPT, points=["logits"], edits=[Edit.add("resid_pre.1", vector, scale=4)])
        for vector in (file["W_dec", 7], decoder[7])
    ]
    assert np.array_equal(logits[0]["logits"], logits[1]["logits"])
    served.client.delete_vectors(file)


def test_bytes_are_estimated(served: SimpleNamespace) -> None:
    capture = Capture(sae="topk", top_k=5)
    assert served.client.estimate(token_ids=PROMPT, captures=[capture]).bytes == 20 * (5 * 8 + 4)
    stream = served.client.generate(token_ids=PROMPT, captures=[capture], max_tokens=0)
    list(stream)
    assert sum(piece.header.bytes for piece in stream._pieces) == 20 * (5 * 8 + 4)


def test_rows_do_not_depend_on_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    [kept] = load_files(DATA / "gated")
    assert isinstance(kept.sae, Sae)
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(70, 16)).astype(np.float32))
    whole = probe_features.features(kept.sae, 24, rows)
    monkeypatch.setattr(probe_features, "ACTIVATIONS_AT_ONCE", 24 * 7)
    tiled = probe_features.features(kept.sae, 24, rows)
    one = probe_features.features(kept.sae, 24, rows[33:34])
    for name, values in whole.items():
        assert torch.equal(values, tiled[name])
        assert torch.equal(values[33:34], one[name])


@pytest.mark.parametrize(
    ("capture", "words"),
    [
        (Capture(sae="nothing"), ["features.sae", "no file of this id"]),
        (Capture(sae="topk", top_k=25), ["features.top_k", "[1, 24]"]),
        (Capture(sae="topk", top_k=0), ["features.top_k", "0"]),
        (Capture("blocks.0.mlp.hook_post", sae="topk"), ["features.sae", "reads 16 numbers", "has 40"]),
        (Capture("pattern.1", sae="topk"), ["features.sae"]),
        (Capture(sae="hook_z", heads=[1]), ["heads", "must not be set with features"]),
        (Capture(sae="topk", elements=[1]), ["elements", "must not be set with features"]),
        (Capture(top_k=3), ["captures[0].point"]),
    ],
)
def test_what_is_impossible_is_refused(served: SimpleNamespace, capture: Capture, words: list[str]) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        served.client.trace(token_ids=PROMPT, captures=[capture])
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def changed(**fields: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "cfg.json").read_text()) | fields
        (path / "cfg.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(architecture="transcoder"), "architecture is 'transcoder'; it must be one of standard, gated"),
        (changed(architecture="gated"), "tensor b_gate is missing"),
        (changed(activation_fn="tanh-relu"), "must be relu or topk"),
        (changed(normalize_activations="covariance_whitening"), "covariance_whitening"),
        (changed(d_sae=23), r"W_dec is \[24, 16\], and must be \[23, 16\]"),
        (changed(d_in=None), "d_in is missing"),
        (changed(architecture="topk", k=0), "k is 0"),
        (lambda path: (path / "cfg.json").write_text("{"), "not JSON"),
    ],
)
def test_what_saelens_would_read_otherwise_is_refused(
    served: SimpleNamespace, change: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    shutil.copytree(DATA / "standard", tmp_path / "sae")
    change(tmp_path / "sae")
    with pytest.raises(InvalidArgument, match=words):
        served.client.put_vectors(tmp_path / "sae")
    with pytest.raises(ModelError, match=words):
        load_files(tmp_path)


async def test_the_asynchronous_client_sees_features(served: SimpleNamespace) -> None:
    mine = served.client.features(token_ids=PROMPT, sae="standard")
    async with AsyncClient(served.live.address) as client:
        theirs = await client.features(prompts=[PROMPT, PROMPT[:3]], sae="standard")
    assert mine.shape == (20, 10)
    assert np.array_equal(theirs[0], mine)
    assert theirs[1].positions == (0, 1, 2)

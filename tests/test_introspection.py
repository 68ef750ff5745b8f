"""Looking inside a real server with the real client, against transformers and the rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from cutaway import AsyncClient, Capture, Client, InvalidArgument, PermissionDenied, ResourceExhausted
from hooked import Hooked
from safetensors import safe_open
from secured import write_keys
from serving import LiveServer, eventually, serving

PROMPT = list(range(40, 75))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny.save_tiny("qwen3", path)
    with serving(path, max_batch_tokens=64, max_capture_bytes=2**28) as live, Client(live.address) as client:
        yield SimpleNamespace(client=client, live=live, model=model, oracle=Hooked(model, PROMPT))


def near(mine: object, theirs: torch.Tensor) -> bool:
    ours, other = np.asarray(mine), theirs.detach().numpy()
    scale = np.maximum(1, np.abs(other).max(-1, keepdims=True))
    return bool(ours.shape == other.shape and (np.abs(ours - other) <= 1e-4 * scale).all())


def test_hidden_states_are_transformers_and_one_more_than_layers(served: SimpleNamespace) -> None:
    states = served.client.hidden_states(token_ids=PROMPT)
    assert states.axes == ("layer", "pos", "d_model")
    assert states.at["layer"] == (0, 1, 2, 3)
    assert states.positions == tuple(range(35))
    assert len(states.model_hash) > 10
    for layer in range(3):
        assert near(states.sel(layer=layer), served.oracle.values[f"blocks.{layer}.hook_resid_pre"])
    assert near(states.sel(layer=3), served.oracle.values["blocks.2.hook_resid_post"])
    some = served.client.hidden_states(token_ids=PROMPT, layers=[3, 0], positions=[5, -1], dtype="F16")
    assert (some.at["layer"], some.positions, some.dtype) == ((0, 3), (5, 34), np.float16)
    assert np.allclose(some.values, states.values[[0, 3]][:, [5, 34]], rtol=1e-2, atol=1e-2)


def test_attention_is_transformers_whole_selected_and_largest(served: SimpleNamespace) -> None:
    whole = served.client.attention(token_ids=PROMPT)
    assert whole.axes == ("layer", "head", "q_pos", "k_pos")
    for layer in range(3):
        assert near(whole[layer], served.oracle.values[f"blocks.{layer}.attn.hook_pattern"])
    last = served.client.attention(token_ids=PROMPT, layers=[1], heads=[0, 3], queries="last")
    assert np.allclose(last.values, whole.values[1:2][:, [0, 3], -1:], atol=1e-6)
    top = served.client.attention(token_ids=PROMPT, top_k=4, queries=[0, 20])
    assert np.allclose(top.mass, top.values.sum(-1))
    order = np.argsort(-whole.values[:, :, 20], -1)[..., :4]
    assert (top.indices[:, :, 1] == order).all()
    assert (top.indices[:, :, 0] == [0, -1, -1, -1]).all(), "the first query sees one key"
    keys = served.client.attention(token_ids=PROMPT, keys=[(30, 99), (0, 2)], queries="last")
    assert keys.at["k_pos"] == (0, 1, 30, 31, 32, 33, 34)
    assert np.allclose(keys.values, whole.values[..., -1:, [0, 1, 30, 31, 32, 33, 34]], atol=1e-6)


def test_trace_reads_points_of_prompt_and_generated_tokens(served: SimpleNamespace) -> None:
    points = ["blocks.1.attn.hook_z", "resid_post.*", "logits"]
    seen = served.client.trace(token_ids=PROMPT, points=points, max_tokens=4, temperature=0, ignore_eos=True)
    assert list(seen) == ["blocks.1.attn.hook_z", *(f"blocks.{i}.hook_resid_post" for i in range(3)), "logits"]
    logits = seen["logits"]
    assert logits.positions == tuple(range(38)), "the last of 4 tokens has no row"
    chosen = [int(row.argmax()) for row in logits[34:]]
    oracle = Hooked(served.model, [*PROMPT, *chosen[:3]])
    for name, array in seen.items():
        assert near(array, oracle.values[name]), name
    generated = served.client.trace(
        token_ids=PROMPT, points=points, max_tokens=4, temperature=0, ignore_eos=True, positions="generated"
    )
    assert generated["logits"].positions == (35, 36, 37)
    assert np.array_equal(generated["logits"].values, logits.values[35:])


def test_tokens_carry_what_led_to_them(served: SimpleNamespace) -> None:
    captures = [Capture("blocks.*.attn.hook_pattern", top_k=3), Capture("resid_post.1", norm=True, dtype="BF16")]
    stream = served.client.generate(token_ids=PROMPT, captures=captures, max_tokens=5, temperature=0, ignore_eos=True)
    tokens = list(stream)
    plain = served.client.complete(token_ids=PROMPT, max_tokens=5, temperature=0, ignore_eos=True)
    assert [token.id for token in tokens] == list(plain.token_ids), "to look changes nothing"
    for i, token in enumerate(tokens):
        assert set(token.captures) == {"blocks.*.attn.hook_pattern", "blocks.1.hook_resid_post"}
        rows = tuple(range(35)) if i == 0 else (34 + i,)
        assert token.captures["blocks.*.attn.hook_pattern"].positions == rows
        assert token.captures["blocks.1.hook_resid_post"].axes == ("pos",)
    whole = stream.captures["blocks.*.attn.hook_pattern"]
    assert whole.shape == (3, 4, 39, 3)
    assert whole.indices.shape == whole.shape


def test_several_prompts_answer_each_unpadded(served: SimpleNamespace) -> None:
    prompts = [PROMPT[:3], PROMPT, PROMPT[:17]]
    several = served.client.hidden_states(prompts=prompts, layers=[2])
    assert [array.shape for array in several] == [(1, 3, 64), (1, 35, 64), (1, 17, 64)]
    alone = served.client.hidden_states(token_ids=PROMPT, layers=[2])
    assert np.array_equal(several[1].values, alone.values)


def test_the_lens_of_the_last_layer_is_what_is_served(served: SimpleNamespace) -> None:
    lens = served.client.logit_lens(token_ids=PROMPT, top_k=3, tokens=[7, 8])
    assert lens.tokens.axes == ("layer", "pos", "top")
    assert lens.tokens.shape == (4, 35, 3)
    answer = served.client.complete(token_ids=PROMPT, max_tokens=1, temperature=0, logprobs=3, ignore_eos=True)
    top = answer.completions[0].tokens[0].top_logprobs
    assert lens.tokens[-1, -1].tolist() == [each.id for each in top]
    assert lens.logprobs[-1, -1].tolist() == pytest.approx([each.logprob for each in top], abs=1e-6)
    theirs = torch.log_softmax(served.oracle.values["logits"], -1)
    assert np.allclose(lens.given_logprobs[-1], theirs[:, [7, 8]], atol=1e-4)
    ranks = (theirs > theirs[:, [7]]).sum(-1)
    assert lens.given_ranks[-1][:, 0].tolist() == ranks.tolist()
    middle = served.oracle.values["blocks.1.hook_resid_mid"]
    with torch.no_grad():
        logits = served.model.lm_head(served.model.model.norm(middle))
    traced = served.client.trace(token_ids=PROMPT, captures=[Capture("resid_mid.1", lens=1)])
    assert traced["blocks.1.hook_resid_mid"].parts["tokens"][:, 0].tolist() == logits.argmax(-1).tolist()


REDUCED = {
    "norm": (Capture("z.*", norm=True), lambda v: v["attn.hook_z"].norm(dim=-1)),
    "project": (
        Capture("mlp_out.*", project=np.eye(64)[[3, 9]]), lambda v: v["hook_mlp_out"][:, [3, 9]]
    ),
    "elements": (Capture("post.*", elements=[-1, 4]), lambda v: v["mlp.hook_post"][:, [4, 111]]),
    "heads": (Capture("k.*", heads=[1]), lambda v: v["attn.hook_k"][:, [1]]),
    "sum_keys": (
        Capture("pattern.*", sum_keys=True, keys=[(0, 1), (3, 40)]),
        lambda v: torch.stack([v["attn.hook_pattern"][..., 0], v["attn.hook_pattern"][..., 3:].sum(-1)], -1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCED)
def test_reductions_are_what_they_say(served: SimpleNamespace, name: str) -> None:
    capture, expected = REDUCED[name]
    [array] = read(served, capture)
    for layer in range(3):
        values = {k.split(".", 2)[2]: v for k, v in served.oracle.values.items() if k.startswith(f"blocks.{layer}.")}
        assert near(array[layer], expected(values)), layer


def read(served: SimpleNamespace, capture: Capture) -> list[object]:
    stream = served.client.generate(token_ids=PROMPT, captures=[capture], max_tokens=0)
    assert list(stream) == []
    return list(stream.captures.values())


def test_a_picture_and_a_summary_of_each_head(served: SimpleNamespace) -> None:
    pattern = served.oracle.values["blocks.0.attn.hook_pattern"].detach()
    [picture] = read(served, Capture("pattern.0", pool=5))
    assert picture.shape == (4, 5, 5)
    cells = torch.arange(35) * 5 // 35
    expected = torch.zeros(4, 5, 5)
    for q in range(35):
        for k in range(35):
            expected[:, cells[q], cells[k]] += pattern[:, q, k] / (cells == cells[q]).sum()
    assert np.allclose(picture, expected, atol=1e-5)
    ids = [5, 6, 7, 5, 6, 7, 5, 6]
    [summary] = [*served.client.trace(token_ids=ids, captures=[Capture("pattern.0", head_summary=True)]).values()]
    pattern = Hooked(served.model, ids).values["blocks.0.attn.hook_pattern"].detach()[:, 7]
    distance = (pattern * (7 - torch.arange(8))).sum(-1)
    expected = torch.stack(
        [-torch.xlogy(pattern, pattern).sum(-1), pattern[:, 0], pattern[:, 6], pattern[:, [2, 5]].sum(-1), distance], -1
    )
    assert np.allclose(summary[:, 7], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("capture", "words"),
    [
        (Capture("blocks.1.hook_resid_psot"), ["captures[0].point", "hook_resid_psot", "blocks.1.hook_resid_post"]),
        (Capture("blocks.3.hook_resid_post"), ["layers 0 to 2"]),
        (Capture("resid_post.*", layers=[5]), ["captures[0].layers", "5"]),
        (Capture("resid_post.1", layers=[1]), ["captures[0].layers", '"*"']),
        (Capture("resid_post.1", heads=[0]), ["captures[0].heads", "no heads"]),
        (Capture("z.1", heads=[4]), ["4", "4 heads"]),
        (Capture("pattern.1", heads=[]), ["at least one"]),
        (Capture("resid_post.1", positions=[99]), ["captures[0].positions", "99", "0 to 34"]),
        (Capture("resid_post.1", positions="generated"), ["no row that is computed"]),
        (Capture("resid_post.1", keys=[(0, 3)]), ["no keys"]),
        (Capture("pattern.1", keys=[(3, 3)]), ["keys[0]", "stop must be after"]),
        (Capture("resid_post.1", pool=3), ["captures[0].pool"]),
        (Capture("resid_post.1", top_k=65), ["[1, 64]"]),
        (Capture("pattern.1", top_k=0), ["top_k.k", "0"]),
        (Capture("resid_post.1", project=np.ones(63)), ["64", "256 bytes"]),
        (Capture("resid_post.1", project=np.full(64, np.nan)), ["finite"]),
        (Capture("z.1", lens=3), ["residuals only"]),
        (Capture("resid_post.1", lens=500), ["128"]),
        (Capture("resid_post.1", dtype="F8"), ["captures[0].dtype", "F8"]),
        (Capture("pattern.1", sum_keys=True), ["keys"]),
    ],
)
def test_what_is_impossible_is_refused_by_field_and_rule(
    served: SimpleNamespace, capture: Capture, words: list[str]
) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        served.client.trace(token_ids=PROMPT, captures=[capture])
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_over_budget_is_refused_before_anything_runs_with_the_number(served: SimpleNamespace) -> None:
    size = 4 * 35 * 64 * 3
    steps = served.live.engine.steps
    with pytest.raises(ResourceExhausted, match=f"could send {size} bytes, and max_capture_bytes is {size - 1}"):
        served.client.trace(token_ids=PROMPT, points=["resid_pre.*"], max_capture_bytes=size - 1)
    stream = served.client.generate(token_ids=PROMPT, captures=[Capture("pattern.*")] * 60, max_tokens=330)
    with pytest.raises(ResourceExhausted, match=f"the server allows a request {2**28}"):
        next(stream)
    assert served.live.engine.steps == steps
    told = served.client.estimate(token_ids=PROMPT, points=["resid_pre.*", "q.1"], max_capture_bytes=9)
    assert told.capture_bytes == (size, 4 * 35 * 4 * 24)
    assert (told.bytes, told.open_layers) == (sum(told.capture_bytes), 1)
    assert "max_capture_bytes is 9" in told.refusal
    seen = served.client.trace(token_ids=PROMPT, points=["resid_pre.*"], max_capture_bytes=size)
    assert sum(array.values.nbytes for array in seen.values()) == size


def test_estimates_are_never_too_small(served: SimpleNamespace) -> None:
    points = [point.name.replace("{i}", "*") for point in served.client.list_points()]
    captures = [Capture(point) for point in points]
    captures += [Capture("pattern.*", top_k=7), Capture("pattern.*", head_summary=True), Capture("q.*", norm=True)]
    captures += [Capture("logits", top_k=5), Capture("pattern.1", pool=6), Capture("resid_pre.*", lens=2)]
    options = {"token_ids": PROMPT, "captures": captures, "max_tokens": 3, "ignore_eos": True}
    told = served.client.estimate(**options)
    stream = served.client.generate(**options)
    list(stream)
    received = [0] * len(captures)
    for piece in stream._pieces:
        received[piece.header.capture] += piece.header.bytes
    assert all(mine <= most for mine, most in zip(received, told.capture_bytes, strict=True))
    assert sum(received) > 0.7 * told.bytes


def test_points_are_listed_and_every_alias_reads_the_same(served: SimpleNamespace) -> None:
    points = {point.name: point for point in served.client.list_points()}
    assert points["blocks.{i}.attn.hook_k"].axes == ("pos", "kv_head", "d_head")
    assert points["blocks.{i}.attn.hook_k"].shape == (0, 2, 24)
    assert "hook_pos_embed" not in points
    names = {"attentions.1": "blocks.1.attn.hook_pattern", "hidden_states.2": "blocks.2.hook_resid_pre"}
    names |= {"hidden_states.3": "ln_final.hook_out", "mlp_out.0": "blocks.0.hook_mlp_out", "embed": "hook_embed"}
    for alias, name in names.items():
        [(found, array)] = served.client.trace(token_ids=PROMPT, points=[alias]).items()
        assert found == array.name == name
        assert near(array, served.oracle.values[name])


def test_arrays_become_torch_files_and_pictures(served: SimpleNamespace, tmp_path: Path) -> None:
    array = served.client.attention(token_ids=PROMPT, layers=[1], top_k=2)
    assert torch.equal(array.to_torch(), torch.from_numpy(array.values.copy()))
    array.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert set(file.keys()) == {f"{array.name}{part}" for part in ("", "#values", "#indices", "#mass")}
        assert np.array_equal(file.get_tensor(f"{array.name}#indices"), array.indices)
        assert array.model_hash in file.metadata()[array.name]
    assert "<div" in array._repr_html_()
    assert "blocks.*.attn.hook_pattern" in array._repr_html_()


async def test_the_asynchronous_client_sees_the_same(served: SimpleNamespace) -> None:
    mine = served.client.attention(token_ids=PROMPT, layers=[1])
    async with AsyncClient(served.live.address) as client:
        [theirs, _] = await client.attention(prompts=[PROMPT, PROMPT[:4]], layers=[1])
        assert np.array_equal(theirs.values, mine.values)
        states = await client.hidden_states(token_ids=PROMPT)
        assert states.shape == (4, 35, 64)
        seen = await client.trace("The capital", points=["logits"])
        assert seen["logits"].axes == ("pos", "d_vocab")
        assert (await client.logit_lens(token_ids=PROMPT)).tokens.shape == (4, 35, 5)
        assert len(await client.list_points()) == len(served.client.list_points())
        assert (await client.estimate(token_ids=PROMPT, points=["logits"])).refusal == ""


def test_captures_ask_for_the_scope(tmp_path: Path) -> None:
    tiny.save_tiny("llama", tmp_path / "tiny")
    keys = write_keys(tmp_path / "keys.toml", {"g": (["generate"], "t"), "i": (["introspect", "generate"], "t")})
    with serving(tmp_path / "tiny", api_keys=str(tmp_path / "keys.toml")) as live:
        with Client(live.address, api_key=keys["g"]) as client:
            with pytest.raises(PermissionDenied, match="captures: asks for scope introspect, and 'g' has generate"):
                client.complete("Hi", max_tokens=1, captures=[Capture("logits")])
            with pytest.raises(PermissionDenied, match="Trace asks for scope introspect"):
                client.trace("Hi", points=["logits"])
        with Client(live.address, api_key=keys["i"]) as client:
            assert client.complete("Hi", max_tokens=1, captures=[Capture("logits")]).token_ids


def test_a_reader_who_leaves_gives_everything_back(served: SimpleNamespace) -> None:
    live: LiveServer = served.live
    stream = served.client.generate(token_ids=PROMPT, captures=[Capture("pattern.*")], ignore_eos=True)
    next(stream)
    stream.close()
    assert eventually(live.is_clean)
    assert eventually(lambda: live.server._generation.held == 0)


def test_capture_memory_is_shared_and_given_back(tmp_path: Path) -> None:
    tiny.save_tiny("llama", tmp_path)
    with serving(tmp_path, pace=0.01, capture_memory=2**21) as live, Client(live.address) as client:
        capture = Capture("logits", positions="generated")
        first = client.generate("Hi", captures=[capture], max_tokens=400, ignore_eos=True)
        next(first)
        with pytest.raises(ResourceExhausted, match="requests at work may hold"):
            client.complete("Hi", captures=[capture], max_tokens=350, ignore_eos=True, n=3)
        first.close()
        assert eventually(lambda: live.server._generation.held == 0)
        assert client.trace("Hi", points=["logits"])


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2", "olmo2", "phi3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_server_proves_itself(family: str, dtype: str, tmp_path: Path) -> None:
    tiny.save_tiny(family, tmp_path)
    with serving(tmp_path, dtype=dtype, max_batch_tokens=16, max_running=8) as live, Client(live.address) as client:
        told = client.self_check()
        assert told.holds, [each for each in told.identities if not each.holds]
        assert told.prompt_tokens == 24
        assert len(told.identities) >= 9
        assert sum(each.exact for each in told.identities) == 4
        assert client.self_check("The capital of France").holds
        with pytest.raises(InvalidArgument, match="must have 2 to 256"):
            client.self_check([5])


def test_a_fault_is_found_by_the_self_check(served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = served.live.engine.model.kernels
    open_it = kernels.open_mlp_output

    def faulty(layer: int, hidden: torch.Tensor, residual: torch.Tensor) -> object:
        added = open_it(layer, hidden, residual)
        return replace(added, added=added.added * 1.0001)

    monkeypatch.setattr(kernels, "open_mlp_output", faulty)
    told = served.client.self_check()
    assert [each.name for each in told.identities if not each.holds] == ["mlp_is_added"]

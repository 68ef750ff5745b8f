"""Each kind of edit against the same edit made by hooks in transformers; neighbours keep their bits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cutaway import Capture, Client, Edit, InvalidArgument, PermissionDenied
from cutaway_server.captures import EVERYWHERE
from cutaway_server.edits import Add, Edits, Scale
from cutaway_server.edits import Edit as EngineEdit
from cutaway_server.edits import KnockOut as EngineKnockOut
from cutaway_server.positions import Rows
from engines import ask, run
from looking import everything, watch
from networks import PLAIN
from secured import write_keys
from serving import eventually, serving
from test_probe import PROMPTS, prompt, run_beside, same, tiny_engine
from torch import Tensor, nn

IDS = list(prompt(40))
VECTOR = np.random.default_rng(1).normal(size=64).astype(np.float32)


@pytest.fixture(scope="module", params=["qwen3", "gemma2", "gpt2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny.save_tiny(request.param, path)
    with serving(path, max_batch_tokens=32, max_running=8) as live, Client(live.address) as client:
        yield SimpleNamespace(client=client, live=live, model=model, family=request.param)


def blocks(model: Any) -> Any:
    return model.transformer.h if model.config.model_type == "gpt2" else model.model.layers


@contextmanager
def hooked(module: nn.Module, how: Callable[[Tensor], Tensor], *, before: bool = False) -> Iterator[None]:
    """Change a module's (first) output, or its first input."""

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        return (how(output[0]), *output[1:]) if isinstance(output, tuple) else how(output)

    def ahead(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
        return (how(inputs[0]), *inputs[1:])

    handle = module.register_forward_pre_hook(ahead) if before else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def logits(model: Any, ids: list[int] = IDS) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def ours(served: SimpleNamespace, *edits: Edit, ids: list[int] = IDS) -> np.ndarray[Any, Any]:
    return served.client.trace(token_ids=ids, points=["logits"], edits=edits)["logits"].values


def assert_near(mine: Any, theirs: Tensor, plain: Tensor) -> None:
    assert (theirs - plain).abs().max() > 0.05, "the edit does nothing much"
    assert np.abs(mine - theirs.numpy()).max() < 2e-4


def at(rows: list[int], how: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, rows] = how(x[:, rows])
        return x

    return changed


def test_adding_to_the_residual(served: SimpleNamespace) -> None:
    plain = logits(served.model)
    with hooked(blocks(served.model)[1], lambda x: x + 2.5 * torch.from_numpy(VECTOR)):
        theirs = logits(served.model)
    assert_near(ours(served, Edit.add("blocks.1.hook_resid_post", VECTOR, scale=2.5)), theirs, plain)
    with hooked(blocks(served.model)[1], at([3, 39], lambda x: x + torch.from_numpy(VECTOR))):
        theirs = logits(served.model)
    assert_near(ours(served, Edit.add("resid_post.1", VECTOR, positions=[3, -1])), theirs, plain)


def test_what_blocks_add(served: SimpleNamespace) -> None:
    plain, block = logits(served.model), blocks(served.model)[1]
    attention = block.attn if served.family == "gpt2" else block.self_attn
    mlp = block.mlp
    if served.family == "gemma2":
        attention, mlp = block.post_attention_layernorm, block.post_feedforward_layernorm
    with hooked(attention, lambda x: x * -0.5):
        assert_near(ours(served, Edit.scale("attn_out.1", -0.5)), logits(served.model), plain)
    with hooked(mlp, lambda x: torch.zeros_like(x)):
        assert_near(ours(served, Edit.zero("mlp_out.1")), logits(served.model), plain)


def test_heads_are_ablated_and_replaced(served: SimpleNamespace) -> None:
    plain, block = logits(served.model), blocks(served.model)[1]
    output = block.attn.c_proj if served.family == "gpt2" else block.self_attn.o_proj
    width = output.weight.shape[0 if served.family == "gpt2" else 1] // 4

    def zeroed(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., 2 * width : 3 * width] = 0
        return x

    with hooked(output, zeroed, before=True):
        assert_near(ours(served, Edit.zero("blocks.1.attn.hook_z", heads=[2])), logits(served.model), plain)
    values = np.random.default_rng(2).normal(size=(2, 2, width)).astype(np.float32)

    def given(x: Tensor) -> Tensor:
        x = x.clone().unflatten(-1, (4, width))
        x[:, [5, 30], 1], x[:, [5, 30], 3] = torch.from_numpy(values[:, 0]), torch.from_numpy(values[:, 1])
        return x.flatten(2)

    with hooked(output, given, before=True):
        edit = Edit.set("z.1", values, heads=[1, 3], positions=[30, 5])
        assert_near(ours(served, edit), logits(served.model), plain)


def test_neurons_inside_the_mlp(served: SimpleNamespace) -> None:
    plain, mlp = logits(served.model), blocks(served.model)[0].mlp
    first, last = (mlp.c_fc, mlp.c_proj) if served.family == "gpt2" else (mlp.gate_proj, mlp.down_proj)

    def neurons(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., [3, 50]] += 4.0
        return x

    with hooked(last, neurons, before=True):
        edit = Edit.add("blocks.0.mlp.hook_post", np.full(2, 4.0), elements=[3, 50])
        assert_near(ours(served, edit), logits(served.model), plain)
    with hooked(first, neurons):
        edit = Edit.add("blocks.0.mlp.hook_pre", np.full(2, 4.0), elements=[3, 50])
        assert_near(ours(served, edit), logits(served.model), plain)
    if served.family != "gpt2":
        with hooked(mlp.up_proj, neurons):
            edit = Edit.add("blocks.0.mlp.hook_pre_linear", np.full(2, 4.0), elements=[3, 50])
            assert_near(ours(served, edit), logits(served.model), plain)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_queries_keys_and_values_before_they_are_turned(served: SimpleNamespace, name: str) -> None:
    plain, block = logits(served.model), blocks(served.model)[1]
    heads = {"q": 4}.get(name, 4 if served.family == "gpt2" else 2)
    if served.family == "gpt2":
        module, start = block.attn.c_attn, {"q": 0, "k": 64, "v": 128}[name]
        width = 16
    else:
        module, start = getattr(block.self_attn, f"{name}_proj"), 0
        width = module.weight.shape[0] // heads
    vector = np.random.default_rng(3).normal(size=width).astype(np.float32) * 3

    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 4:20, start + width : start + 2 * width] += torch.from_numpy(vector)
        return x

    with hooked(module, changed):
        edit = Edit.add(f"blocks.1.attn.hook_{name}", vector, heads=[1], positions=range(4, 20))
        assert_near(ours(served, edit), logits(served.model), plain)


def test_directions_are_taken_out_and_clamped(served: SimpleNamespace) -> None:
    plain, block = logits(served.model), blocks(served.model)[0]
    directions = np.stack([VECTOR, np.roll(VECTOR, 7), VECTOR * 3])
    span = torch.linalg.qr(torch.from_numpy(directions[:2]).T).Q
    with hooked(block, lambda x: x - (x @ span) @ span.T):
        assert_near(ours(served, Edit.project_out("resid_post.0", directions)), logits(served.model), plain)
    unit = torch.from_numpy(VECTOR / np.linalg.norm(VECTOR))

    def clamped(x: Tensor) -> Tensor:
        component = x @ unit
        return x + (component.clamp(0.4, 0.5) - component)[..., None] * unit

    with hooked(block, clamped):
        edit = Edit.clamp("resid_post.0", VECTOR * 9, min=0.4, max=0.5)
        assert_near(ours(served, edit), logits(served.model), plain)


@contextmanager
def masked(model: Any, layers: list[int], heads: list[int], queries: list[int], keys: list[int], weight: float) -> Any:
    """Add `weight` to attention scores, through the mask that transformers adds to them."""

    def ahead(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        mask = named["attention_mask"]
        mask = mask.float().expand(1, 4, -1, -1).clone()
        rows = torch.tensor(heads)[:, None, None], torch.tensor(queries)[None, :, None], torch.tensor(keys)
        mask[0, rows[0], rows[1], rows[2]] += weight
        return inputs, {**named, "attention_mask": mask}

    chosen = [blocks(model)[layer] for layer in layers]
    attentions = [block.attn if model.config.model_type == "gpt2" else block.self_attn for block in chosen]
    handles = [each.register_forward_pre_hook(ahead, with_kwargs=True) for each in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_knocked_out_keys_match_the_masked_model(served: SimpleNamespace) -> None:
    plain = logits(served.model)
    queries = list(range(2, 40))
    with masked(served.model, [0, 1, 2], [0, 1, 2, 3], queries, [0, 1], -1e9):
        theirs = logits(served.model)
    assert_near(ours(served, Edit.knock_out(queries=range(2, 2048), keys=[0, 1])), theirs, plain)
    with masked(served.model, [1], [2], [39], [30, 31, 32], float(np.log(7.0))):
        theirs = logits(served.model)
    edit = Edit.knock_out(layers=[1], heads=[2], queries=[-1], keys=[range(30, 33)], factor=7.0)
    mine = ours(served, edit)
    assert np.abs(mine - theirs.numpy()).max() < 2e-4
    assert np.abs(mine[:39] - plain[:39].numpy()).max() < 2e-4


def test_a_key_that_holds_nearly_everything_is_knocked_out_exactly(served: SimpleNamespace) -> None:
    """Make key 0 hold over 0.9 of head 1's mass, then knock it out beside that."""
    heavy = [Edit.knock_out(layers=[1], heads=[1], queries=range(1, 999), keys=[0], factor=5e3)]
    seen = served.client.trace(token_ids=IDS, points=["pattern.1", "lse.1"], edits=heavy)
    pattern = seen["blocks.1.attn.hook_pattern"].values
    window = 20 if served.family == "gemma2" else 99
    assert pattern[1, 1:window, 0].min() > 0.9
    assert np.allclose(pattern.sum(-1), 1, atol=1e-5), "log-sum-exps are those after the knock-out"
    gone = [*heavy, Edit.knock_out(layers=[1], heads=[1], queries=range(1, 999), keys=[0])]
    alone = [Edit.knock_out(layers=[1], heads=[1], queries=range(1, 999), keys=[0])]
    assert np.abs(ours(served, *gone) - ours(served, *alone)).max() < 1e-5
    without = served.client.trace(token_ids=IDS, points=["pattern.1"], edits=gone)["blocks.1.attn.hook_pattern"].values
    assert (without[1, 1:, 0] == 0).all()
    assert np.allclose(without.sum(-1), 1, atol=1e-5)


def test_captures_see_a_point_before_its_edits_or_after_them(served: SimpleNamespace) -> None:
    captures = [Capture("resid_post.0"), Capture("resid_post.0", after_edits=True), Capture("resid_pre.1")]
    seen = served.client.trace(token_ids=IDS, captures=captures, edits=[Edit.add("resid_post.0", VECTOR)])
    before, after, following = (array.values for array in seen.values())
    plain = served.client.trace(token_ids=IDS, points=["resid_post.0"])["blocks.0.hook_resid_post"].values
    assert np.array_equal(before, plain)
    assert np.array_equal(after, before + VECTOR)
    assert np.array_equal(following, after)


def test_edits_that_change_nothing_leave_every_bit(served: SimpleNamespace) -> None:
    names = [p.name.replace("{i}", "*") for p in served.client.list_points() if p.writable]
    points = ["logits", "resid_post.*"]
    plain = served.client.trace(token_ids=IDS, points=points, prefix_caching=False)
    same_again = [Edit.scale(name, 1.0) for name in names]
    edited = served.client.trace(token_ids=IDS, points=points, edits=same_again, prefix_caching=False)
    for name, array in plain.items():
        assert np.array_equal(edited[name].values, array.values), name


def test_generation_is_steered_from_the_position_on_and_cached_apart(served: SimpleNamespace) -> None:
    options = {"token_ids": IDS, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    plain = served.client.complete(**options)
    steer = Edit.add("resid_post.*", 40 * VECTOR, positions="generated")
    steered = served.client.complete(**options, edits=[steer])
    assert steered.token_ids[0] == plain.token_ids[0], "the first token comes of the prompt's last row"
    assert steered.token_ids != plain.token_ids
    ids = list(IDS)
    for token in steered.token_ids:
        with ExitStack() as hooks:
            for block in blocks(served.model):
                hooks.enter_context(
                    hooked(block, at(list(range(40, len(ids))), lambda x: x + 40 * torch.from_numpy(VECTOR)))
                )
            assert token == int(logits(served.model, ids)[-1].argmax())
        ids.append(token)
    assert served.client.complete(**options).token_ids == plain.token_ids
    late = Edit.add("resid_post.0", VECTOR, positions=[20])
    for _ in range(2):
        again = served.client.complete(**options, edits=[late])
    assert again.usage.cached_tokens == 32, "its own pages are found again"
    other = served.client.complete(**options, edits=[Edit.add("resid_post.0", -VECTOR, positions=[20])])
    assert other.usage.cached_tokens == 16, "what comes before the edit is shared"


def test_pages_of_rows_that_another_request_did_not_edit_are_not_taken_for_edited_ones(served: SimpleNamespace) -> None:
    edit = Edit.add("resid_post.0", VECTOR, positions="prompt")
    options = {"temperature": 0, "ignore_eos": True, "edits": [edit]}
    first = served.client.complete(token_ids=IDS, max_tokens=60, **options)
    longer = [*IDS, *first.token_ids[:50]]
    cached = served.client.trace(token_ids=longer, points=["logits"], edits=[edit], positions="last")
    fresh = served.client.trace(
        token_ids=longer, points=["logits"], edits=[edit], positions="last", prefix_caching=False
    )
    assert np.array_equal(cached["logits"].values, fresh["logits"].values)


def test_a_sampled_token_is_overridden(served: SimpleNamespace) -> None:
    options = {"token_ids": IDS, "max_tokens": 5, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    plain = served.client.complete(**options)
    forced = served.client.complete(**options, edits=[Edit.override(1, 300), Edit.override(3, 31)])
    assert forced.token_ids[0] == plain.token_ids[0]
    assert (forced.token_ids[1], forced.token_ids[3]) == (300, 31)
    ids = [*IDS, plain.token_ids[0]]
    expected = torch.log_softmax(logits(served.model, ids), -1)[-1, 300]
    assert forced.completions[0].tokens[1].logprob == pytest.approx(float(expected), abs=1e-4)
    assert forced.token_ids[2] == int(logits(served.model, [*ids, 300])[-1].argmax())


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Edit.zero("blocks.0.hook_resid_psot"), ["edits[0].point", "blocks.0.hook_resid_post"]),
        (Edit.zero("pattern.0"), ["edits[0].point", "read only"]),
        (Edit.add("resid_post.0", [1.0, 2.0]), ["edits[0].add.vector", "2 numbers", "64"]),
        (Edit.add("resid_post.0", np.full(64, np.inf)), ["finite"]),
        (Edit.add("resid_post.0", VECTOR, scale=float("nan")), ["edits[0].add.scale", "nan"]),
        (Edit.set("resid_post.0", np.zeros((3, 64)), positions=[1, 2]), ["192 numbers", "2 rows"]),
        (Edit.project_out("resid_post.0", np.zeros(64)), ["zeros"]),
        (Edit.clamp("resid_post.0", VECTOR), ["edits[0].clamp"]),
        (Edit.clamp("resid_post.0", VECTOR, min=1.0, max=0.0), ["min"]),
        (Edit.zero("z.0", heads=[9]), ["9", "4 heads"]),
        (Edit.zero("resid_post.0", heads=[0]), ["no heads"]),
        (Edit.zero("resid_post.*", layers=[3]), ["3 layers"]),
        (Edit.zero("resid_post.0", positions=[40]), ["40", "0 to 39"]),
        (Edit.knock_out(keys=[0]), ["query 0 would have no key left"]),
        (Edit.knock_out(queries=[3], keys=[range(0, 2), range(2, 9)]), ["query 3 would have no key left"]),
        (Edit.knock_out(queries=[3], keys=[0], factor=-1.0), ["factor", "-1"]),
        (Edit.knock_out(queries=[3], keys=[]), ["no keys"]),
        (Edit.override(0, 5), ["edits[0].override.step"]),
    ],
)
def test_what_is_impossible_is_refused(served: SimpleNamespace, edit: Edit, words: list[str]) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        ours(served, edit)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_edits_ask_for_the_scope(tmp_path: Path) -> None:
    tiny.save_tiny("llama", tmp_path / "tiny")
    keys = write_keys(tmp_path / "keys.toml", {"i": (["introspect"], "t"), "e": (["generate", "edit"], "t")})
    with serving(tmp_path / "tiny", api_keys=str(tmp_path / "keys.toml")) as live:
        with (
            Client(live.address, api_key=keys["i"]) as client,
            pytest.raises(PermissionDenied, match="edits: asks for"),
        ):
            client.trace("Hi", points=["logits"], edits=[Edit.zero("mlp_out.0")])
        with Client(live.address, api_key=keys["e"]) as client:
            assert client.complete("Hi", max_tokens=1, edits=[Edit.zero("mlp_out.0")]).token_ids


def every_edit(seed: int) -> Edits:
    """One edit of every writable point, in every layer, and a knock-out."""
    source = np.random.default_rng(seed)
    from cutaway_server.probe.points import points_of, size_of

    layers = tuple(range(PLAIN.n_layers))
    made = []
    for point in points_of(PLAIN):
        if point.writable:
            vector = source.normal(size=(1, size_of(PLAIN, point.axes[-1]))).astype(np.float32) / 5
            made.append(EngineEdit(point.name, layers, Add(vector), rows=EVERYWHERE))
    knock = EngineKnockOut(layers, ((0, 2),), heads=(0,), rows=Rows((range(2, 2**31),)))
    return Edits(tuple(made), (knock,), salt=bytes([seed]))


@pytest.mark.parametrize("native_kernels", [False, True])
def test_edited_requests_are_alone_what_they_are_among_others_and_leave_them_alone(native_kernels: bool) -> None:
    requests = []
    for i, name in enumerate(PROMPTS):
        request = ask(name, PROMPTS[name], max_tokens=24)
        if i % 3 == 0:
            request = replace(request, edits=every_edit(i), captures=everything(PLAIN))
        requests.append(request)
    engine = tiny_engine(PLAIN, native_kernels, blocks=27, max_batch_tokens=40)
    seen = watch(engine, *requests)
    assert engine.observed.preemptions > 0
    for request in requests:
        alone = watch(tiny_engine(PLAIN, native_kernels), request)[request.request_id]
        same(seen[request.request_id], alone, native_kernels)
    again = watch(engine, *requests)
    for request in requests:
        assert again[request.request_id].tokens == seen[request.request_id].tokens, "from cached pages"


def test_neighbours_of_an_edited_request_keep_every_number() -> None:
    others = [ask(name, PROMPTS[name]) for name in ("r0", "r2", "r3")]
    plain = run(tiny_engine(PLAIN, True), *others)
    engine = tiny_engine(PLAIN, True)
    engine.add(replace(ask("edited", PROMPTS["r1"]), edits=every_edit(1)))
    beside = run_beside(engine, others)
    for request in others:
        assert beside[request.request_id].said == plain[request.request_id].said


def test_an_edit_of_one_layer_leaves_the_other_layers_fused() -> None:
    from test_probe import calls

    edit = EngineEdit("blocks.{i}.hook_resid_post", (1,), Scale(2.0))
    made = calls(
        tiny_engine(PLAIN, False), replace(ask("a", PROMPTS["r1"], max_tokens=1), edits=Edits((edit,), salt=b"x"))
    )
    assert made == [
        ("plan",),
        ("embed",),
        ("layers", 0, 1),
        ("layers", 1, 2),
        ("layers", 2, PLAIN.n_layers),
        ("unembed",),
    ]


def test_random_positions_are_those_that_are_edited() -> None:
    source, add = random.Random(3), Add(np.ones((1, PLAIN.d_model), np.float32))
    mid = [capture.template for capture in everything(PLAIN)].index("blocks.{i}.hook_resid_mid")
    for _ in range(5):
        listed = frozenset(source.sample(range(33), 4))
        edits = Edits((EngineEdit("blocks.{i}.hook_resid_pre", (0,), add, rows=Rows(listed=listed)),), salt=b"x")
        plain = replace(ask("a", PROMPTS["r1"], max_tokens=0), captures=everything(PLAIN))
        seen = watch(tiny_engine(PLAIN, False, max_batch_tokens=7, max_running=4), replace(plain, edits=edits))["a"]
        as_it_was = watch(tiny_engine(PLAIN, False), plain)["a"]
        different = (seen.value(mid)[0] != as_it_was.value(mid)[0]).any(1)
        assert all(different[position] for position in listed)
        assert not different[: min(listed)].any()


ODD: dict[str, list[Any]] = {
    "layers": [[0], [-1, 2], [9]],
    "heads": [[0], [3, -1], [4]],
    "positions": ["last", "generated", "steps", [0, -1], range(3, 99, 4), [77]],
    "keys": [[(0, 3)], [(5, 5)], [range(9, 4000)]],
    "elements": [[0, 1], [5000]],
    "dtype": ["BF16", "F16", "F8"],
    "top_k": [3, 0],
    "pool": [4],
    "norm": [True],
    "head_summary": [True],
    "lens": [2],
}


def test_fuzzed_requests_are_answered_or_refused_and_leave_nothing_behind(served: SimpleNamespace) -> None:
    source = random.Random(served.family)
    names = [p.name.replace("{i}", "*") for p in served.client.list_points()]
    plain = served.client.complete(token_ids=IDS, max_tokens=2, temperature=0, ignore_eos=True).token_ids
    answered = 0
    for _ in range(120):
        odd = {name: source.choice(values) for name, values in ODD.items() if source.random() < 0.15}
        capture = Capture(source.choice([*names, "blocks.1.nothing"]), **odd)
        edit = source.choice(
            [
                Edit.scale(
                    source.choice(names), source.choice([0.0, 1.5, -1.0]), positions=source.choice(["all", [3]])
                ),
                Edit.zero(source.choice(names), heads=source.choice([None, [1], [8]])),
                Edit.knock_out(layers=source.choice(["all", [1], [5]]), queries=[-1], keys=source.choice([[0], [99]])),
                Edit.add(source.choice(names), np.ones(source.choice([1, 16, 64, 64]))),
            ]
        )
        options = {"captures": [capture], "edits": source.choice([[], [edit]])}
        try:
            served.client.trace(token_ids=IDS, max_tokens=source.choice([0, 1, 3]), ignore_eos=True, **options)
            answered += 1
        except InvalidArgument:
            continue
    assert answered > 10
    again = served.client.complete(token_ids=IDS, max_tokens=2, temperature=0, ignore_eos=True).token_ids
    assert again == plain
    assert served.live.is_clean() or eventually(served.live.is_clean)
    assert served.live.server._generation.held == 0

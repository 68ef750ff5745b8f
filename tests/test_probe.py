"""Every point of every family against transformers, and what must hold whatever else the engine does."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cutaway_server.captures import Capture
from cutaway_server.engine.engine import Engine
from cutaway_server.kernels.cpu import CpuKernels
from cutaway_server.kernels.library import load_library
from cutaway_server.model.checkpoint import load_weights
from cutaway_server.model.transformer import Transformer
from cutaway_server.positions import Rows
from engines import Answer, ask, make_engine, run
from hooked import Hooked
from looking import KEYED, Seen, everything, watch
from networks import PLAIN, SHAPES, random_weights
from test_families import checkpoint

LENGTH = 45  # past the tiny models' windows


def prompt(n: int = LENGTH, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(60), k=n))


def engine_of(path: Path, **settings: Any) -> Engine:
    opened = checkpoint(path)
    weights = load_weights(opened, torch.float32, torch.device("cpu"))
    return make_engine(opened.config, weights, **settings)


def native(engine: Engine, weights: Any) -> Engine:
    library = load_library()
    if library is None:
        pytest.skip("no C compiler here")
    engine.model = Transformer(CpuKernels(engine.model.config, weights, 400, library, threads=1))
    return engine


def assert_as_transformers(seen: Seen, captures: tuple[Capture, ...], oracle: Hooked, rows: list[int]) -> None:
    for number, capture in enumerate(captures):
        ours = torch.from_numpy(seen.value(number))
        for i, layer in enumerate(capture.layers or (None,)):
            name = capture.template if layer is None else capture.template.replace("{i}", str(layer))
            mine, theirs = ours if layer is None else ours[i], oracle.values[name]
            theirs = theirs[:, rows] if capture.template in KEYED else theirs[rows]
            assert mine.shape == theirs.shape, name
            hidden = torch.isneginf(theirs)
            assert torch.equal(torch.isneginf(mine), hidden), name
            error = (mine - theirs).masked_fill(hidden, 0).abs()
            scale = theirs.masked_fill(hidden, 0).abs().amax(-1, keepdim=True).clamp(min=1)
            assert (error <= 1e-4 * scale).all(), (name, float(error.max()))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_every_point_is_what_transformers_computes(family: str, kernels: str, tmp_path: Path) -> None:
    model = tiny.save_tiny(family, tmp_path)
    engine = engine_of(tmp_path)
    if kernels == "native":
        opened = checkpoint(tmp_path)
        engine = native(engine, load_weights(opened, torch.float32, torch.device("cpu")))
    captures = everything(engine.model.config)
    ids = prompt()
    seen = watch(engine, replace(ask("a", ids, max_tokens=0), captures=captures))["a"]
    assert_as_transformers(seen, captures, Hooked(model, list(ids)), list(range(LENGTH)))


PROMPTS = {f"r{i}": prompt(n, i) for i, n in enumerate((5, 33, 64, 70, 17, 48, 21, 90))}


def looked(name: str, config: Any, max_tokens: int = 6, **sampling: Any) -> Any:
    return replace(ask(name, PROMPTS[name], max_tokens=max_tokens, **sampling), captures=everything(config))


def same(mine: Seen, other: Seen, native_kernels: bool) -> None:
    assert mine.error is None
    assert mine.tokens == other.tokens
    for number, name in {piece.number: piece.name for piece in other.pieces}.items():
        for index in {piece.index for piece in other.pieces}:
            ours, theirs = mine.rows(number, index), other.rows(number, index)
            assert ours.keys() == theirs.keys(), (number, index)
            for position, parts in theirs.items():
                for a, b in zip(ours[position], parts, strict=True):
                    keys = min(a.data.shape[-1], b.data.shape[-1])  # patterns are as wide as their chunk's last query
                    a_data, b_data = a.data[..., :keys], b.data[..., :keys]
                    assert equal(name, a_data, b_data, native_kernels), (name, position, a.name)


def equal(name: str, mine: Any, other: Any, native_kernels: bool) -> bool:
    """The same bits; patterns and scores by the reference, whose products change with their shape, nearly so."""
    if "hook_pattern" in name or "hook_attn_scores" in name:
        return np.array_equal(mine, other) if native_kernels else np.allclose(mine, other, rtol=1e-5, atol=1e-6)
    return np.array_equal(mine, other)


def alone_seen(name: str, config: Any, native_kernels: bool, **sampling: Any) -> Seen:
    engine = tiny_engine(config, native_kernels)
    return watch(engine, looked(name, config, **sampling))[name]


def tiny_engine(config: Any, native_kernels: bool, **settings: Any) -> Engine:
    weights = random_weights(config)
    engine = make_engine(config, weights, **settings)
    return native(engine, weights) if native_kernels else engine


@pytest.mark.parametrize("native_kernels", [False, True])
def test_what_is_seen_in_a_mixed_chunked_preempted_cached_batch_is_what_is_seen_alone(native_kernels: bool) -> None:
    config = SHAPES["windows"]
    engine = tiny_engine(config, native_kernels, blocks=27, max_batch_tokens=40)
    watch(engine, ask("warm", PROMPTS["r2"][:48], max_tokens=1))  # some prompts are half cached
    requests = [looked(name, config, 24) for name in PROMPTS]
    seen = watch(engine, *requests)
    assert engine.observed.preemptions > 0, "nothing was preempted"
    assert any(piece.revisited for piece in seen["r2"].pieces), "no cached row was looked at"
    for name, ids in PROMPTS.items():
        same(seen[name], alone_seen(name, config, native_kernels, max_tokens=24), native_kernels)
        assert seen[name].positions(2) == list(range(len(ids))), "prompt rows come once each, none is missing"
        assert seen[name].positions(2, 0) == list(range(len(ids), len(ids) + 23)), "the last token has no row"


def test_completions_of_one_prompt_have_rows_of_their_own_and_share_the_prompts() -> None:
    config = PLAIN
    request = looked("r1", config, n=3, temperature=1.0)
    seen = watch(tiny_engine(config, False), request)["r1"]
    assert seen.positions(2) == list(range(33))
    assert [seen.positions(2, index) for index in range(3)] == [list(range(33, 38))] * 3
    assert not np.array_equal(seen.value(2, 0), seen.value(2, 1))


class Calls:
    """Kernels that note which operation is called, with how many rows."""

    def __init__(self, kernels: Any) -> None:
        self._kernels, self.names = kernels, []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kernels, name)
        if not callable(found):
            return found

        def noted(*arguments: Any) -> Any:
            self.names.append((name, *(a for a in arguments if isinstance(a, int))))
            return found(*arguments)

        return noted


def calls(engine: Engine, *requests: Any) -> list[tuple[Any, ...]]:
    engine.model.kernels = Calls(engine.model.kernels)
    watch(engine, *requests)
    return engine.model.kernels.names


def test_a_step_that_nobody_looks_at_makes_exactly_the_plain_calls() -> None:
    plain = ask("a", PROMPTS["r1"], max_tokens=2)
    n = PLAIN.n_layers
    step = [("plan",), ("embed",), ("layers", 0, n), ("unembed",)]
    assert calls(tiny_engine(PLAIN, False), plain) == step * 2
    looking = replace(plain, captures=(Capture("blocks.{i}.attn.hook_z", (1,), rows=Rows(listed=frozenset({5}))),))
    made = calls(tiny_engine(PLAIN, False), looking)
    assert made[-4:] == step, "the second step has no row that is looked at"
    opened = ["attention_input", "paged_attention", "attention_output", "mlp_input", "mlp_output"]
    assert made[:-4] == [
        ("plan",), ("embed",), ("layers", 0, 1), *((name, 1) for name in opened), ("layers", 2, n), ("unembed",),
    ]  # fmt: skip


def test_only_rows_asked_for_are_opened_and_neighbours_keep_their_bits() -> None:
    config = SHAPES["qk-norm full, post-norm only"]
    others = [ask(name, PROMPTS[name]) for name in ("r0", "r2", "r3")]
    plain = run(tiny_engine(config, True), *others)
    looking = looked("r1", config)
    engine = tiny_engine(config, True)
    engine.add(looking)
    beside = run_beside(engine, others)
    for request in others:
        assert beside[request.request_id].said == plain[request.request_id].said


def run_beside(engine: Engine, requests: list[Any]) -> dict[str, Answer]:
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for name, event in engine.step():
            if name in answers:
                answers[name].take(event)
    return answers


def test_rows_that_the_prefix_cache_has_are_revisited_alone() -> None:
    engine = tiny_engine(PLAIN, False)
    ids = PROMPTS["r7"]
    whole = watch(engine, replace(ask("a", ids, max_tokens=0), captures=everything(PLAIN)))["a"]
    rows = Rows(listed=frozenset({3, 4, 40}))
    engine.model.kernels = Calls(engine.model.kernels)
    again = watch(engine, replace(ask("b", ids, max_tokens=0), captures=everything(PLAIN, rows=rows)))["b"]
    assert again.positions(2) == [3, 4, 40]
    assert sum(name == "plan" for name, *_ in engine.model.kernels.names) < 10
    for number, capture in enumerate(everything(PLAIN)):
        for position in (3, 4, 40):
            a, b = again.rows(number)[position][0].data, whole.rows(number)[position][0].data
            keys = min(a.shape[-1], b.shape[-1])
            assert equal(capture.template, a[..., :keys], b[..., :keys], False), number


def test_captures_come_before_the_token_they_led_to() -> None:
    seen = watch(tiny_engine(PLAIN, False), looked("r1", PLAIN))["r1"]
    told = [kind for kind in seen.order if kind in ("Captured", "Sampled")]
    each = len(everything(PLAIN))
    assert told == (["Captured"] * each + ["Sampled"]) * 6

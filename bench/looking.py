"""What looking inside, or changing what is there, costs a decode step: the ratio to the same step with nobody looking.

python bench/looking.py --streams 32 --context 1000
python bench/looking.py --cases residuals patterns -- --dtype float32      (after -- come the server's options)

Cases take turns, a few steps each, so that a machine that drifts drifts for all. Every stream decodes on the same
prompts, which the prefix cache has. `neighbours` counts only what those that look at nothing wait for.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
from cutaway_server.captures import Capture, TopK
from cutaway_server.config import read_config
from cutaway_server.edits import Add, Edit, Edits
from cutaway_server.engine.build import build_engine
from cutaway_server.engine.engine import Engine
from cutaway_server.model.open import open_model
from cutaway_server.positions import ENDLESS, Rows
from cutaway_server.request import Request, SamplingParams

Change = Callable[[int, Request], Request]


def cases(engine: Engine, context: int) -> dict[str, Callable[[int], dict[str, object]]]:
    """What stream number i asks for beside its tokens."""
    config = engine.model.config
    every, generated = tuple(range(config.n_layers)), Rows((range(context, ENDLESS),))

    def captures(template: str, layers: tuple[int, ...], **fields: object) -> dict[str, object]:
        return {"captures": (Capture(template, layers, stacked=True, rows=generated, **fields),)}  # type: ignore[arg-type]

    resid, pattern = "blocks.{i}.hook_resid_post", "blocks.{i}.attn.hook_pattern"
    middle = (config.n_layers // 2,)
    vector = Add(np.full((1, config.d_model), 1e-3, np.float32))
    steer = Edits((Edit(resid, every, vector, rows=generated),), salt=b"bench")
    inside = Edits(
        (Edit("blocks.{i}.attn.hook_z", every, Add(vector.vector[:, : config.d_head]), rows=generated),), salt=b"b"
    )
    return {
        "plain": lambda _: {},
        "a tenth captures one layer": lambda i: captures(resid, middle) if i % 10 == 0 else {},
        "one layer": lambda _: captures(resid, middle),
        "residuals of every layer": lambda _: captures(resid, every),
        "z of every layer": lambda _: captures("blocks.{i}.attn.hook_z", every),
        "mlp_out of every layer (opened)": lambda _: captures("blocks.{i}.hook_mlp_out", every),
        "patterns' top 32 of every layer": lambda _: captures(pattern, every, reduction=TopK(32)),
        "one is steered in every layer": lambda i: {"edits": steer} if i == 0 else {},
        "one has its heads edited in every layer": lambda i: {"edits": inside} if i == 0 else {},
    }


def steps_of(
    engine: Engine, prompts: list[tuple[int, ...]], asked: Callable[[int], dict[str, object]], n: int
) -> list[float]:
    """Seconds of each of `n` steps in which every stream decodes."""
    sampling = SamplingParams(seed=0, max_tokens=1_000_000, temperature=0.0)
    for i, prompt in enumerate(prompts):
        engine.add(Request(f"bench-{i}", prompt, sampling, time.monotonic(), **asked(i)))  # type: ignore[arg-type]
    while any(len(live.completions) == 0 for live in engine.live.values()):
        engine.step()
    engine.step()
    seconds = []
    for _ in range(n):
        begun = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begun)
    for i in range(len(prompts)):
        engine.abort(f"bench-{i}")
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=6, help="of each case in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=[""], help="parts of their names")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("options", nargs="*", help="options of the server, after --")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    arguments = ["--model", options.model, "--threads", str(options.threads), *options.options]
    config = read_config(arguments, {})
    engine, _ = build_engine(config, open_model(config.model))
    source = random.Random(0)
    vocabulary = range(engine.model.config.d_vocab)
    prompts = [tuple(source.choices(vocabulary, k=options.context)) for _ in range(options.streams)]
    known = cases(engine, options.context)
    chosen = {n: a for n, a in known.items() if n == "plain" or any(part in n for part in options.cases)}
    steps_of(engine, prompts, known["plain"], 1)  # fills the prefix cache
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(options.rounds):
        for name, asked in chosen.items():
            seconds[name] += steps_of(engine, prompts, asked, options.steps)
    plain = statistics.median(seconds["plain"])
    for name, found in seconds.items():
        median = statistics.median(found)
        row = {"case": name, "step_ms": 1000 * median, "ratio": median / plain, "least_ms": 1000 * min(found)}
        print(
            json.dumps(row) if options.json else f"{name:42} {1000 * median:8.1f} ms  {median / plain:6.3f}", flush=True
        )


if __name__ == "__main__":
    main()

"""Real models in fp32 beside transformers on the same dequantised weights: tokens, logits, log-probabilities."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from cutaway_server.config import Config
from cutaway_server.engine.build import build_engine
from cutaway_server.engine.engine import Engine
from cutaway_server.model.gguf_file import open_gguf
from cutaway_server.request import Request, Sampled, SamplingParams
from networks import flat, pages_for

NEAR_TIE = 1e-3  # top-2 logits this close may be told apart either way
OUTPUT = 64

ESSAY = (
    "A cutaway drawing shows a machine at work with part of its casing removed, so that one can see how the parts "
    "move together. Engineers drew them long before computers; children like them for the same reason. "
)
PROMPTS = [
    "The",
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "1, 1, 2, 3, 5, 8, 13,",
    "Q: What is gravity? Answer in one sentence.\nA:",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "import numpy as np\n\nclass Matrix:\n    def __init__(self, rows, columns):\n",
    "Die Hauptstadt von Deutschland ist",
    "El perro corrió por la calle porque",
    "日本の首都は",
    "😀 😃 😄 😁",
    '{"name": "Ada", "born": 1815, "field": "',
    "SELECT name, count(*) FROM users WHERE",
    "\n\n\n   \t  ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    ESSAY * 3,
    ESSAY * 8,
    ESSAY * 14 + "In short:",
    ESSAY * 33,
]


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def served(request: pytest.FixtureRequest) -> tuple[Engine, object, torch.nn.Module]:
    checkpoint = open_gguf(Path(request.getfixturevalue(f"{request.param}_gguf")))
    config = Config(dtype="float32", max_context=2048, max_running=20, kv_cache_memory=2**30)
    engine, _ = build_engine(config, checkpoint)
    return engine, checkpoint.text, request.getfixturevalue(f"{request.param}_hf")


def test_greedy_tokens_are_those_of_transformers(served, capsys: pytest.CaptureFixture[str]) -> None:
    engine, text, oracle = served
    prompts = [text.encode(p, parse_special_tokens=True).ids for p in PROMPTS]
    assert max(map(len, prompts)) > 1200
    assert min(map(len, prompts)) <= 2
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(seed=0, max_tokens=OUTPUT, temperature=0.0)
        engine.add(Request(str(i), tuple(prompt), sampling, time.monotonic()))
    while engine.has_work:
        for name, event in engine.step():
            if isinstance(event, Sampled):
                tokens[name].append(event.token)
        engine.scheduler.check()
    ties = []
    for i, prompt in enumerate(prompts):
        ours = tokens[str(i)]
        assert len(ours) == OUTPUT
        with torch.no_grad():  # one pass over our answer says what greedy search would have taken at each place
            logits = oracle(torch.tensor([[*prompt, *ours[:-1]]])).logits[0, len(prompt) - 1 :]
        different = (logits.argmax(-1) != torch.tensor(ours)).nonzero().flatten().tolist()
        if different:
            first = different[0]
            gap = float(logits[first].max() - logits[first, ours[first]])
            assert gap < NEAR_TIE, f"prompt {i} differs at token {first} by {gap}"
            ties.append({"prompt": i, "token": first, "gap": gap})
    with capsys.disabled():
        print(f"\nnear-ties: {json.dumps(ties)}")


def test_logits_are_those_of_transformers(served) -> None:
    engine, text, oracle = served
    ids = list(text.encode(PROMPTS[17]).ids)
    pages = pages_for(engine.model.config, 40, 16)
    batch = flat([(ids, 0, len(ids), list(range(1, 40)))], 16)
    ours = engine.model.logits(engine.model.forward(batch, pages))
    with torch.no_grad():
        theirs = oracle(torch.tensor([ids])).logits[0]
    assert (ours - theirs).abs().max() < 5e-4


def test_one_stream_in_bf16_says_something_sensible(smollm2_gguf) -> None:
    checkpoint = open_gguf(Path(smollm2_gguf))
    engine, facts = build_engine(Config(dtype="bfloat16", max_context=256, kv_cache_memory=2**28), checkpoint)
    assert facts.dtype == "BF16"
    prompt = tuple(checkpoint.text.encode("The capital of France is").ids)
    engine.add(Request("a", prompt, SamplingParams(seed=0, max_tokens=8, temperature=0.0), time.monotonic()))
    tokens = []
    while engine.has_work:
        tokens += [event.token for _, event in engine.step() if isinstance(event, Sampled)]
    assert "Paris" in checkpoint.text.decode(tokens)

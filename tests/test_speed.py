"""Speed that the design promises, on whatever machine this is: as ratios, measured in turns."""

from __future__ import annotations

import random
import runpy
import statistics
from pathlib import Path

import pytest
import torch
from cutaway_server.config import Config
from cutaway_server.engine.build import build_engine, choose_dtype
from cutaway_server.model.gguf_file import open_gguf

STEP = Path(__file__).parents[1] / "bench" / "step.py"
PROMPT, OUTPUT, STREAMS = 16, 48, 16
BFLOAT16 = choose_dtype("auto", torch.device("cpu")) == torch.bfloat16


@pytest.mark.slow
@pytest.mark.skipif(not BFLOAT16, reason="needs a CPU that multiplies bfloat16")
def test_16_streams_in_bfloat16_are_worth_5_alone(smollm2_gguf: Path) -> None:
    run = runpy.run_path(str(STEP))["run"]
    config = Config(dtype="bfloat16", max_context=1024, kv_cache_memory=2**28)
    engine, facts = build_engine(config, open_gguf(smollm2_gguf))
    assert facts.dtype == "BF16"
    source = random.Random(0)
    run(engine, 2, PROMPT, 4, source)
    ratios = []
    for _ in range(3):
        alone, together = (sum(run(engine, streams, PROMPT, OUTPUT, source)[1]) for streams in (1, STREAMS))
        ratios.append(STREAMS * alone / together)
    print(f"throughput of {STREAMS} streams over one: {', '.join(f'{ratio:.1f}' for ratio in ratios)}")
    assert statistics.median(ratios) >= 5

"""Where packed weights lie, and how much memory it takes to put them there."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cutaway_server.kernels.packing import Packed, pack
from cutaway_server.kernels.quantized import Kind
from cutaway_server.kernels.weight_memory import HUGE, WeightMemory

PACK_AND_MEASURE = """
import json, sys, threading, torch
from dataclasses import replace
from pathlib import Path
from cutaway_server.kernels.cpu import CpuKernels
from cutaway_server.kernels.library import load_library
from cutaway_server.kernels.memory import trim
from cutaway_server.kernels.rounding import NO_ROUNDING, ROUNDINGS
from networks import SHAPES, random_weights

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

torch.set_num_threads(1)
library = load_library()
if library is None:
    print("null")
    sys.exit()
config = replace(SHAPES["plain"], d_model=1024, d_mlp=2816, n_heads=16, n_kv_heads=8, d_head=64, d_vocab=16_000)
torch.ones(64, 64, dtype=torch.bfloat16).float()
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

weights = random_weights(config, dtype=torch.bfloat16)
trim()  # what making them left
full, weight_bytes = anonymous(), weights.n_bytes
thread = threading.Thread(target=watch)
thread.start()
kernels = CpuKernels(config, weights, 64, library, consume=True, rounding=ROUNDINGS.get(sys.argv[1], NO_ROUNDING))
done.set()
thread.join()
print(json.dumps({"weights": weight_bytes, "more": peak[0] - full, "after": anonymous() - before}))
"""


def test_tensors_lie_one_after_the_other_from_a_huge_page_on() -> None:
    memory = WeightMemory()
    first, second = memory.empty((3, 5), torch.bfloat16), memory.empty((7,), torch.float32)
    assert first.data_ptr() % HUGE == 0
    assert second.data_ptr() == first.data_ptr() + 64
    assert first.dtype == torch.bfloat16
    assert first.shape == (3, 5)
    assert not first.any()
    assert memory.empty((0, 4), torch.int8).shape == (0, 4)


def test_what_does_not_fit_starts_a_mapping_of_its_own_and_the_first_stays() -> None:
    memory = WeightMemory()
    small, large = memory.empty((16,), torch.int32), memory.empty((5 * 2**24,), torch.int32)
    small.fill_(7)
    large[-1] = 9
    assert large.data_ptr() % HUGE == 0
    del memory, large
    gc.collect()
    assert small.tolist() == [7] * 16


def test_packed_matrices_of_one_model_are_neighbours() -> None:
    memory, weight = WeightMemory(), torch.randn(64, 128)
    plain, narrow = (pack(weight.to(dtype), memory=memory) for dtype in (torch.float32, torch.bfloat16))
    integers = pack(weight, rounded=Kind.ROW8, memory=memory)
    assert isinstance(plain, Packed)
    assert isinstance(narrow, Packed)
    assert narrow.data.data_ptr() == plain.data.data_ptr() + 64 * 128 * 4
    assert integers.data.data_ptr() == narrow.data.data_ptr() + 64 * 128 * 2  # type: ignore[union-attr]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("rounding", ["none", "int8"])
def test_packing_takes_little_more_memory_than_the_weights(rounding: str) -> None:
    command = [sys.executable, "-c", PACK_AND_MEASURE, rounding]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    measured = json.loads(ran.stdout)
    if measured is None:
        pytest.skip("no native library here")
    assert measured["weights"] > 50e6
    assert measured["more"] <= 2**26, measured  # whatever the weights' size
    assert measured["after"] <= (1.15 if rounding == "none" else 0.7) * measured["weights"], measured

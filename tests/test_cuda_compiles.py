"""What a GPU would be given, as far as a machine without one can tell: kernels compile for it, the benchmark runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]


def program(tmp_path: Path, *arguments: str) -> str:
    """What a program of this repository prints."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT / 'server'}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h200_and_spills_nothing(tmp_path: Path) -> None:
    told = program(tmp_path, "tests/compile_cuda_kernels.py").splitlines()
    kernels = {line.split("_kernel")[0].split()[-1] for line in told}
    assert kernels == {"add_norm", "qkv", "split", "merge", "prefill", "activation", "matmul", "sum"}
    assert len(told) > 80
    for line in told:
        assert re.search(r" 0 spilled", line), line


@pytest.mark.slow
def test_the_benchmark_runs_on_tiny_shapes(tmp_path: Path) -> None:
    parts = ["limits", "linears", "decode", "host", "invariant", "saturated", "nano"]
    file = tmp_path / "gpu.json"
    program(tmp_path, "bench/gpu.py", "--device", "cpu", "--tiny", "--json", str(file), "--parts", *parts)
    records = json.loads(file.read_text())
    assert {record["part"] for record in records[1:]} == set(parts)
    assert all(record["tokens_per_second"] > 0 for record in records if "tokens_per_second" in record)


def test_the_benchmark_says_why_it_does_not_run() -> None:
    done = subprocess.run(
        [sys.executable, "bench/gpu.py", "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "--device cpu needs --tiny" in done.stderr

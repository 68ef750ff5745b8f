"""`make demo`'s script: it shows what there is and ends with 0, or says what is wrong and does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tiny import save_tiny

DEMO = Path(__file__).parents[1] / "bench" / "demo.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, DEMO, *arguments], capture_output=True, text=True, timeout=120)


def test_the_demo_shows_tokens_cache_and_batch_and_stops_its_server(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "tiny")
    options = ["--", "--dtype", "float32", "--threads", "1", "--kv-cache-memory", "8MB"]
    result = run("--model", str(tmp_path / "tiny"), "--max-tokens", "16", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    shown = " ".join(result.stdout.split())
    for part in ("listening on 127.0.0.1:", "What is gravity?", "log-prob", "from the prefix cache", "Everything held"):
        assert part in shown
    assert "steps made a token of each" in shown


def test_a_demo_without_its_model_says_so_and_fails(tmp_path: Path) -> None:
    result = run("--model", str(tmp_path / "nowhere"))
    assert result.returncode == 1
    assert "The demo failed" in result.stdout
    assert "nowhere" in result.stderr

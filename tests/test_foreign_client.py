"""A client in another language, with nothing of ours but the .proto file, streams and cancels."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import asking, eventually, serving, stub, text_of, tokens_of
from tiny import save_tiny

HERE = Path(__file__).parent
CANCELLED = 1  # as every gRPC numbers it

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="needs node and npm"),
]


def test_a_node_client_streams_and_cancels(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "tiny")
    here = shutil.copytree(HERE / "node", tmp_path / "node")
    subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund"], cwd=here, check=True, timeout=120, capture_output=True
    )
    with serving(tmp_path / "tiny") as live:
        command = ["node", "client.js", str(HERE.parent / "protos"), live.address]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=60, check=True)
        told = json.loads(done.stdout)
        assert eventually(live.is_clean, seconds=2)
        with stub(live.address) as client:
            expected = list(client.Generate(asking([40, 41, 42, 43], max_tokens=16)))
    streamed, cancelled = told["streamed"], told["cancelled"]
    assert (streamed["tokens"], streamed["text"]) == (tokens_of(expected), text_of(expected))
    assert streamed["events"][0] == "started"
    assert streamed["finished"]["completions"][0]["finishReason"] in (2, "FINISH_REASON_LENGTH")
    assert streamed["finished"]["usage"]["completionTokens"] == 16
    assert cancelled["code"] == CANCELLED
    assert cancelled["finished"] is None
    assert 3 <= len(cancelled["tokens"]) < 508

"""Clients in other languages, with nothing of ours but the .proto file, or not even that, stream and cancel."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import LiveServer, asking, eventually, serving, stub, text_of, tokens_of
from tiny import save_tiny

HERE = Path(__file__).parent
CANCELLED = 1  # as every gRPC numbers it


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path)
    with serving(path) as live:
        yield live


REFLECTIONS = ["grpc-v1", "grpc-v1alpha"]


def buf_curl(url: str, version: str, data: dict[str, object], *options: str) -> str:
    """What a client written in Go, that knows no contract but what reflection tells, is answered."""
    command = [
        *(str(Path(sys.executable).with_name("buf")), "curl", "--protocol", "grpc", "--http2-prior-knowledge"),
        *("--reflect-protocol", version, *options, url),
    ]
    if data:
        command += ["--data", json.dumps(data)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("version", REFLECTIONS)
def test_a_go_client_learns_the_contract_by_reflection_and_streams(version: str, tiny: LiveServer) -> None:
    base, service = f"http://{tiny.address}", "cutaway.v1.Inference"
    listed = set(buf_curl(base, version, {}, "--list-services").split())
    reflections = {f"grpc.reflection.{name.removeprefix('grpc-')}.ServerReflection" for name in REFLECTIONS}
    assert {service, "grpc.health.v1.Health"} | reflections <= listed
    methods = buf_curl(base, version, {}, "--list-methods").split()
    assert {f"{service}/Generate", *(f"{name}/ServerReflectionInfo" for name in reflections)} <= {*methods}
    said = {"tokenIds": {"ids": [40, 41, 42]}, "sampling": {"temperature": 0, "maxTokens": 5, "ignoreEos": True}}
    answer = buf_curl(f"{base}/{service}/Generate", version, said)
    with stub(tiny.address) as client:
        expected = list(client.Generate(asking([40, 41, 42], max_tokens=5)))
    assert [int(number) for number in re.findall(r'"id":\s*(\d+)', answer)] == tokens_of(expected)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="needs node and npm")
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

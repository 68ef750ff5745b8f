"""What the documents say is so: README's commands run, links lead somewhere, rooms and options are those there are."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from cutaway import Edit
from cutaway.capture import REDUCTIONS
from cutaway.cli import main
from cutaway_server.config import Config, read_config
from cutaway_server.probe.points import POINTS
from cutaway_server.service.keys import keys
from serving import LiveServer, serving
from tiny import save_tiny

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SERVER = ROOT / "server" / "cutaway_server"
EDITS = [name for name, kind in vars(Edit).items() if isinstance(kind, classmethod)]
README = (ROOT / "README.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def prompts(program: str) -> list[list[str]]:
    """README's command lines of a program: the arguments of each."""
    lines = [line for block in blocks(README, "") for line in block.splitlines() if line.startswith("$ ")]
    words = [shlex.split(line[2:], comments=True) for line in lines]
    return [found[found.index(program) + 1 :] for found in words if program in found]


def anchor(heading: str) -> str:
    """How a heading is linked to."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path, num_hidden_layers=30)  # as many as the model that the pages speak of
    with serving(path) as live:
        yield live


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if re.match(r"\w+://", target):
            continue
        path, _, fragment = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if fragment else []
        assert not fragment or fragment in map(anchor, headings), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_make_and_python_are_told_to_do_exists(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    for script in re.findall(r"(?:^    |`)python ([\w/]+\.py)", text, re.MULTILINE):
        assert (ROOT / script).exists(), script


def test_contributing_tells_of_every_marker_and_benchmark() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text() + (ROOT / "docs" / "performance.md").read_text()
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    for marker in markers:
        assert f"| `{marker.partition(':')[0]}` |" in page, marker
    for script in (ROOT / "bench").glob("*.py"):
        if '__name__ == "__main__"' in script.read_text() and script.name != "demo.py":
            assert f"bench/{script.name}" in page, script.name


@pytest.mark.parametrize("arguments", prompts("cutaway"), ids=" ".join)
def test_readmes_client_commands_run(arguments: list[str], live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    secured = {"--address": live.address, "--tls-ca": None}
    for option, value in secured.items():
        if option in arguments:
            at = arguments.index(option)
            arguments = [*arguments[:at], *([option, value] if value else []), *arguments[at + 2 :]]
    monkeypatch.setenv("CUTAWAY_ADDRESS", live.address)
    done = CliRunner().invoke(main, arguments, input="Hello\n/quit\n")
    assert done.exit_code == 0, done.output
    assert done.stdout


@pytest.mark.parametrize("arguments", prompts("cutaway-server"), ids=" ".join)
def test_readmes_server_commands_are_understood(arguments: list[str], tmp_path: Path) -> None:
    if arguments[0] == "keys":
        file = tmp_path / "keys.toml"
        done = CliRunner().invoke(keys, [str(file) if word == file.name else word for word in arguments[1:]])
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith("cutaway_")
    else:
        assert isinstance(read_config(arguments, {}), Config)


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_readmes_python_runs(code: str, live: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    exec(code.replace("127.0.0.1:50051", live.address), {})
    assert capsys.readouterr().out


def test_the_python_on_the_page_on_introspection_runs(
    live: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "introspection.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in blocks(page, "python"):
        exec(code.replace("127.0.0.1:50051", live.address), names)
    names["client"].close()  # type: ignore[attr-defined]


def test_the_page_on_introspection_has_every_point_reduction_and_edit() -> None:
    page = (ROOT / "docs" / "introspection.md").read_text()
    rows = re.findall(r"^\| `([\w.{}]+)` \| (.*?) \| (yes)? ?\| (\w+) \|", page, re.MULTILINE)
    points = [(p.name, ", ".join(p.axes), "yes" if p.writable else "", p.cost.value) for p in POINTS]
    assert rows == points
    for name in (*REDUCTIONS, *(f"Edit.{kind}" for kind in EDITS)):
        assert f"| `{name}" in page, name


def test_each_option_of_the_server_is_explained_once() -> None:
    rows = re.findall(r"^\| `--([\w-]+)` \|", (ROOT / "docs" / "options.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(name.replace("_", "-") for name in Config.model_fields)


def test_architecture_names_every_room_and_no_file_that_is_gone() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    told = re.findall(r"^\| *(?:\w[\w, ]*)? *\| (`.*?`) \|", page, re.MULTILINE)
    paths: set[str] = set()
    for cell in told:
        directory = ""
        for name in re.findall(r"`([^`]+)`", cell):
            directory = name[: name.rindex("/") + 1] if "/" in name.rstrip("/") else directory
            here = name if "/" in name.rstrip("/") or not directory else directory + name
            assert list(SERVER.glob(here)), f"{here} is in ARCHITECTURE.md only"
            paths.add(here)
    rooms = [path.name for path in SERVER.iterdir() if path.name not in ("__init__.py", "__pycache__", "py.typed")]
    for room in rooms:
        assert any(path.split("/")[0] == room for path in paths), f"{room} is not in ARCHITECTURE.md"

"""The notebooks of docs/examples run, each against a real server; what they claim of what they see is asserted there.

Those whose claims hold of any model run against a tiny one in the default suite; all run with SmolLM2 in the slow one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from serving import LiveServer, serving
from tiny import save_tiny

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
OF_ANY_MODEL = ["01-tokenization", "03-positional-encoding", "08-kv-cache"]


@pytest.fixture(scope="session")
def examples() -> ModuleType:
    spec = importlib.util.spec_from_file_location("examples_run", EXAMPLES / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path)
    with serving(path, pace=0.01) as live:
        yield live


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def smollm2_server(smollm2_gguf: Path, request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    with serving(smollm2_gguf, dtype=request.param, threads=2, max_context=2048, kv_cache_memory=2**28) as live:
        yield live


@pytest.mark.parametrize("name", OF_ANY_MODEL)
def test_what_holds_of_any_model_runs_with_a_tiny_one(
    name: str, examples: ModuleType, tiny_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUTAWAY_ADDRESS", tiny_server.address)
    ran = examples.run(EXAMPLES / f"{name}.ipynb")
    assert any(cell.get("outputs") for cell in ran.cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs_with_smollm2(
    path: Path, examples: ModuleType, smollm2_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUTAWAY_ADDRESS", smollm2_server.address)
    ran = examples.run(path)
    stored = nbformat.read(path, as_version=4)
    for mine, theirs in zip(ran.cells, stored.cells, strict=True):
        kinds = [[output.output_type for output in cell.get("outputs", ())] for cell in (mine, theirs)]
        assert kinds[0] == kinds[1], "docs/examples/run.py has not been run since the notebook was changed"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_with_what_they_show_and_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 400_000
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert all(output.output_type != "error" for output in shown)
    assert any("image/png" in output.get("data", {}) or output.get("text") for output in shown)
    claims = "".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert "assert " in claims, "a notebook checks what it claims"
    assert 'os.environ.get("CUTAWAY_ADDRESS"' in claims

"""What a wheel and a source distribution carry, and that the kernels in a wheel need no compiler."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from cutaway_server.kernels import build_native

ROOT = Path(__file__).parents[1]


def built(kind: str, source: Path, target: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, env={**os.environ, **environment})
    [made] = target.iterdir()
    return made


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.mark.skipif(build_native.find_compiler() is None, reason="no C compiler")
def test_a_wheel_built_from_the_source_distribution_serves_its_kernels_without_a_compiler(tmp_path: Path) -> None:
    archive = built("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(archive) as sources:
        sources.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    wheel = built("wheel", unpacked, tmp_path / "wheel")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("any.whl")
    assert f"cutaway_server/kernels/native/{build_native.prebuilt_name()}" in names(wheel)
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "installed")
    code = (
        "from cutaway_server.kernels.library import load_library; library = load_library(); print(library.supported())"
    )
    nowhere = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "installed"),
        "PATH": "",
        "CC": "",
        "XDG_CACHE_HOME": "/nowhere",
    }
    found = subprocess.run([sys.executable, "-c", code], env=nowhere, capture_output=True, text=True, cwd=tmp_path)
    assert "portable" in found.stdout, found.stderr


def test_a_wheel_without_kernels_fits_any_machine(tmp_path: Path) -> None:
    wheel = built("wheel", ROOT, tmp_path, CUTAWAY_BUILD_NATIVE="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    tops = {name.split("/")[0] for name in names(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cutaway", "cutaway_server"}
    assert not [name for name in names(wheel) if name.endswith(".so")]


def test_a_wheel_is_refused_without_a_compiler(tmp_path: Path) -> None:
    only_python = tmp_path / "bin"
    only_python.mkdir()
    if shutil.which("git"):
        (only_python / "git").symlink_to(str(shutil.which("git")))
    with pytest.raises(subprocess.CalledProcessError) as caught:
        built("wheel", ROOT, tmp_path / "wheel", PATH=str(only_python), CC="")
    assert b"CUTAWAY_BUILD_NATIVE=0" in caught.value.stderr

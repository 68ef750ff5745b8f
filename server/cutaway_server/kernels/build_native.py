"""The native library: as the wheel carries it, or compiled from its sources, once, into the user's cache."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cutaway_server.cache_directory import cache_directory

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
# No contraction: the order and rounding of every operation is the source's own.
COMMON = (
    "-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden",
)  # fmt: skip
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
X86 = {
    "amx": (*AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-DCUTAWAY_AMX"),
    "avx512vnni": (*AVX512, "-mavx512vnni"),
    "avx512": AVX512,
    "avx512bf16": (*AVX512, "-mavx512bf16"),  # 0.7 x avx512 on the one machine measured, so never by itself
    "avxvnni": (*AVX2, "-mavxvnni"),
    "avx2": AVX2,
}


def variants() -> dict[str, tuple[str, ...]]:
    """The compiler's flags of every variant for this architecture, fastest first."""
    return {**(X86 if platform.machine() in ("x86_64", "AMD64") else {}), "portable": ()}


def build(cache: Path | None = None) -> Path | None:
    """The library's file, compiled if it is not there yet; None, with one warning, where that cannot be done."""
    if (carried := SOURCES / prebuilt_name()).exists():
        return carried
    compiler = find_compiler()
    if compiler is None:
        log.warning("no C compiler (cc, gcc or clang) found: the slower reference kernels serve")
        return None
    library = (cache or cache_directory()) / f"kernels-{_key(compiler)}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = compile_library(compiler, Path(scratch))
            os.replace(made, library)  # whoever looks sees all of it or nothing
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("the native kernels cannot be built, the slower reference kernels serve: %s", error)
        return None
    except subprocess.CalledProcessError as error:
        log.warning("the native kernels do not compile, the slower reference kernels serve: %s", error.stderr[-2000:])
        return None
    return library


def prebuilt_name() -> str:
    """The file a wheel carries; it changes with the sources, the flags and the machine's kind."""
    return f"kernels-{_digest(platform.system(), platform.machine())}.so"


def find_compiler() -> str | None:
    """A C compiler: $CC, cc, gcc or clang."""
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _key(compiler: str) -> str:
    """Changes with the sources, the flags and the compiler."""
    stat = Path(compiler).resolve().stat()
    return _digest(compiler, stat.st_size, stat.st_mtime_ns, platform.machine())


def _digest(*also: object) -> str:
    digest = hashlib.blake2b(repr((COMMON, variants(), *also)).encode(), digest_size=12)
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()


def compile_library(compiler: str, scratch: Path) -> Path:
    """Every variant in one library, made in `scratch`.

    Raises:
        OSError, subprocess.SubprocessError: it does not compile.
    """
    jobs = {
        name: (*COMMON, *flags, f"-DVARIANT={name}", "-c", str(SOURCES / "operations.c"))
        for name, flags in variants().items()
    }
    jobs["support"] = (*COMMON, "-c", str(SOURCES / "support.c"))

    def run(name: str) -> str:
        target = str(scratch / f"{name}.o")
        _run([compiler, *jobs[name], "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(run, jobs))
    library = scratch / "kernels.so"
    _run([compiler, "-shared", "-fopenmp", *objects, "-o", str(library), "-lm"])
    return library


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)  # noqa: S603

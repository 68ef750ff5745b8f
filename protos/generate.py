"""Generate client/cutaway/v1 from protos/, or with --check tell whether the committed code is up to date."""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).parent
TARGET = PROTOS.parent / "client"


def generate(out: Path) -> None:
    """Write messages, stubs and their types for every .proto under protos/ into `out`."""
    sources = sorted(str(p.relative_to(PROTOS)) for p in PROTOS.rglob("*.proto"))
    bin_dir = Path(sys.executable).parent
    arguments = [
        "protoc", f"-I{PROTOS}", f"--python_out={out}", f"--grpc_python_out={out}",
        f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}", f"--mypy_out={out}",
        f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}", f"--mypy_grpc_out={out}",
        *sources,
    ]  # fmt: skip
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed")


def stale(fresh: Path) -> list[str]:
    """Generated files that differ from the committed ones."""
    names = [p.relative_to(fresh) for p in sorted(fresh.rglob("*")) if p.is_file()]
    return [str(n) for n in names if not (TARGET / n).exists() or not filecmp.cmp(fresh / n, TARGET / n, False)]


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the committed code is stale")
    if not parser.parse_args().check:
        generate(TARGET)
        return
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        if old := stale(Path(scratch)):
            raise SystemExit(f"stale generated code, run `make protos`: {', '.join(old)}")


if __name__ == "__main__":
    main()

"""Writes what each layer of the images installs, from pyproject.toml and constraints.txt in the working directory.

torch.txt has torch alone, at its version; server.txt, tools.txt (the client, and `cutaway-server keys`) and build.txt
(what builds the wheel) have the names, and their versions come from constraints.txt.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

KEYS = "pydantic"  # what `cutaway-server keys` imports beside what the client does


def main() -> None:
    """Write the files."""
    pyproject = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    pins = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    client, server = pyproject["project"]["dependencies"], pyproject["project"]["optional-dependencies"]["server"]
    constrained = ["-c constraints.txt"]
    layers = {
        "torch": [pin for pin in pins if pin.startswith("torch==")],
        "server": [*constrained, *client, *server],
        "tools": [*constrained, *client, KEYS],
        "build": [*constrained, *pyproject["build-system"]["requires"]],
    }
    for name, lines in layers.items():
        Path(f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

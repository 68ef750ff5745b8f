"""constraints.txt pins all that is installed for the server and for working on it, and nothing that is not."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CUDA = ("nvidia-", "cuda-")  # libraries that torch brings where it is not the CPU's, at versions of its own
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ASKED = [
    *PROJECT["build-system"]["requires"],
    *PROJECT["project"]["dependencies"],
    *(line for extra in ("server", "dev") for line in PROJECT["project"]["optional-dependencies"][extra]),
]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def wanted(lines: Iterable[str], extras: frozenset[str] = frozenset()) -> list[Requirement]:
    """Those of the requirements that hold here."""
    found = [Requirement(line) for line in lines]
    environments = [{**default_environment(), "extra": extra} for extra in extras | {""}]
    return [one for one in found if one.marker is None or any(map(one.marker.evaluate, environments))]


def closure() -> list[tuple[str, Requirement]]:
    """Every requirement of what is asked for, and of what that requires: by whom, and what."""
    found, open_ones, seen = [], [("pyproject.toml", one) for one in wanted(ASKED)], set()
    while open_ones:
        by, one = open_ones.pop()
        if one.name.startswith(CUDA):
            continue
        found.append((by, one))
        key = (canonicalize_name(one.name), frozenset(one.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            lines = requires(one.name) or []
        except PackageNotFoundError:
            pytest.fail(f"{one.name} is required by {by} and not installed: what it requires cannot be told")
        open_ones += [(one.name, inner) for inner in wanted(lines, key[1])]
    return found


def test_every_package_that_is_installed_is_pinned_to_a_version_that_all_accept() -> None:
    pinned, wrong = pins(), []
    for by, one in closure():
        version = pinned.get(canonicalize_name(one.name))
        if version is None or not one.specifier.contains(version, prereleases=True):
            wrong.append(f"{by} requires {one}, pinned: {version}")
    assert not wrong


def test_nothing_is_pinned_that_nobody_requires() -> None:
    assert pins().keys() == {canonicalize_name(one.name) for _, one in closure()}

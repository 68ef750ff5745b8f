"""Write dashboards/*.json, or with --check tell whether they are what this would write."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cache import cache
from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from introspection import introspection
from memory import memory
from overview import overview

DASHBOARDS = Path(__file__).parent / "dashboards"


def main() -> int:
    """The exit code: 1 if --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not up to date")
    check = parser.parse_args().check
    stale = 0
    for board in (overview, cache, memory, introspection):
        name, made = board.__name__, board()
        path = DASHBOARDS / f"{name}.json"
        text = json.dumps(_plain(made), indent=2, sort_keys=True) + "\n"
        if check and (not path.exists() or path.read_text() != text):
            print(f"{path} is not up to date: run {Path(__file__).name}", file=sys.stderr)
            stale = 1
        elif not check:
            path.write_text(text)
    return stale


def _plain(made: Dashboard) -> dict[str, Any]:
    """The dashboard as JSON, without what the SDK writes into each variable and @grafana/schema has in none."""
    plain: dict[str, Any] = json.loads(json.dumps(made.build(), cls=JSONEncoder))
    for variable in plain["templating"]["list"]:
        for key in ("auto", "auto_min", "auto_count"):
            del variable[key]
    return plain


if __name__ == "__main__":
    sys.exit(main())

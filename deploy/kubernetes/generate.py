"""Write components/prometheus/rules.yaml: deploy/prometheus/rules, as Prometheus's operator takes them."""

from __future__ import annotations

from pathlib import Path

import yaml

HERE = Path(__file__).parent
RULES = HERE.parent / "prometheus" / "rules"
TARGET = HERE / "components" / "prometheus" / "rules.yaml"


def main() -> None:
    """Write the file."""
    groups = [group for path in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]]
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "cutaway"},
        "spec": {"groups": groups},
    }
    heading = "# Made by deploy/kubernetes/generate.py from deploy/prometheus/rules: change them there.\n"
    TARGET.write_text(heading + yaml.safe_dump(resource, sort_keys=False, width=120))


if __name__ == "__main__":
    main()

#!/opt/cutaway/bin/python3
"""Exits with 0 if the server in this container takes requests, asking grpc.health.v1 on --health-listen; else with 1.

The address is CUTAWAY_HEALTH_LISTEN: set it there, not on the command line, so that both see it.
"""

import os
import sys

from cutaway import Client, CutawayError

SECONDS = 5.0
NEARBY = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104  # what listens everywhere listens here


def main() -> int:
    """The exit code."""
    host, _, port = os.environ["CUTAWAY_HEALTH_LISTEN"].rpartition(":")
    try:
        with Client(f"{NEARBY.get(host, host)}:{port}", timeout=SECONDS, retries=0) as client:
            health = client.health()
    except CutawayError as error:
        print(error, file=sys.stderr)
        return 1
    print(health.name)
    return 0 if health.name == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())

"""How a connection behaves: what is tried again, for how long, and what goes through a proxy."""

from __future__ import annotations

import json
import math
import re
from ipaddress import ip_address

from cutaway.errors import InvalidArgument

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_RETRIES = 4  # gRPC makes at most five attempts
LONGEST_SECONDS = 1e9  # gRPC takes infinity, and what overflows its clock, for a time that has passed
ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^][:/,@\s]+):(?P<port>\d{1,5})")
RESOLVED = re.compile(r"(unix|unix-abstract|vsock|dns|ipv4|ipv6|xds|google-c2p):.+")  # gRPC's own ways to name a server
HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^][:/,@\s]+)(:\d+)?")

PAUSES = (0.1, 0.25, 0.6, 1.6)  # seconds before each retry, give or take a fifth

# The calls that may run twice without harm. Abort may not: a second one that succeeds is told NOT_FOUND.
STREAM = {"service": "cutaway.v1.Inference", "method": "Generate"}
REPEATABLE = [
    {"service": "cutaway.v1.Inference", "method": "Tokenize"},
    {"service": "cutaway.v1.Inference", "method": "Detokenize"},
    {"service": "cutaway.v1.Inference", "method": "GetModel"},
    {"service": "grpc.health.v1.Health", "method": "Check"},
]


def channel_options(address: str, retries: int, *, streams: bool) -> list[tuple[str, str | int]]:
    """The options of a channel to `address`. `streams`: gRPC tries streams again too, and not `Attempts`.

    gRPC tries a call again after UNAVAILABLE, with `PAUSES` between, as long as nothing of its answer has come: a
    stream that has begun is never begun again.

    Raises:
        ValueError: `retries` is not in [0, 4].
    """
    if not 0 <= retries <= MAX_RETRIES:
        raise ValueError(f"retries: {retries} is not in [0, {MAX_RETRIES}]")
    options: list[tuple[str, str | int]] = [
        ("grpc.enable_retries", int(retries > 0)),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
    if retries:
        options.append(("grpc.service_config", json.dumps(service_config(retries, streams=streams))))
    if is_loopback(address):
        options.append(("grpc.enable_http_proxy", 0))  # http_proxy is never meant for this machine
    return options


def check_address(address: str) -> str:
    """The address, if it says where to go: gRPC would take another port for granted, and try it for ever.

    Raises:
        ValueError: it has no port, or is no address.
    """
    found = ADDRESS.fullmatch(address)
    if (found and 0 < int(found["port"]) < 65536) or RESOLVED.fullmatch(address):
        return address
    raise ValueError(f"address: {address!r} is not HOST:PORT with a port from 1 to 65535, such as {DEFAULT_ADDRESS}")


def is_loopback(address: str) -> bool:
    """Whether calls to `address` stay on this machine; what is not plainly so counts as the network."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    found = HOST.fullmatch(address)
    if found is None:
        return False
    try:
        return ip_address(found["host"].strip("[]")).is_loopback
    except ValueError:
        return found["host"] == "localhost"


def seconds(timeout: float | None, default: float | None) -> float | None:
    """A call's timeout as gRPC takes it; None: it waits for ever.

    Raises:
        InvalidArgument: it is not a number.
    """
    chosen = default if timeout is None else timeout
    if chosen is None or chosen > LONGEST_SECONDS:
        return None
    if math.isnan(chosen):
        raise InvalidArgument("timeout: nan is not a number of seconds")
    return chosen


def service_config(retries: int, *, streams: bool) -> dict[str, object]:
    """The retries, described as gRPC wants it."""
    policy = {
        "maxAttempts": 1 + retries,
        "initialBackoff": "0.1s",
        "backoffMultiplier": 2.5,
        "maxBackoff": "2s",
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return {"methodConfig": [{"name": [*REPEATABLE, STREAM] if streams else REPEATABLE, "retryPolicy": policy}]}

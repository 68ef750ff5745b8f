"""How a connection behaves: what is tried again, for how long, and what goes through a proxy."""

from __future__ import annotations

import json

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_RETRIES = 4  # gRPC makes at most five attempts
LOOPBACK = ("127.", "localhost:", "[::1]:", "unix:")

# The calls that may run twice without harm. Abort may not: a second one that succeeds is told NOT_FOUND.
REPEATABLE = [
    {"service": "cutaway.v1.Inference", "method": "Generate"},
    {"service": "cutaway.v1.Inference", "method": "Tokenize"},
    {"service": "cutaway.v1.Inference", "method": "Detokenize"},
    {"service": "cutaway.v1.Inference", "method": "GetModel"},
    {"service": "grpc.health.v1.Health", "method": "Check"},
]


def channel_options(address: str, retries: int) -> list[tuple[str, str | int]]:
    """The options of a channel to `address`.

    gRPC tries a call again after UNAVAILABLE, waiting 0.1, 0.25, 0.6 and 1.6 seconds (give or take a fifth), as long
    as nothing of its answer has come: a stream that has begun is never begun again.

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
        options.append(("grpc.service_config", json.dumps(service_config(retries))))
    if address.startswith(LOOPBACK):
        options.append(("grpc.enable_http_proxy", 0))  # http_proxy is never meant for this machine
    return options


def service_config(retries: int) -> dict[str, object]:
    """The retries, described as gRPC wants it."""
    policy = {
        "maxAttempts": 1 + retries,
        "initialBackoff": "0.1s",
        "backoffMultiplier": 2.5,
        "maxBackoff": "2s",
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return {"methodConfig": [{"name": REPEATABLE, "retryPolicy": policy}]}

"""How much of the server one connection, or one that never gets to the point, may take: options of gRPC."""

from __future__ import annotations

from cutaway_server.config import Config

HANDSHAKE_MS = 10_000  # TLS and HTTP/2 are spoken by then, or the connection is closed
METADATA_BYTES = 8192
MOST_METADATA_BYTES = 16_384  # in between a growing part of calls is refused, says gRPC
KEEPALIVE_MS = 30_000  # finds clients whose machines are gone
KEEPALIVE_PATIENCE_MS = 10_000
PING_INTERVAL_MS = 10_000  # a client that pings more often
PING_STRIKES = 2  # than so many times is disconnected
HEALTH_CONNECTIONS = 64
HEALTH_CALLS = 256
HEALTH_MESSAGE_BYTES = 4096
OTHER_CALLS = 1024  # open at a time, beside requests that run or wait

Options = list[tuple[str, int]]


def options(config: Config) -> Options:
    """The options of the port that is served."""
    bounds = [
        *_common(),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_streams),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_PATIENCE_MS),
    ]
    if config.max_connection_age is not None:
        bounds.append(("grpc.max_connection_age_ms", round(1000 * config.max_connection_age)))
        if config.max_connection_age_grace is not None:  # otherwise until the last stream has ended
            bounds.append(("grpc.max_connection_age_grace_ms", round(1000 * config.max_connection_age_grace)))
    return bounds


def health_options() -> Options:
    """The options of the port for probes, which anybody may reach."""
    return [
        *_common(),
        ("grpc.max_receive_message_length", HEALTH_MESSAGE_BYTES),
        ("grpc.max_concurrent_streams", HEALTH_CONNECTIONS),
        ("grpc.max_allowed_incoming_connections", HEALTH_CONNECTIONS),
    ]


def most_calls(config: Config) -> int:
    """Calls that may be open at a time, over all connections; gRPC refuses more with RESOURCE_EXHAUSTED."""
    return 2 * (config.max_running + config.max_queued) + OTHER_CALLS


def _common() -> Options:
    return [
        ("grpc.so_reuseport", 0),  # two servers on one port would share its calls, silently
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MOST_METADATA_BYTES),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_INTERVAL_MS),
        ("grpc.http2.max_ping_strikes", PING_STRIKES),
    ]

"""Credentials for tests: a file of keys, one for each name, and calls of any method as any caller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc
from cutaway_server.service.credentials import digest, new_key

EVERY_SCOPE = ("generate", "introspect", "edit", "weights", "observe", "admin")
DENIED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def write_keys(
    path: Path, keys: Mapping[str, tuple[Iterable[str], str]], rest: str = "", known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Write a file of credentials; `keys`: scopes and tenant by name. The keys by name, those `known` kept."""
    made = {name: (known or {}).get(name) or new_key() for name in keys}
    entries = [
        f'[[key]]\nname = "{name}"\nsha256 = "{digest(made[name])}"\nscopes = {list(scopes)}\ntenant = "{tenant}"\n'
        for name, (scopes, tenant) in keys.items()
    ]
    path.write_text("\n".join(entries) + rest)
    return made


def bearer(key: str | None) -> list[tuple[str, str]]:
    return [] if key is None else [("authorization", f"Bearer {key}")]


def outcome(
    channel: grpc.Channel, method: str, metadata: Iterable[tuple[str, str]] = (), message: bytes = b""
) -> tuple[grpc.StatusCode, str]:
    """How a call of `method` goes that sends `message`: OK as soon as something has come back."""
    call: Any = channel.stream_stream(method)(iter([message]), metadata=list(metadata), timeout=20)
    try:
        for _ in call:
            call.cancel()
            return grpc.StatusCode.OK, ""
        return call.code(), call.details()
    except grpc.RpcError as error:
        return error.code(), error.details()  # type: ignore[attr-defined]

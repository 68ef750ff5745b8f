"""How a client proves who it is, and to whom it listens: API key, TLS, certificate."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import grpc

from cutaway.channel import is_loopback

File: TypeAlias = str | os.PathLike[str]
Metadata: TypeAlias = tuple[tuple[str, str], ...]
PRINTABLE = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Security:
    """What each call carries, and what the connection is made with; None: plain text."""

    metadata: Metadata = field(repr=False)
    channel: grpc.ChannelCredentials | None


def security(address: str, api_key: str | None, tls: bool | File | None, cert: tuple[File, File] | None) -> Security:
    """Read what is to be proven and trusted.

    Args:
        address: where it goes.
        api_key: sent with every call, over TLS or within this machine.
        tls: True trusts the usual authorities, a file (PEM) only those in it, False speaks plain text, and None does
            unless there is a `cert`.
        cert: files of the client's certificate chain and of its private key (PEM).

    Raises:
        ValueError: the key cannot be one, or would go over the network in plain text; or `cert` goes without TLS.
        OSError: a file cannot be read.
    """
    if cert is not None and tls is False:
        raise ValueError("cert: a certificate is shown over TLS only, and tls is False")
    encrypted = cert is not None if tls is None else tls is not False
    if api_key is not None:
        _check_key(api_key)
        if not encrypted and not is_loopback(address):
            raise ValueError(f"api_key: would go to {address} in plain text, for others to read: set tls")
    metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
    return Security(metadata, _credentials(tls, cert) if encrypted else None)


def _check_key(api_key: str) -> None:
    if not PRINTABLE.fullmatch(api_key):  # not told: it may be most of a secret
        raise ValueError("api_key: must be of printable ASCII characters without blanks")


def _credentials(tls: bool | File | None, cert: tuple[File, File] | None) -> grpc.ChannelCredentials:
    authorities = None if tls is None or isinstance(tls, bool) else Path(tls).read_bytes()
    chain, key = (None, None) if cert is None else (Path(each).read_bytes() for each in cert)
    return grpc.ssl_channel_credentials(authorities, key, chain)

"""The file of credentials: which keys and certificates there are, what each may do, and for which tenant.

Keys are made by us, from 32 random bytes, and stored as SHA-256. A slow hash (scrypt, argon2) protects what can be
guessed; 256 random bits cannot, and a slow hash at every call would let anyone who sends wrong keys use up the CPU. So
that no weak key gets in by hand, what does not look like a generated key is refused before it is looked up.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import stat
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cutaway_server.service.caller import Caller, Scope

log = logging.getLogger(__name__)

PREFIX = "cutaway_"  # lets secret scanners find keys that were committed somewhere
KEY = re.compile(PREFIX + r"[A-Za-z0-9_-]{43}")
NAME = r"[A-Za-z0-9._-]{1,64}"  # of keys and tenants
MAX_ENTRIES = 1000  # each key is compared to each entry


class CredentialsError(Exception):
    """The file is missing or wrong. The message is one line and names the entry and the rule, never a hash."""


def new_key() -> str:
    """A key nobody can guess."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """What of a key is stored: SHA-256 in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    scopes: list[Scope] = Field(min_length=1)
    tenant: str = Field(pattern=f"^{NAME}$")
    priority: Annotated[int, Field(ge=-100, le=100)] = 0


class _Key(_Entry):
    name: str = Field(pattern=f"^{NAME}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _Certificate(_Entry):
    name: str = Field(min_length=1, max_length=255)


class _Tenant(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=f"^{NAME}$")
    max_calls: Annotated[int, Field(ge=1)] | None = None
    max_capture_bytes: Annotated[int, Field(ge=0)] | None = None
    share: Annotated[float, Field(ge=0.01, le=100)] = 1.0


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    key: list[_Key] = Field(default=[], max_length=MAX_ENTRIES)
    certificate: list[_Certificate] = Field(default=[], max_length=MAX_ENTRIES)
    tenant: list[_Tenant] = Field(default=[], max_length=MAX_ENTRIES)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one version of the file says."""

    keys: tuple[tuple[str, Caller], ...]  # SHA-256 in hex, and whose it is
    certificates: Mapping[str, Caller]  # by common name or subject alternative name

    def of_key(self, key: str) -> Caller | None:
        """Whose key this is. Takes as long for every key that looks like one."""
        if not KEY.fullmatch(key):
            return None
        found, asked = None, digest(key)
        for known, caller in self.keys:
            if hmac.compare_digest(known, asked):
                found = caller
        return found

    def of_names(self, names: Iterable[str]) -> Caller | None:
        """Whose certificate has these names: the one entry that fits; None if there are none, or several."""
        found = {caller.name: caller for name in names if (caller := self.certificates.get(name)) is not None}
        return next(iter(found.values())) if len(found) == 1 else None


class CredentialStore:
    """The credentials in force: those of the file when it was last read without a mistake."""

    def __init__(self, path: str) -> None:
        """Read the file.

        Raises:
            CredentialsError: it is missing or wrong.
        """
        self._path = Path(path)
        self.current = read_credentials(self._path)

    def reload(self) -> None:
        """Read the file again; if it is wrong, say so in the log and keep what was."""
        try:
            self.current = read_credentials(self._path)
        except CredentialsError as error:
            log.error("the credentials stay as they were: %s", error)
        else:
            log.info("credentials read again: %d keys", len(self.current.keys))


def read_credentials(path: Path) -> Credentials:
    """What the file says.

    Raises:
        CredentialsError: it is missing or wrong.
    """
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(path.stat().st_mode) & stat.S_IWOTH:
                raise CredentialsError(f"--api-keys: {str(path)!r} can be written by anybody: chmod o-w")
            parsed = _File.model_validate(tomllib.load(file))
    except OSError as error:
        raise CredentialsError(f"--api-keys: {str(path)!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CredentialsError(f"--api-keys: {str(path)!r} is not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part + 1 if isinstance(part, int) else part) for part in first["loc"])
        raise CredentialsError(f"--api-keys: {str(path)!r}: {place}: {first['msg']}") from None
    for kind, entries in (("key", parsed.key), ("certificate", parsed.certificate), ("tenant", parsed.tenant)):
        _refuse_twins(path, kind, [entry.name for entry in entries])
    _refuse_twins(path, "key", [entry.sha256 for entry in parsed.key], shown="sha256")
    tenants = {tenant.name: tenant for tenant in parsed.tenant}
    return Credentials(
        tuple((entry.sha256, _caller(entry, "key", tenants)) for entry in parsed.key),
        {entry.name: _caller(entry, "certificate", tenants) for entry in parsed.certificate},
    )


def _caller(entry: _Key | _Certificate, proof: str, tenants: Mapping[str, _Tenant]) -> Caller:
    tenant = tenants.get(entry.tenant) or _Tenant(name=entry.tenant)
    return Caller(
        entry.name,
        proof,
        entry.tenant,
        frozenset(entry.scopes),
        tenant.max_calls,
        tenant.max_capture_bytes,
        entry.priority,
        tenant.share,
    )


def _refuse_twins(path: Path, kind: str, values: list[str], shown: str | None = None) -> None:
    for value in values:
        if values.count(value) > 1:
            raise CredentialsError(
                f"--api-keys: {str(path)!r}: two {kind} entries have one {shown or f'name: {value}'}"
            )

"""Certificates made on the fly: an authority, and what it signs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HERE = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class Pair:
    """Files of a certificate and its key."""

    cert: str
    key: str

    def both(self) -> tuple[str, str]:
        return self.cert, self.key

    def moved_to(self, other: Pair) -> None:
        """Take the other's place, as an operator's rename would: key first, so that for a moment they do not match."""
        Path(self.key).replace(other.key)
        Path(self.cert).replace(other.cert)


class Authority:
    """Signs certificates, into files of a directory."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory, self._name, self._key = directory, _named(name), ec.generate_private_key(ec.SECP256R1())
        directory.mkdir(parents=True, exist_ok=True)
        certificate = (
            _builder(self._name, self._name, self._key.public_key(), days=30)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file = self._written(f"{name}.pem", certificate.public_bytes(serialization.Encoding.PEM))

    def sign(self, file: str, name: str = "server", sans: tuple[str, ...] = HERE, days: float = 30) -> Pair:
        """A certificate that ends in `days` (in the past if negative), for a common name and alternative names."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(_named(name), self._name, key.public_key(), days)
            .add_extension(x509.SubjectAlternativeName([_alternative(san) for san in sans or ("none.test",)]), False)
            .sign(self._key, hashes.SHA256())
        )
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Pair(
            self._written(f"{file}.pem", certificate.public_bytes(serialization.Encoding.PEM)),
            self._written(f"{file}.key", secret),
        )

    def _written(self, name: str, data: bytes) -> str:
        path = self._directory / name
        path.touch(mode=0o600)
        path.write_bytes(data)
        return str(path)


def serial(pem: str) -> int:
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(san: str) -> x509.GeneralName:
    if "//" in san:
        return x509.UniformResourceIdentifier(san)
    return x509.IPAddress(ip_address(san)) if san[0].isdigit() else x509.DNSName(san)


def _builder(
    name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=60))
        .not_valid_after(now + timedelta(days=days))
    )

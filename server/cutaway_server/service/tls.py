"""The server's certificate, read again when its files change: each new connection gets the newest, old ones go on."""

from __future__ import annotations

import logging
import os
import ssl
import stat
from pathlib import Path

import grpc

log = logging.getLogger(__name__)

Signature = tuple[tuple[int, int, int], ...]


class CertificateError(Exception):
    """A certificate or key is missing or wrong. The message is one line and names the option."""


class Certificates:
    """A certificate with its key and, for clients that must show one too, the authority that signs theirs."""

    def __init__(self, certificate: str, key: str, client_ca: str | None) -> None:
        """Read the files.

        Raises:
            CertificateError: one is missing or wrong, or the key belongs to another certificate.
        """
        self._certificate, self._key = Path(certificate), Path(key)
        self._client_ca = None if client_ca is None else Path(client_ca)
        self._first = self._read()
        self._signature = self._looked_at()
        if stat.S_IMODE(self._key.stat().st_mode) & stat.S_IROTH:
            log.warning("--tls-key: every user of this machine can read the key")

    def credentials(self) -> grpc.ServerCredentials:
        """What gRPC listens with; it asks for news before each handshake."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._news,  # type: ignore[arg-type]  # the stubs do not know that None means no news
            require_client_authentication=self._client_ca is not None,
        )

    def _news(self) -> grpc.ServerCertificateConfiguration | None:
        """The configuration if the files have changed, on a thread of gRPC's; None if not, or if they are wrong."""
        try:
            signature = self._looked_at()
            if signature == self._signature:
                return None
            read = self._read()
            if signature != self._looked_at():
                return None  # they are being written: the next handshake sees them whole
        except CertificateError as error:
            log.error("the certificate stays as it was: %s", error)  # certificate and key may not be a pair yet
            return None
        except OSError as error:
            log.error("the certificate stays as it was: %s", error.strerror)
            return None
        self._signature = signature
        log.info("the certificate has been read again")
        return read

    def _looked_at(self) -> Signature:
        files = [os.stat(path) for path in (self._certificate, self._key, self._client_ca) if path is not None]
        return tuple((file.st_mtime_ns, file.st_size, file.st_ino) for file in files)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        certificate, key = _bytes("--tls-cert", self._certificate), _bytes("--tls-key", self._key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:  # an empty password, lest an encrypted key ask the terminal for one
            context.load_cert_chain(self._certificate, self._key, password="")
        except (ssl.SSLError, ValueError) as error:
            why = getattr(error, "reason", None) or "no PEM, or an encrypted key"
            raise CertificateError(f"--tls-cert and --tls-key are no certificate and its key: {why}") from None
        authority = None
        if self._client_ca is not None:
            authority = _bytes("--tls-client-ca", self._client_ca)
            try:
                context.load_verify_locations(self._client_ca)
            except ssl.SSLError as error:
                raise CertificateError(f"--tls-client-ca has no certificate in PEM: {error.reason}") from None
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)


def _bytes(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{option}: {str(path)!r} cannot be read: {error.strerror}") from None

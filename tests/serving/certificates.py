"""Certificates made for a test, by an authority of its own."""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from serving.tls import TlsFiles

NOW = datetime.now(UTC)


class Authority:
    """A certificate authority, and the files of the certificates that it issues."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self._authority = trustme.CA()
        self.file = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.file))

    def issue(
        self, name: str = "server", *, begins: datetime = NOW - timedelta(days=1), expires: datetime | None = None
    ) -> TlsFiles:
        """Write a certificate for this machine, and its key; another certificate with that name is replaced."""
        issued = self._authority.issue_cert(
            "localhost", "127.0.0.1", not_before=begins, not_after=expires or NOW + timedelta(days=100)
        )
        files = TlsFiles(self._folder / f"{name}.pem", self._folder / f"{name}-key.pem")
        files.key.write_bytes(issued.private_key_pem.bytes())
        files.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        return files

    def client_context(self, files: TlsFiles | None = None) -> ssl.SSLContext:
        """Return a context that trusts this authority alone, with a client certificate if `files` are given."""
        context = ssl.create_default_context(cafile=self.file)
        if files:
            context.load_cert_chain(files.certificate, files.key)
        return context


def read_certificate(files: TlsFiles) -> bytes:
    """Return the certificate itself, without its chain, as DER."""
    end = "-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert(files.certificate.read_text().partition(end)[0] + end)


def fetch_certificate(port: int, context: ssl.SSLContext) -> bytes:
    """Return the certificate that a port of this machine has for a new connection, as DER."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        return connection.getpeercert(binary_form=True) or b""

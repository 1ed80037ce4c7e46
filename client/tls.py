"""TLS from files: the certificate authority of the service, and a certificate of the client."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the authorities to trust instead of the system's; the client's certificate with its chain, its key."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            raise ValueError("--cert and --key belong together: give the certificate and its key")

    def make_ssl_context(self) -> ssl.SSLContext:
        """Return a context for HTTPS; raises ValueError if a file is unreadable or invalid."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except OSError as error:
            raise ValueError(f"--ca {self.ca} cannot be read as PEM certificates: {error.strerror or error}") from error
        if self.cert:
            try:
                context.load_cert_chain(self.cert, self.key, password=_refuse_password)
            except OSError as error:
                raise ValueError(
                    f"--cert {self.cert} and --key {self.key} cannot be read as a PEM certificate and its key: "
                    f"{error.strerror or error}"
                ) from error
        return context

    def make_grpc_credentials(self) -> grpc.ChannelCredentials:
        """Return credentials for gRPC; raises ValueError if a file is unreadable or invalid."""
        import grpc

        self.make_ssl_context()  # gRPC only logs that files are invalid
        ca, key, cert = (path.read_bytes() if path else None for path in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)


def _refuse_password() -> str:
    raise ValueError("--key is encrypted; decrypt it with: openssl pkey -in KEY -out plain.pem")

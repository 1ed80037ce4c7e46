"""The TLS certificate of the service: validated at the start, and loaded again when its files change."""

from __future__ import annotations

import logging
import re
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from serving.errors import StartupError

CHECK_INTERVAL_S = 1.0  # between two checks of the files for changes
WARN_BEFORE = timedelta(days=14)  # the end of a certificate
WARN_INTERVAL_S = 86_400.0

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)

logger = logging.getLogger("serving")


@dataclass(frozen=True)
class TlsFiles:
    """The PEM files of the certificate with its chain, its key, and the authorities of client certificates, if any."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def stamp(self) -> tuple[object, ...]:
        """A value that changes with the files; raises StartupError if one cannot be read."""
        return tuple(_read_stamp(path) for path in (self.certificate, self.key, self.client_ca) if path)


@dataclass(frozen=True)
class LoadedTls:
    """What the files contained at one time: consistent and valid."""

    context: ssl.SSLContext  # for HTTP
    certificate: bytes
    key: bytes
    client_ca: bytes | None
    expires: datetime
    stamp: tuple[object, ...]

    @cached_property
    def grpc_configuration(self) -> Any:
        """The same for gRPC."""
        import grpc

        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], self.client_ca)


class Certificates:
    """The current certificate, for HTTP and gRPC; `watch` follows changes of its files.

    New connections get the new certificate. While the new files are invalid, the old certificate stays.

    Raises:
        StartupError: the files are invalid; the message says what to change.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._current = load_tls(files)
        self._failed: object = None  # the stamp of invalid files, or the error of unreadable ones
        self._warned_s = -WARN_INTERVAL_S
        self._warn_before_end()

    @property
    def current(self) -> LoadedTls:
        """The certificate for new connections."""
        return self._current

    def get_ssl_context(self) -> ssl.SSLContext:
        """Return the context for a new HTTP connection."""
        return self._current.context

    def make_grpc_credentials(self) -> Any:
        """Return `grpc.ServerCredentials` that follow the changes."""
        import grpc

        given = self._current

        def fetch() -> Any:
            """Return the configuration of a new connection, or None if it has not changed."""
            nonlocal given
            current = self._current
            if current is given:
                return None
            given = current
            return current.grpc_configuration

        return grpc.dynamic_ssl_server_credentials(
            given.grpc_configuration, fetch, require_client_authentication=self._files.client_ca is not None
        )

    def watch(self) -> None:
        """Follow the files in a thread of its own."""
        threading.Thread(target=self._watch, name="tls", daemon=True).start()

    def _watch(self) -> NoReturn:
        while True:
            time.sleep(CHECK_INTERVAL_S)
            try:
                self.refresh()
            except Exception:  # a bug; the next change is still followed
                logger.exception("checking the TLS certificate failed")

    def refresh(self) -> None:
        """Load the files if they have changed; log an error, once, if they are invalid."""
        stamp: object = None
        try:
            stamp = self._files.stamp
            if stamp == self._current.stamp:
                self._failed = None
            elif stamp != self._failed:
                self._current = load_tls(self._files)
                self._failed = None
                self._warned_s = -WARN_INTERVAL_S
                logger.info("new TLS certificate, valid until %s", self._current.expires.date())
        except StartupError as error:
            failed = stamp or str(error)
            if failed != self._failed:
                logger.error("the TLS certificate stays as it was: %s", error)
            self._failed = failed
        self._warn_before_end()

    def _warn_before_end(self) -> None:
        expires = self._current.expires
        if time.monotonic() - self._warned_s < WARN_INTERVAL_S or datetime.now(UTC) < expires - WARN_BEFORE:
            return
        self._warned_s = time.monotonic()
        state = "has expired" if expires < datetime.now(UTC) else "expires soon"
        logger.warning(
            "the TLS certificate %s %s, on %s: replace it; the service follows the change",
            self._files.certificate, state, f"{expires:%Y-%m-%d %H:%M} UTC",
        )  # fmt: skip


def load_tls(files: TlsFiles) -> LoadedTls:
    """Read and validate the files.

    Raises:
        StartupError: a file is unreadable, the key is encrypted or another certificate's, or the certificate is not
            valid now.
    """
    stamp = files.stamp
    certificate, key = _read(files.certificate, "--tls-cert"), _read(files.key, "--tls-key")
    client_ca = _read(files.client_ca, "--tls-client-ca") if files.client_ca else None
    expires = _check_validity(certificate, files.certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    _load_key_pair(context, files)
    if files.client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(files.client_ca)
        except ssl.SSLError as error:
            raise StartupError(
                f"--tls-client-ca {files.client_ca} has no certificate; expected a PEM file with the certificates of "
                "the authorities that issue client certificates"
            ) from error
    if files.stamp != stamp:
        raise StartupError(f"{files.certificate} or the files with it changed while they were read; try again")
    return LoadedTls(context, certificate, key, client_ca, expires, stamp)


def _load_key_pair(context: ssl.SSLContext, files: TlsFiles) -> None:
    def refuse_password() -> NoReturn:
        raise StartupError(
            f"--tls-key {files.key} is encrypted, and the service cannot ask for a password; decrypt it with "
            f"openssl pkey -in {files.key} -out plain.pem, readable by the service alone"
        )

    try:
        context.load_cert_chain(files.certificate, files.key, password=refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            problem = f"--tls-key {files.key} is not the key of --tls-cert {files.certificate}; give a matching pair"
        elif error.reason in ("EE_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
            problem = f"--tls-cert {files.certificate} is too weak ({error.reason}); use RSA of 2,048 bits, or P-256"
        else:
            problem = f"--tls-key {files.key} is not a private key in PEM format ({error.reason or error})"
        raise StartupError(problem) from error


def _check_validity(certificate: bytes, path: Path) -> datetime:
    """Return when the first certificate of a PEM file expires; raises StartupError if it is not valid now."""
    try:
        match = _CERTIFICATE.search(certificate.decode("ascii", "replace"))
        begins, expires = read_validity(ssl.PEM_cert_to_DER_cert(match[0])) if match else (None, None)
    except (ValueError, IndexError, StopIteration):
        begins, expires = None, None
    if begins is None or expires is None:
        raise StartupError(f"--tls-cert {path} is not a certificate in PEM format (-----BEGIN CERTIFICATE-----)")
    now = datetime.now(UTC)
    if not begins <= now <= expires:
        raise StartupError(
            f"--tls-cert {path} is valid from {begins:%Y-%m-%d %H:%M} to {expires:%Y-%m-%d %H:%M} UTC, and it is now "
            f"{now:%Y-%m-%d %H:%M}; get a new certificate, or correct the clock"
        )
    return expires


def read_validity(der: bytes) -> tuple[datetime, datetime]:
    """Return when a certificate (RFC 5280, section 4.1) begins to be valid, and when it expires.

    Raises:
        ValueError, IndexError, StopIteration: it is not a certificate.
    """
    fields = list(_split(_content(_content(der))))  # of tbsCertificate
    if fields[0][0] == 0xA0:  # the version, which is optional
        del fields[0]
    begins, expires = _split(fields[3][1])  # after serial number, signature algorithm and issuer
    return _read_time(*begins), _read_time(*expires)


def _content(der: bytes) -> bytes:
    return next(_split(der))[1]


def _split(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and content of each DER element."""
    start = 0
    while start < len(der):
        tag, size, start = der[start], der[start + 1], start + 2
        if size & 0x80:  # the length has so many bytes
            end = start + (size & 0x7F)
            size, start = int.from_bytes(der[start:end], "big"), end
        yield tag, der[start : start + size]
        start += size


def _read_time(tag: int, content: bytes) -> datetime:
    form = "%y%m%d%H%M%SZ" if tag == 0x17 else "%Y%m%d%H%M%SZ"  # UTCTime, GeneralizedTime
    return datetime.strptime(content.decode("ascii"), form).replace(tzinfo=UTC)


def _read(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"cannot read {option} {path}: {error.strerror or error}") from error


def _read_stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError as error:
        message = f"cannot read {path}: {error.strerror or error}; check --tls-cert, --tls-key and --tls-client-ca"
        raise StartupError(message) from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

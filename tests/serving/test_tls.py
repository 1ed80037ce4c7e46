"""The TLS certificate: what is refused at the start, changes while the service runs, and client certificates."""

from __future__ import annotations

import logging
import shutil
import ssl
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import httpx
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization

import serving
from client import Client, GrpcClient
from client.__main__ import main as client_command_line
from serving import server_process
from serving.errors import StartupError
from serving.tls import Certificates, TlsFiles, load_tls, read_validity
from tests.serving.certificates import NOW, Authority, fetch_certificate, read_certificate
from tests.serving.conftest import picture


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "tls")


@pytest.mark.parametrize("expires", [datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC), datetime(2120, 1, 2, tzinfo=UTC)])
def test_the_validity_is_read_in_both_forms_of_a_time(authority: Authority, expires: datetime) -> None:
    begins = datetime(2024, 2, 29, 12, 30, 5, tzinfo=UTC)
    files = authority.issue(begins=begins, expires=expires)
    assert read_validity(read_certificate(files)) == (begins, expires)
    assert load_tls(files).expires == expires


def encrypt(path: Path) -> None:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    form = serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, encryption))


def break_files(kind: str, authority: Authority) -> TlsFiles:
    """Return files with this fault."""
    day = timedelta(days=1)
    files = authority.issue(
        begins=NOW + day if kind == "future" else NOW - 9 * day, expires=NOW - day if kind == "expired" else None
    )
    if kind == "missing key":
        files.key.unlink()
    elif kind == "folder":
        return replace(files, certificate=files.certificate.parent)
    elif kind == "other key":
        return replace(files, key=authority.issue("other").key)
    elif kind == "encrypted key":
        encrypt(files.key)
    elif kind == "no key":
        files.key.write_text("nothing")
    elif kind == "no certificate":
        files.certificate.write_bytes(files.key.read_bytes())
    elif kind == "damaged certificate":
        files.certificate.write_text("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n")
    elif kind == "no CA":
        return replace(files, client_ca=files.key)
    return files


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing key", r"cannot read .*server-key.pem: No such file or directory; check --tls-cert, --tls-key"),
        ("folder", r"cannot read --tls-cert .*: Is a directory"),
        ("other key", r"--tls-key .*other-key.pem is not the key of --tls-cert .*server.pem; give a matching pair"),
        ("encrypted key", r"--tls-key .* is encrypted, .*decrypt it with openssl pkey -in"),
        ("no key", r"--tls-key .* is not a private key in PEM format"),
        ("no certificate", r"--tls-cert .* is not a certificate in PEM format"),
        ("damaged certificate", r"--tls-cert .* is not a certificate in PEM format"),
        ("no CA", r"--tls-client-ca .* has no certificate; expected a PEM file"),
        ("expired", r"is valid from 20.* to 20.* UTC, and it is now 20.*; get a new certificate"),
        ("future", r"is valid from 20.* to 20.* UTC, and it is now 20.*; get a new certificate, or correct the clock"),
    ],
)
def test_faulty_files_are_refused_with_what_to_do(authority: Authority, kind: str, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        load_tls(break_files(kind, authority))


def test_a_certificate_that_expires_soon_is_a_warning(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    Certificates(authority.issue())
    assert caplog.messages == []
    Certificates(authority.issue(expires=NOW + timedelta(days=3)))
    (message,) = caplog.messages
    assert "server.pem expires soon, on 20" in message


def test_an_invalid_change_keeps_the_certificate_and_is_logged_once(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    files = authority.issue()
    certificates = Certificates(files)
    first = certificates.current
    certificates.refresh()
    assert certificates.current is first
    other = authority.issue("other")
    files.certificate.write_bytes(other.certificate.read_bytes())
    for _ in range(3):
        certificates.refresh()
    assert certificates.current is first
    files.key.unlink()
    for _ in range(3):
        certificates.refresh()
    assert certificates.current is first
    files.key.write_bytes(other.key.read_bytes())
    certificates.refresh()
    assert certificates.current is not first
    mismatch, missing, changed = caplog.messages
    assert "the TLS certificate stays as it was: --tls-key" in mismatch
    assert "the TLS certificate stays as it was: cannot read" in missing
    assert "new TLS certificate, valid until" in changed


@pytest.fixture(scope="module")
def module_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("mutual"))


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, colours: Path, module_authority: Authority
) -> Iterator[tuple[server_process.Server, TlsFiles]]:
    """The service with TLS, for clients with certificates, and its files."""
    models = tmp_path_factory.mktemp("models")
    shutil.copytree(colours, models / "colours" / "7")
    files, own = module_authority.issue(), module_authority.issue("client")
    with serving.Server(
        models,
        client_cert=(own.certificate, own.key),
        tls_cert=files.certificate,
        tls_key=files.key,
        tls_client_ca=module_authority.file,
    ) as server:
        yield server, files
        assert server.stop() == 0
        assert "Traceback" not in server.log


def grpc_credentials(authority: Authority, own: TlsFiles | None = None) -> grpc.ChannelCredentials:
    pair = (own.key.read_bytes(), own.certificate.read_bytes()) if own else (None, None)
    return grpc.ssl_channel_credentials(authority.file.read_bytes(), *pair)


def test_clients_with_a_certificate_get_predictions(
    server: tuple[server_process.Server, TlsFiles], module_authority: Authority
) -> None:
    service, _ = server
    own = module_authority.issue("client")
    assert service.url.startswith("https://")
    assert "listening on https://" in service.log
    with Client(service.url, verify=module_authority.client_context(own)) as client:
        assert client.predict(picture("blue"))[0].label == "blue"
    credentials = grpc_credentials(module_authority, own)
    with GrpcClient(service.grpc_address, model="colours", credentials=credentials) as grpc_client:
        assert grpc_client.predict(picture("red"))[0].label == "red"


@pytest.mark.parametrize("own", ["none", "of another authority"])
def test_clients_without_a_certificate_get_nothing(
    server: tuple[server_process.Server, TlsFiles], module_authority: Authority, tmp_path: Path, own: str
) -> None:
    service, _ = server
    files = None if own == "none" else Authority(tmp_path / "other").issue("client")
    with pytest.raises((httpx.TransportError, ssl.SSLError)):
        httpx.get(service.url + "/healthz", verify=module_authority.client_context(files))
    with (
        grpc.secure_channel(service.grpc_address, grpc_credentials(module_authority, files)) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_new_connections_get_the_new_certificate_and_others_stay(
    server: tuple[server_process.Server, TlsFiles], module_authority: Authority
) -> None:
    service, files = server
    context = module_authority.client_context(module_authority.issue("client"))
    ports = [int(address.rpartition(":")[2]) for address in (service.url, service.grpc_address)]

    def fetch() -> set[bytes]:
        return {fetch_certificate(port, context) for port in ports}

    assert fetch() == {read_certificate(files)}
    with httpx.Client(base_url=service.url, verify=context) as kept:
        assert kept.get("/healthz").status_code == 200
        before = files.certificate.stat().st_mtime_ns
        module_authority.issue()  # replaces certificate and key
        assert files.certificate.stat().st_mtime_ns > before
        while fetch() != {read_certificate(files)}:
            assert service._process
            assert service._process.poll() is None
        assert kept.get("/healthz").status_code == 200


def test_mutual_tls_needs_a_certificate_for_the_readiness_check(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="tls_client_ca needs client_cert"):
        serving.Server(tmp_path, tls_client_ca=tmp_path / "ca.pem")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_clients_command_line_takes_the_files(
    server: tuple[server_process.Server, TlsFiles], module_authority: Authority, protocol: str
) -> None:
    service, _ = server
    own = module_authority.issue("client")
    place = ["--url", service.url] if protocol == "http" else ["--grpc", service.grpc_address]
    arguments = ["status", *place, "--model", "colours", "--ca", str(module_authority.file)]
    run = CliRunner().invoke
    shown = run(client_command_line, [*arguments, "--cert", str(own.certificate), "--key", str(own.key)])
    assert (shown.exit_code, shown.output) == (0, "colours  version 7  AVAILABLE\nready\n")
    assert run(client_command_line, [*arguments, "--cert", str(own.certificate)]).exit_code == 2
    wrong = run(client_command_line, [*arguments, "--cert", str(own.key), "--key", str(own.certificate)])
    assert "cannot be read as a PEM certificate and its key" in wrong.output
    assert run(client_command_line, arguments).exit_code == 3

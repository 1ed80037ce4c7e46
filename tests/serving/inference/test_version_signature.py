"""Signed versions: `training.exporter.signing` signs them, and only those are served, as they were signed."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from model_signing._cli import main as library_command_line

from serving.errors import ModelLoadError, StartupError
from serving.inference.local import LocalRepository
from serving.inference.model_config import ModelsFolder
from serving.inference.saved_model import SavedModelPredictor
from serving.inference.version_loader import InProcessLoader
from serving.inference.version_signature import SIGNATURE_FILE, SignatureVerifier
from tests.serving.inference.test_local import publish, states, wait_until
from training.__main__ import main as training
from training.errors import ExportError
from training.exporter import signing
from training.exporter.signing import sign_version

FILES = (
    "saved_model.pb",
    "variables/variables.index",
    "assets.extra/model.json",
    "assets.extra/tf_serving_warmup_requests",
)


class Keys:
    """A pair of keys, in files."""

    def __init__(self, folder: Path, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.private, self.public = folder / "key.pem", folder / "key.pub"
        key = key or ec.generate_private_key(ec.SECP256R1())
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        self.private.write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
        public_form = serialization.PublicFormat.SubjectPublicKeyInfo
        self.public.write_bytes(key.public_key().public_bytes(pem, public_form))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def version(colours: Path, tmp_path: Path, keys: Keys) -> Path:
    """A signed version."""
    folder = shutil.copytree(colours, tmp_path / "new" / "11")
    sign_version(folder, keys.private)
    return folder


def verify(version: Path, keys: Keys) -> tuple[str, str]:
    """Return the error code and message of a version, or "OK"."""
    try:
        SignatureVerifier(keys.public)(version)
    except ModelLoadError as error:
        return error.code, str(error)
    return "OK", ""


def test_the_command_signs_and_the_signature_is_verified(colours: Path, tmp_path: Path, keys: Keys) -> None:
    version = shutil.copytree(colours, tmp_path / "1")
    done = CliRunner().invoke(training, ["sign", str(version), "--key", str(keys.private)])
    assert (done.exit_code, done.output) == (0, f"signed         {version / SIGNATURE_FILE}\n")
    assert verify(version, keys) == ("OK", "")
    sign_version(version, keys.private)  # again
    assert verify(version, keys) == ("OK", "")
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert str(SIGNATURE_FILE) == signing.SIGNATURE_FILE


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()])
def test_other_curves(colours: Path, tmp_path: Path, curve: ec.EllipticCurve) -> None:
    version, keys = shutil.copytree(colours, tmp_path / "1"), Keys(tmp_path / "keys", ec.generate_private_key(curve))
    sign_version(version, keys.private)
    assert verify(version, keys) == ("OK", "")


def run_library(*arguments: object) -> None:
    """Run the library's own command."""
    done = CliRunner().invoke(library_command_line, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output


def test_the_librarys_own_command_verifies_and_signs(colours: Path, tmp_path: Path, version: Path, keys: Keys) -> None:
    run_library("verify", "key", version, "--signature", version / SIGNATURE_FILE, "--public_key", keys.public)
    other = shutil.copytree(colours, tmp_path / "other")
    run_library("sign", "key", other, "--signature", other / SIGNATURE_FILE, "--private_key", keys.private)
    assert verify(other, keys) == ("OK", "")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def alter_payload(signature: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    bundle = json.loads(signature.read_text())
    payload = json.loads(b64decode(bundle["dsseEnvelope"]["payload"]))
    change(payload)
    bundle["dsseEnvelope"]["payload"] = b64encode(json.dumps(payload).encode()).decode()
    signature.write_text(json.dumps(bundle))


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        *((lambda v, name=name: flip_bit(v / name), "DATA_LOSS", f": {name} has been altered. ") for name in FILES),
        (
            lambda v: (v / "assets" / "more.txt").write_text("x"),
            "DATA_LOSS",
            "signed: assets/more.txt was added. ",
        ),
        (lambda v: (v / "fingerprint.pb").unlink(), "DATA_LOSS", "signed: fingerprint.pb is missing. "),
        (lambda v: (v / SIGNATURE_FILE).unlink(), "FAILED_PRECONDITION", "is not signed, and only signed versions"),
        (lambda v: (v / SIGNATURE_FILE).write_text("{}"), "DATA_LOSS", "is not a model-signing signature"),
        (lambda v: (v / SIGNATURE_FILE).write_bytes(b"\xff\0"), "DATA_LOSS", "is not a model-signing signature"),
        (lambda v: replace(v / SIGNATURE_FILE, os.mkfifo), "FAILED_PRECONDITION", "is not a regular file"),
        (
            lambda v: replace(v / "fingerprint.pb", os.mkfifo),
            "FAILED_PRECONDITION",
            "a symbolic link or a special file",
        ),
        (
            lambda v: replace(v / "fingerprint.pb", lambda path: path.symlink_to("saved_model.pb")),
            "FAILED_PRECONDITION",
            "a symbolic link or a special file",
        ),
        (
            lambda v: alter_payload(v / SIGNATURE_FILE, lambda payload: payload["predicate"]["resources"].pop()),
            "FAILED_PRECONDITION",
            "was not made with the private key of --verify-key, or was altered",
        ),
        (
            lambda v: alter_payload(
                v / SIGNATURE_FILE,
                lambda payload: payload["predicate"]["serialization"].update(ignore_paths=["saved_model.pb"]),
            ),
            "FAILED_PRECONDITION",
            "leaves out saved_model.pb; sign the version with all its files",
        ),
    ],
)
def test_altered_versions_are_refused(
    version: Path, keys: Keys, damage: Callable[[Path], object], code: str, message: str
) -> None:
    damage(version)
    assert verify(version, keys)[0] == code
    with pytest.raises(ModelLoadError, match=message):
        SignatureVerifier(keys.public)(version)


def test_the_signature_of_another_key_is_refused(version: Path, tmp_path: Path) -> None:
    other = Keys(tmp_path / "other")
    assert verify(version, other)[0] == "FAILED_PRECONDITION"
    assert "was not made with the private key of --verify-key" in verify(version, other)[1]


def test_a_signature_that_leaves_out_files_is_refused_though_it_is_valid(
    colours: Path, tmp_path: Path, keys: Keys
) -> None:
    version = shutil.copytree(colours, tmp_path / "1")
    left_out = ["--signature", version / SIGNATURE_FILE, "--ignore-paths", version / "assets.extra"]
    run_library("sign", "key", version, "--private_key", keys.private, *left_out)
    assert verify(version, keys) == (
        "FAILED_PRECONDITION",
        "model.sig leaves out assets.extra; sign the version with all its files",
    )


def test_nothing_of_a_version_is_read_before_its_signature_is_verified(
    models_dir: Path, version: Path, keys: Keys
) -> None:
    """Versions that are not signed are not served, at the start and later; signing one makes it available."""
    loaded: list[Path] = []

    def load(path: Path) -> SavedModelPredictor:
        loaded.append(path)
        return SavedModelPredictor(path)

    signed = models_dir / "colours" / "2"
    sign_version(signed, keys.private)
    repository = LocalRepository(
        ModelsFolder(models_dir), loader=InProcessLoader(load), verify_signature=SignatureVerifier(keys.public)
    )
    repository.load()
    assert loaded == [signed]
    statuses = {status.version: status for status in repository.versions("colours")}
    assert statuses[10].error_message.startswith("colours/10 is not signed, and only signed versions are served")
    assert repository.resolve("colours").version == 2
    threading.Thread(target=repository.poll_forever, args=(0.05,), daemon=True).start()
    flip_bit(version / "assets.extra" / "model.json")
    altered = publish(version, models_dir, 11)
    wait_until(lambda: states(repository).get(11) == "END")
    assert (loaded, repository.resolve("colours").version) == ([signed], 2)
    sign_version(altered, keys.private)
    wait_until(lambda: repository.resolve("colours").version == 11)
    assert loaded == [signed, altered]


def test_a_version_that_changes_while_it_is_loaded_is_verified_again(
    models_dir: Path, version: Path, keys: Keys
) -> None:
    changed: list[Path] = []

    def load(path: Path) -> SavedModelPredictor:
        predictor = SavedModelPredictor(path)
        if path.name == "11" and not changed:
            flip_bit(path / "saved_model.pb")
            changed.append(path)
        return predictor

    shutil.rmtree(models_dir / "colours" / "10")
    sign_version(models_dir / "colours" / "2", keys.private)
    publish(version, models_dir, 11)
    repository = LocalRepository(
        ModelsFolder(models_dir), loader=InProcessLoader(load), verify_signature=SignatureVerifier(keys.public)
    )
    repository.load()
    assert changed
    threading.Thread(target=repository.poll_forever, args=(0.05,), daemon=True).start()
    wait_until(lambda: "has been altered" in repository.versions("colours")[0].error_message)
    wait_until(lambda: states(repository).get(2) == "AVAILABLE")


def test_later_changes_of_a_loaded_version_are_reported_and_not_read(
    models_dir: Path, version: Path, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    for unsigned in ("2", "10"):
        shutil.rmtree(models_dir / "colours" / unsigned)
    path = publish(version, models_dir, 11)
    repository = LocalRepository(ModelsFolder(models_dir), verify_signature=SignatureVerifier(keys.public))
    repository.load()
    (path / "assets.extra" / "model.json").write_text('{"class_names": ["a", "b", "c"]}')
    for _ in range(3):
        repository.poll()
    (status,) = repository.versions("colours")
    assert (status.state, status.warnings) == ("AVAILABLE", ("signature",))
    assert "changed after the signature was verified, and the change is ignored" in status.error_message
    assert repository.resolve("colours").info.class_names == ("red", "green", "blue")
    assert len([message for message in caplog.messages if "signature was verified" in message]) == 1


def test_a_key_that_cannot_be_used_is_a_startup_error(
    tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Keys(tmp_path / "rsa", rsa.generate_private_key(65_537, 2_048))
    for file in (keys.private, wrong.public):
        with pytest.raises(StartupError, match="is not a public key of an elliptic curve"):
            SignatureVerifier(file)
    with pytest.raises(StartupError, match=r"cannot read --verify-key .*: No such file"):
        SignatureVerifier(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(
        StartupError, match=r"needs the extra 'signing'.*pip install 'image-classifier-serving\[signing\]'"
    ):
        SignatureVerifier(keys.public)


def test_what_cannot_be_signed_is_refused(
    colours: Path, tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = shutil.copytree(colours, tmp_path / "1")
    with pytest.raises(ExportError, match=r"is not a version: expected a folder with saved_model.pb"):
        sign_version(tmp_path, keys.private)
    for key in (keys.public, Keys(tmp_path / "rsa", rsa.generate_private_key(65_537, 2_048)).private):
        with pytest.raises(ExportError, match="is not a private key of an elliptic curve"):
            sign_version(version, key)
    (version / "link").symlink_to("saved_model.pb")
    with pytest.raises(ExportError, match=r"cannot be signed: .*symlink"):
        sign_version(version, keys.private)
    assert not (version / SIGNATURE_FILE).exists()
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ExportError, match="signing needs the extra 'signing'"):
        sign_version(version, keys.private)

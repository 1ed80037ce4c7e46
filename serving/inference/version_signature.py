"""Signed versions: verifies `model.sig`, a signature in the OpenSSF model-signing format, with its own library.

The signature lists every file of the version with its hash. A version with another file, or without one of them, is not
what was signed. Symbolic links are refused.
"""

from __future__ import annotations

import base64
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from serving.errors import ModelLoadError, StartupError
from serving.inference.version_files import read_file

SIGNATURE_FILE = Path("model.sig")  # in the version's folder
MAX_SIGNATURE_BYTES = 16 * 1024 * 1024
# Files that a signature may leave out. The last four are the library's default, and no model reads them.
UNSIGNED = frozenset({str(SIGNATURE_FILE), ".git", ".gitattributes", ".github", ".gitignore"})
_SHOWN_AT_MOST = 5
_HASHES = ("sha256", "blake2", "blake3")


class SignatureVerifier:
    """Verifies versions with a public key: an elliptic curve key (P-256, P-384, P-521) in a PEM file.

    Raises:
        StartupError: the library is missing, or the key is unreadable or of another kind.
    """

    def __init__(self, key: Path) -> None:
        try:
            from model_signing import hashing, verifying
        except ImportError as error:
            raise StartupError(
                f"--verify-key needs the extra 'signing' ({error}); install it with: "
                "pip install 'image-classifier-serving[signing]'"
            ) from error
        self._hashing = hashing
        try:
            self._config = verifying.Config().use_elliptic_key_verifier(public_key=key)
        except OSError as error:
            raise StartupError(f"cannot read --verify-key {key}: {error.strerror or error}") from error
        except Exception as error:  # the library and its own raise many kinds
            raise StartupError(
                f"--verify-key {key} is not a public key of an elliptic curve (P-256, P-384 or P-521) in PEM format; "
                "write it with: openssl pkey -in PRIVATE_KEY -pubout -out PUBLIC_KEY"
            ) from error

    def __call__(self, path: Path) -> None:
        """Verify a version's folder.

        Raises:
            ModelLoadError: it is not signed, or with another key, or its files are not those that were signed.
        """
        signature = path / SIGNATURE_FILE
        if not signature.exists():
            raise ModelLoadError(
                f"{path} is not signed, and only signed versions are served (--verify-key); sign it with "
                "the command sign of training",
                code="FAILED_PRECONDITION",
            )
        content = read_file(signature, max_bytes=MAX_SIGNATURE_BYTES)
        folder = path.resolve()
        config = copy.copy(self._config)  # the library's own changes while it verifies
        try:
            signed = _read_predicate(content)
            hashes = self._choose_hashing(signed["serialization"])
            config.set_hashing_config(hashes)
            with tempfile.TemporaryDirectory() as copied:
                file = Path(copied, SIGNATURE_FILE.name)
                file.write_bytes(content)  # verifies what was read here, even if the file changes
                try:
                    config.verify(folder, file)
                except ValueError as error:
                    if not str(error).startswith("Signature mismatch"):  # of the files; the signature itself is valid
                        raise
                    raise _describe_difference(path, signed["resources"], hashes.hash(folder)) from error
        except ModelLoadError:
            raise
        except OSError as error:
            raise ModelLoadError(f"cannot verify {path}: {error.strerror or error}") from error
        except Exception as error:  # the library, JSON and cryptography raise many kinds
            raise _explain(path, error) from error

    def _choose_hashing(self, serialization: dict[str, Any]) -> Any:
        """Return the library's configuration for the method of a signature, in one thread: it runs beside requests."""
        method, algorithm = serialization["method"], serialization["hash_type"]
        if algorithm not in _HASHES:
            raise ValueError(f"unknown hash {algorithm}")
        config = self._hashing.Config()
        if method == "files":
            return config.use_file_serialization(hashing_algorithm=algorithm, max_workers=1)
        if method == "shards":
            size = int(serialization["shard_size"])
            return config.use_shard_serialization(hashing_algorithm=algorithm, shard_size=size, max_workers=1)
        raise ValueError(f"unknown method {method}")


def _read_predicate(signature: bytes) -> dict[str, Any]:
    """Return what a signature says: "resources", the files with their hashes, and "serialization", how these are made.

    The library verifies it afterwards.

    Raises:
        ModelLoadError: it leaves out files that a model may read.
    """
    payload = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
    predicate: dict[str, Any] = payload["predicate"]
    if left_out := {str(Path(name)) for name in predicate["serialization"].get("ignore_paths", ())} - UNSIGNED:
        raise ModelLoadError(
            f"{SIGNATURE_FILE} leaves out {', '.join(sorted(left_out)[:5])}; sign the version with all its files",
            code="FAILED_PRECONDITION",
        )
    return predicate


def _describe_difference(path: Path, resources: list[dict[str, str]], found: Any) -> ModelLoadError:
    """Return the error for a version with other files than those that were signed."""
    expected = {resource["name"]: resource["digest"] for resource in resources}
    actual = {str(item.identifier): item.digest.digest_hex for item in found.resource_descriptors()}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - actual.keys())]
    problems += [f"{name} was added" for name in sorted(actual.keys() - expected.keys())]
    problems += [
        f"{name} has been altered" for name in sorted(expected) if actual.get(name, "") not in ("", expected[name])
    ]
    shown = "; ".join(problems[:_SHOWN_AT_MOST]) or "its files are changing"
    more = f"; and {len(problems) - _SHOWN_AT_MOST} more" if len(problems) > _SHOWN_AT_MOST else ""
    return ModelLoadError(
        f"{path} is not what was signed: {shown}{more}. Copy it again, or sign it again if the change is intended",
        code="DATA_LOSS",
    )


def _explain(path: Path, error: Exception) -> ModelLoadError:
    text = str(error)
    if text.startswith("Key mismatch") or type(error).__name__ == "InvalidSignature":
        problem = f"{path / SIGNATURE_FILE} was not made with the private key of --verify-key, or was altered"
        return ModelLoadError(f"{problem}; sign the version with the right key", code="FAILED_PRECONDITION")
    if "symlink" in text or "as file or directory" in text:
        return ModelLoadError(
            f"{path} has a symbolic link or a special file, which a signature cannot cover; copy the files themselves "
            f"({text})",
            code="FAILED_PRECONDITION",
        )
    reason = text or type(error).__name__
    return ModelLoadError(f"{path / SIGNATURE_FILE} is not a model-signing signature ({reason})", code="DATA_LOSS")

"""Signs an exported version in the OpenSSF model-signing format, with its own library and without its network services.

models/<name>/<version>/model.sig    the signature of all other files; TensorFlow Serving ignores it
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from training.errors import ExportError

SIGNATURE_FILE = "model.sig"
GRAPH_FILES = ("saved_model.pb", "saved_model.pbtxt")


def sign_version(version: Path, key: Path) -> Path:
    """Sign all files of a version; an earlier signature is replaced.

    Args:
        version: the version's folder.
        key: the PEM file of a private key of an elliptic curve: P-256, P-384 or P-521; not encrypted.

    Returns:
        The signature's file.

    Raises:
        ExportError: the library is missing, the folder is no version or has symbolic links, or the key is unreadable.
    """
    try:
        from model_signing import hashing, signing
    except ImportError as error:
        raise ExportError(
            f"signing needs the extra 'signing' ({error}); install it with: "
            "pip install 'image-classifier-serving[signing]'"
        ) from error
    version = version.resolve()
    if not any((version / name).is_file() for name in GRAPH_FILES):
        raise ExportError(f"{version} is not a version: expected a folder with saved_model.pb, models/NAME/VERSION")
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key)
    except OSError as error:
        raise ExportError(f"cannot read --key {key}: {error.strerror or error}") from error
    except Exception as error:  # cryptography raises many kinds
        raise ExportError(
            f"--key {key} is not a private key of an elliptic curve (P-256, P-384 or P-521) in PEM format, or it is "
            "encrypted; make one with: openssl ecparam -genkey -noout -name prime256v1 -out signing-key.pem"
        ) from error
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE_FILE]))
    target = version / SIGNATURE_FILE
    try:
        # Renamed when it is complete: a service may read it at once.
        with tempfile.TemporaryDirectory(dir=version.parent, prefix=".signing-") as folder:
            file = Path(folder, SIGNATURE_FILE)
            config.sign(version, file)
            file.replace(target)
    except ValueError as error:  # a symbolic link, or a special file
        raise ExportError(f"{version} cannot be signed: {error}") from error
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror or error}") from error
    return target

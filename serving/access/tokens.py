"""The token file: named bearer tokens with scopes, stored as SHA-256 hashes and reloaded when the file changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from serving.errors import StartupError

logger = logging.getLogger(__name__)

PREDICT, ADMIN = "predict", "admin"
SCOPES = (PREDICT, ADMIN)

CHECK_INTERVAL_S = 1.0  # between two checks whether the file has changed
MAX_FILE_BYTES = 1024 * 1024

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Token:
    """A token: its name for logs, its scopes, and the SHA-256 digest (32 bytes) of its text."""

    name: str
    scopes: frozenset[str]
    digest: bytes


class TokenFile:
    """The tokens of a file, one a line: `NAME SCOPE[,SCOPE] sha256:HEX`. Thread-safe.

    `find` checks once a second whether the file has changed. An invalid new file is logged, and the tokens stay.

    Raises:
        StartupError: the file is unreadable or invalid.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._checked_s = time.monotonic()
        self._version: tuple[int, ...] | None = None
        self._tokens = self._read()

    def find(self, text: bytes) -> Token | None:
        """Return the token with this text, or None; in the same time for every text of the same length."""
        if time.monotonic() - self._checked_s > CHECK_INTERVAL_S:
            self._reload()
        digest = hashlib.sha256(text).digest()
        found = None
        for token in self._tokens:  # without an early exit: the time must not tell how many tokens come before a match
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found

    def _reload(self) -> None:
        if not self._lock.acquire(blocking=False):
            return  # another thread is reading it
        try:
            self._checked_s = time.monotonic()
            if self._stat() != self._version:
                self._tokens = self._read()
                logger.info("%s has changed: %d tokens", self._path, len(self._tokens))
        except StartupError as error:
            logger.error("%s; the tokens read before stay valid", error)
        finally:
            self._lock.release()

    def _stat(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _read(self) -> tuple[Token, ...]:
        self._version = self._stat()  # before the file is read: a change meanwhile is noticed at the next check
        try:
            with self._path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise StartupError(f"cannot read the token file {self._path}: {error.strerror}") from error
        if mode & stat.S_IRWXO:
            logger.warning(
                "the token file %s is open to all users of this machine (mode %03o); restrict it with chmod 600",
                self._path,
                stat.S_IMODE(mode),
            )
        return parse_tokens(content, name=str(self._path))


def parse_tokens(content: bytes, *, name: str) -> tuple[Token, ...]:
    """Parse the content of the token file `name`. Empty lines and lines that begin with # are skipped.

    Raises:
        StartupError: a line is invalid, or there is no token. The message has the line's number, and nothing of its
            text: a token may be in the wrong place.
    """
    if len(content) > MAX_FILE_BYTES:
        raise StartupError(f"the token file {name} is larger than {MAX_FILE_BYTES:,} bytes")
    tokens: dict[bytes, Token] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        fields = line.decode("utf-8", "replace").split()
        if not fields or fields[0].startswith("#"):
            continue
        try:
            token = _parse_line(fields)
            if token.digest in tokens:
                raise ValueError("this token is in the file already")
        except ValueError as error:
            raise StartupError(f"the token file {name}, line {number}: {error}") from None
        tokens[token.digest] = token
    if not tokens:
        raise StartupError(
            f"the token file {name} has no token; add a line as the command serving.access prints it "
            "(docs/access-control.md)"
        )
    return tuple(tokens.values())


def _parse_line(fields: list[str]) -> Token:
    if len(fields) != 3:
        raise ValueError(f"expected NAME SCOPE[,SCOPE] sha256:HASH, separated by spaces; got {len(fields)} fields")
    name, scopes, text = fields
    if not _NAME.fullmatch(name):
        raise ValueError("expected a name of up to 64 letters, digits and . _ - in the first field")
    if not {*scopes.split(",")} <= {*SCOPES}:
        raise ValueError(f"expected scopes in the second field: {' or '.join(SCOPES)}, or both separated by a comma")
    if not (match := _HASH.fullmatch(text)):
        raise ValueError("expected sha256: and the 64 hexadecimal digits of the token's hash in the third field")
    digest = bytes.fromhex(match[1])
    if digest == hashlib.sha256(b"").digest():  # a caller without a token would match it
        raise ValueError("this is the hash of an empty token")
    return Token(name, frozenset(scopes.split(",")), digest)

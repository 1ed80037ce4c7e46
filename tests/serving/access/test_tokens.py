"""The token file: its format, its reload, and comparisons that do not tell how close a guess is."""

from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from serving.access import tokens
from serving.access.__main__ import main
from serving.access.tokens import ADMIN, PREDICT, TokenFile, parse_tokens
from serving.errors import StartupError

SECRET = "kq5-a-token-nobody-may-see"


def hash_of(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def always_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CHECK_INTERVAL_S", -1.0)


def test_a_file_of_tokens() -> None:
    upper = hash_of("two").upper().replace("SHA", "sha")
    text = f"# for the web shop\nshop predict {hash_of('one')}\r\n\n  ci\tadmin,predict {upper}"
    shop, ci = parse_tokens(text.encode(), name="tokens")
    assert (shop.name, shop.scopes, shop.digest) == ("shop", frozenset({PREDICT}), hashlib.sha256(b"one").digest())
    assert (ci.name, ci.scopes, ci.digest) == ("ci", frozenset({PREDICT, ADMIN}), hashlib.sha256(b"two").digest())


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (SECRET, "expected NAME SCOPE[,SCOPE] sha256:HASH, separated by spaces; got 1 fields"),
        (f"shop predict {SECRET}", "expected sha256: and the 64 hexadecimal digits"),
        (f"shop {SECRET} predict", "expected scopes in the second field: predict or admin"),
        (f"shop predict, {hash_of(SECRET)}", "expected scopes in the second field"),
        (f"/{SECRET} predict {hash_of('x')}", "expected a name of up to 64 letters"),
        (f"shop predict {hash_of('one')}", "this token is in the file already"),
        (f"shop predict {hash_of('')}", "this is the hash of an empty token"),
        (
            f"shop predict {hash_of(SECRET)} x",
            "expected NAME SCOPE[,SCOPE] sha256:HASH, separated by spaces; got 4 fields",
        ),
    ],
)
def test_an_error_has_the_line_and_nothing_of_its_text(line: str, problem: str) -> None:
    content = f"first predict {hash_of('one')}\n\n{line}\n"
    with pytest.raises(StartupError) as refused:
        parse_tokens(content.encode(), name="tokens")
    assert f"the token file tokens, line 3: {problem}" in str(refused.value)
    assert SECRET not in str(refused.value)


def test_a_file_without_tokens_is_an_error(tmp_path: Path) -> None:
    for content in ("", "# none\n"):
        with pytest.raises(StartupError, match="has no token; add a line"):
            TokenFile(write(tmp_path / "tokens", content))
    with pytest.raises(StartupError, match=r"cannot read the token file .*: No such file"):
        TokenFile(tmp_path / "missing")
    with pytest.raises(StartupError, match="is larger than 1,048,576 bytes"):
        parse_tokens(b"#" * (tokens.MAX_FILE_BYTES + 1), name="tokens")


def test_every_guess_is_compared_with_every_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"t{number}" for number in range(20)]
    file = TokenFile(write(tmp_path / "tokens", *(f"{name} predict {hash_of(name)}" for name in names)))
    compared: list[tuple[bytes, bytes]] = []

    def compare(stored: bytes, digest: bytes) -> bool:
        compared.append((stored, digest))
        return hmac.compare_digest(stored, digest)

    monkeypatch.setattr(tokens, "hmac", SimpleNamespace(compare_digest=compare))
    stored = [hashlib.sha256(name.encode()).digest() for name in names]
    for guess in ("t0", "t10", "t19", "wrong", "t1", "t", ""):
        compared.clear()
        found = file.find(guess.encode())
        assert (found.name if found else None) == (guess if guess in names else None)
        # The same comparisons, in the same order, of texts of the same length: right at any place, wrong or missing.
        assert compared == [(each, hashlib.sha256(guess.encode()).digest()) for each in stored]


@pytest.mark.usefixtures("always_checked")
def test_a_changed_file_is_reloaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "tokens", f"shop predict {hash_of('one')}")
    file = TokenFile(path)
    with caplog.at_level(logging.INFO):
        write(path, f"shop admin {hash_of('two')}")
        assert file.find(b"one") is None
        found = file.find(b"two")
        assert found is not None
        assert found.scopes == {ADMIN}
    assert [record.message for record in caplog.records] == [f"{path} has changed: 1 tokens"]


@pytest.mark.usefixtures("always_checked")
def test_an_invalid_new_file_keeps_the_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "tokens", f"shop predict {hash_of('one')}")
    file = TokenFile(path)
    write(path, f"shop predict {SECRET}")
    assert file.find(b"one")
    assert file.find(b"one")
    (record,) = caplog.records  # once for each change, not at each check
    assert "line 1: expected sha256:" in record.message
    assert record.message.endswith("the tokens read before stay valid")
    assert SECRET not in caplog.text
    path.unlink()
    assert file.find(b"one")
    assert "cannot read the token file" in caplog.records[1].message
    # Replaced by renaming, as editors and Kubernetes do it.
    write(tmp_path / "new", f"shop predict {hash_of('two')}").replace(path)
    assert file.find(b"two")
    assert file.find(b"one") is None


def test_the_file_is_not_checked_for_each_request(tmp_path: Path) -> None:
    path = write(tmp_path / "tokens", f"shop predict {hash_of('one')}")
    file = TokenFile(path)
    write(path, f"shop predict {hash_of('two')}")
    assert file.find(b"one")  # within CHECK_INTERVAL_S


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o640, False), (0o644, True), (0o606, True)])
def test_a_file_open_to_all_is_warned_about(
    tmp_path: Path, mode: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "tokens", f"shop predict {hash_of('one')}")
    path.chmod(mode)
    TokenFile(path)
    assert [f"(mode {mode:03o}); restrict it with chmod 600" in record.message for record in caplog.records] == (
        [True] if warns else []
    )


def test_the_command_makes_a_line_and_a_token() -> None:
    result = CliRunner().invoke(main, ["shop", "--scope", "predict", "--scope", "admin"])
    (token,) = parse_tokens(result.stdout.encode(), name="tokens")
    assert (token.name, token.scopes) == ("shop", frozenset({PREDICT, ADMIN}))
    assert token.digest == hashlib.sha256(result.stderr.strip().encode()).digest()
    assert len(result.stderr.strip()) >= 43  # 32 random bytes
    other = CliRunner().invoke(main, ["shop", "--scope", "predict"])
    assert other.stderr != result.stderr
    refused = CliRunner().invoke(main, ["a b", "--scope", "predict"])
    assert refused.exit_code == 2
    assert "expected up to 64 letters" in refused.stderr

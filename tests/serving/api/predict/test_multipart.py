"""The quick way to read a form, and werkzeug's: whatever the quick one reads, werkzeug reads alike."""

from __future__ import annotations

import io

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.formparser import MultiPartParser

from serving.api.predict.multipart import read_files

names = st.text(min_size=1, max_size=12)
contents = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"\r\n", b"\r\n--", b"\r\n--x", b"--x--\r\n", b"\n--x\r\n"])
)


def read_by_werkzeug(body: bytes, boundary: str) -> list[tuple[str, bytes]]:
    _, files = MultiPartParser().parse(io.BytesIO(body), boundary.encode(), len(body))
    return [(file.filename or "", file.read()) for _, file in files.items(multi=True)]


def write_form(files: list[tuple[str, bytes]], boundary: str) -> tuple[bytes, str]:
    request = httpx.Request(
        "POST",
        "http://x",
        files=[("image", (name, content, "image/png")) for name, content in files],
        headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    return request.read(), request.headers["content-type"]


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", 'multipart/form-data;boundary="x"'])
def test_a_form_of_files_is_read(kind: str) -> None:
    files = [("a.png", b"one"), ("\u732b.png", b""), ("b b.png", b"\r\n--\r\n\0")]
    assert read_files(write_form(files, "x")[0], kind) == files


def test_curl_and_browsers_write_the_same_form() -> None:
    browser = (
        b"------WebKitFormBoundaryAb1\r\n"
        b'Content-Disposition: form-data; name="image"; filename="cat.png"\r\nContent-Type: image/png\r\n\r\n'
        b"PNG\r\n------WebKitFormBoundaryAb1--\r\n"
    )
    kind = "multipart/form-data; boundary=----WebKitFormBoundaryAb1"
    assert read_files(browser, kind) == [("cat.png", b"PNG")]
    curl = browser.replace(b"----WebKitFormBoundaryAb1", b"------------------------d74496d66958873e")
    assert read_files(curl, kind.replace("----WebKitFormBoundaryAb1", "------------------------d74496d66958873e"))


@given(st.lists(st.tuples(names, contents), min_size=1, max_size=4))
def test_what_is_read_is_what_werkzeug_reads(files: list[tuple[str, bytes]]) -> None:
    body, kind = write_form(files, "x")
    if (read := read_files(body, kind)) is not None:
        assert read == read_by_werkzeug(body, "x")


@given(st.data())
def test_damage_is_left_to_werkzeug_or_read_alike(data: st.DataObject) -> None:
    body = bytearray(write_form([("a.png", b"one"), ("b.png", b"two")], "x")[0])
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(body) - 1))
        body[position : position + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b"", b"-", b"\r\n", b'"'])
        )
    read = read_files(bytes(body), "multipart/form-data; boundary=x")
    if read is not None:
        assert read == read_by_werkzeug(bytes(body), "x")


@pytest.mark.parametrize(
    "part",
    [
        b'Content-Disposition: form-data; name="field"\r\n\r\ntext',
        b"Content-Disposition: form-data; name=\"image\"; filename*=UTF-8''a.png\r\n\r\ndata",
        b'Content-Disposition: form-data; name="image"; filename="a%22b.png"\r\n\r\ndata',
        b'Content-Disposition: form-data; name="image"; filename="a.png"\r\nX-Other: 1\r\n\r\ndata',
        b'Content-Disposition: form-data; name="image"; filename="\xff.png"\r\n\r\ndata',
    ],
)
def test_other_forms_are_left_to_werkzeug(part: bytes) -> None:
    assert read_files(b"--x\r\n" + part + b"\r\n--x--\r\n", "multipart/form-data; boundary=x") is None


@pytest.mark.parametrize("kind", ["", "multipart/form-data", "multipart/mixed; boundary=x", "image/png"])
def test_other_types_are_left_to_werkzeug(kind: str) -> None:
    assert read_files(write_form([("a", b"b")], "x")[0], kind) is None

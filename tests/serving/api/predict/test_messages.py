"""The fast path for forms reads the same files as werkzeug, or leaves the form to it."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving.api.predict.messages import parse_with_werkzeug, read_files

KIND = "multipart/form-data; boundary=x"
names = st.text(min_size=1, max_size=12)
contents = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"\r\n", b"\r\n--", b"\r\n--x", b"--x--\r\n", b"\n--x\r\n"])
)
boundaries = st.text("0aZ'()+_,./:=? -\"", min_size=1, max_size=8)


def check_against_werkzeug(body: bytes, content_type: str) -> None:
    """Assert that both parsers return the same files, if the fast path accepts the form."""
    files = read_files(body, content_type)
    if files is not None:
        images = parse_with_werkzeug(body, content_type, max_images=9)
        assert files == [(image.file, image.data) for image in images]


def write_form(files: list[tuple[str, bytes]], boundary: str) -> bytes:
    request = httpx.Request(
        "POST",
        "http://x",
        files=[("image", (name, content, "image/png")) for name, content in files],
        headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    return request.read()


@pytest.mark.parametrize("kind", [KIND, 'multipart/form-data;boundary="x"'])
def test_a_form_of_files_is_read(kind: str) -> None:
    files = [("a.png", b"one"), ("\u732b.png", b""), ("b b.png", b"\r\n--\r\n\0")]
    assert read_files(write_form(files, "x"), kind) == files


def test_forms_of_browsers_and_curl_take_the_fast_path() -> None:
    browser = (
        b"------WebKitFormBoundaryAb1\r\n"
        b'Content-Disposition: form-data; name="image"; filename="cat.png"\r\nContent-Type: image/png\r\n\r\n'
        b"PNG\r\n------WebKitFormBoundaryAb1--\r\n"
    )
    kind = "multipart/form-data; boundary=----WebKitFormBoundaryAb1"
    assert read_files(browser, kind) == [("cat.png", b"PNG")]
    curl = browser.replace(b"----WebKitFormBoundaryAb1", b"------------------------d74496d66958873e")
    assert read_files(curl, kind.replace("----WebKitFormBoundaryAb1", "------------------------d74496d66958873e"))


@given(files=st.lists(st.tuples(names, contents), min_size=1, max_size=4))
def test_both_parsers_read_the_same_files(files: list[tuple[str, bytes]]) -> None:
    check_against_werkzeug(write_form(files, "x"), KIND)


@given(data=st.data())
def test_both_parsers_read_the_same_files_of_a_damaged_form(data: st.DataObject) -> None:
    body = bytearray(write_form([("a.png", b"one"), ("b.png", b"two")], "x"))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(body) - 1))
        body[position : position + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b"", b"-", b"\r\n", b'"'])
        )
    check_against_werkzeug(bytes(body), KIND)


@given(boundary=boundaries, quoting=st.sampled_from(['{}"', '"{}', '"{}"', "{}"]))
@example(boundary=",", quoting="{}")
@example(boundary="x", quoting='"{}')
def test_both_parsers_read_the_same_boundary(boundary: str, quoting: str) -> None:
    part = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nPNG'
    for written in {boundary, boundary.strip(), boundary.strip('"')}:
        body = b"--%b\r\n%b\r\n--%b--\r\n" % (written.encode(), part, written.encode())
        check_against_werkzeug(body, "multipart/form-data; boundary=" + quoting.format(boundary))


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
    assert read_files(b"--x\r\n" + part + b"\r\n--x--\r\n", KIND) is None


@pytest.mark.parametrize("kind", ["", "multipart/form-data", "multipart/mixed; boundary=x", "image/png"])
def test_other_content_types_are_left_to_werkzeug(kind: str) -> None:
    assert read_files(write_form([("a", b"b")], "x"), kind) is None

from __future__ import annotations

import contextlib
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_formats.content import read_header
from image_formats.header import ImageHeader
from serving.errors import InvalidRequest, TooLarge
from serving.images.limits import FULL_SIZE_SCANS, Decoder, ImageLimits, check_image
from tests.serving.image_files import bmp, chunk, encode, gif, jpeg_of_scans, noise, png, segment, webp_canvas

LIMITS = ImageLimits(max_pixels=1_000_000, max_side=5_000)
PROGRESSIVE = encode(noise((96, 64)), "JPEG", progressive=True)
ALL_KINDS = [
    encode(noise((96, 64)), "JPEG", exif=b"Exif\0\0MM\0*"),
    PROGRESSIVE,
    png(20, 10, extra=chunk(b"zTXt", b"k\0\0") + chunk(b"iTXt", b"k\0\0\0\0\0text"), rows=10),
    encode(noise((96, 64)), "BMP"),
    encode(noise((96, 64)), "GIF", save_all=True, append_images=[noise((96, 64), seed=1)]),
    encode(noise((96, 64)), "WEBP", save_all=True, append_images=[noise((96, 64), seed=1)]),
    encode(noise((96, 64)), "WEBP", lossless=True),
    encode(noise((96, 64)), "WEBP", exif=b"Exif\0\0MM\0*"),
]


def header_of(data: bytes) -> ImageHeader:
    header = read_header(data)
    assert header is not None
    return header


def check(data: bytes, *, decoder: Decoder = "tensorflow", limits: ImageLimits = LIMITS) -> None:
    check_image(header_of(data), limits, decoder=decoder)


@pytest.mark.parametrize(
    ("mode", "kind", "options", "channels"),
    [
        ("RGB", "JPEG", {}, 3),
        ("L", "JPEG", {}, 1),
        ("CMYK", "JPEG", {}, 4),
        ("RGB", "JPEG", {"progressive": True}, 3),
        ("RGB", "MPO", {}, 3),
        ("RGB", "PNG", {}, 3),
        ("RGBA", "PNG", {}, 4),
        ("LA", "PNG", {}, 2),
        ("P", "PNG", {}, 1),
        ("1", "PNG", {}, 1),
        ("P", "GIF", {}, 1),
        ("RGB", "BMP", {}, 3),
        ("P", "BMP", {}, 1),
        ("RGB", "WEBP", {}, 4),
        ("RGB", "WEBP", {"lossless": True}, 4),
        ("RGBA", "WEBP", {}, 4),
        ("RGB", "WEBP", {"exif": b"Exif\0\0MM\0*"}, 4),
    ],
)
def test_the_header_of_a_real_file_is_read(mode: str, kind: str, options: dict[str, object], channels: int) -> None:
    data = encode(noise((97, 31), mode), kind, **options)
    header = header_of(data)
    assert header.format == {"MPO": "JPEG"}.get(kind, kind)
    assert (header.width, header.height, header.channels, header.sample_bytes) == (97, 31, channels, 1)
    assert (header.frames, header.file_bytes, header.problem) == (1, len(data), None)
    assert header.scans == (data.count(b"\xff\xda") if "progressive" in options else 1)
    check(data)


def test_16_bit_samples_are_detected() -> None:
    assert header_of(encode(Image.new("I;16", (5, 4)), "PNG")).sample_bytes == 2


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_the_frames_of_an_animation_are_counted(kind: str) -> None:
    frames = [noise((40, 30), seed=seed) for seed in range(7)]
    assert header_of(encode(frames[0], kind, save_all=True, append_images=frames[1:])).frames == 7


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\xff\xd8\xff", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"RIFF1234WEBP", b"BM"]
)
def test_other_files_have_no_header(data: bytes) -> None:
    assert read_header(data) is None
    assert read_header(data + bytes(100)) is None


@pytest.mark.parametrize(
    "text", [b"BMW and Benz build cars in the south of Germany.", b"GIF89a was the second version of the format."]
)
def test_a_text_that_starts_with_an_image_signature_has_no_header(text: bytes) -> None:
    assert read_header(text) is None


# JPEG file and maximum number of scans that a decoder may find, by name.
JPEG_SCANS = {
    "a hundred": (jpeg_of_scans(100), 100),
    "one more": (jpeg_of_scans(101), 101),
    "counting ends": (jpeg_of_scans(5_000), 101),
    "behind fill bytes": (jpeg_of_scans(60, between=b"\xff\xff\xff"), 60),
    "behind garbage": (jpeg_of_scans(60, between=b"\x00garbage\xff\x00"), 60),
    "behind tables and comments": (jpeg_of_scans(60, between=segment(0xC4, bytes(17)) + segment(0xFE, b"x")), 60),
    "behind restart markers": (jpeg_of_scans(60, between=b"\xff\xd0\x01\xff\x00\x02\xff\xd7"), 60),
    "behind a second start": (jpeg_of_scans(60, between=b"\xff\xd8"), 60),
    "inside a segment they are none": (
        PROGRESSIVE[:2] + segment(0xE1, jpeg_of_scans(500)) + PROGRESSIVE[2:],
        PROGRESSIVE.count(b"\xff\xda"),
    ),
    "inside a comment between scans they are none": (
        jpeg_of_scans(20, between=segment(0xFE, b"\xff\xda" * 40)),
        20,
    ),
    "behind the end they are none": (PROGRESSIVE + jpeg_of_scans(500), PROGRESSIVE.count(b"\xff\xda")),
    "behind a stream of tables": (b"\xff\xd8" + segment(0xDB, bytes(65)) + b"\xff\xd9" + jpeg_of_scans(60), 60),
    "without an end": (jpeg_of_scans(60)[:-2], 60),
    "arithmetic coding": (jpeg_of_scans(300).replace(b"\xff\xc2", b"\xff\xca", 1), 101),
    "sequential": (jpeg_of_scans(300).replace(b"\xff\xc2", b"\xff\xc1", 1), 101),
}


@pytest.mark.parametrize("name", JPEG_SCANS)
def test_scans_are_counted_like_in_libjpeg(name: str) -> None:
    data, scans = JPEG_SCANS[name]
    header = header_of(data)
    assert header.scans == scans
    assert (header.width, header.height) in ((64, 64), (96, 64))  # not the size of an embedded or trailing image
    if scans > 100:
        with pytest.raises(InvalidRequest, match="more than 100 scans"):
            check(data)
    else:
        check(data)


def test_scans_are_limited_by_the_number_of_pixels() -> None:
    check(jpeg_of_scans(FULL_SIZE_SCANS, size=(1_000, 1_000)))
    with pytest.raises(InvalidRequest, match="21 scans; with 1000 x 1000 pixels it may have at most 20"):
        check(jpeg_of_scans(FULL_SIZE_SCANS + 1, size=(1_000, 1_000)))


def test_only_several_scans_need_memory_for_coefficients() -> None:
    assert header_of(encode(noise((96, 64)), "JPEG")).coefficient_bytes == 0
    # Chroma at half the resolution: every 16 x 16 pixels have 4 luma and 2 chroma blocks.
    assert header_of(PROGRESSIVE).coefficient_bytes == 6 * 4 * 6 * 128
    full = encode(noise((96, 64)), "JPEG", progressive=True, subsampling=0)
    assert header_of(full).coefficient_bytes == 96 * 64 * 3 * 2


def test_the_largest_frame_of_a_jpeg_is_used() -> None:
    frame = segment(0xC2, struct.pack(">BHHB", 8, 9_000, 9_000, 1) + b"\x01\x11\x00")
    start = PROGRESSIVE.index(b"\xff\xda")
    for place in (2, start):
        data = PROGRESSIVE[:place] + frame + PROGRESSIVE[place:]
        assert (header_of(data).width, header_of(data).height) == (9_000, 9_000)
    # A thumbnail is inside a segment.
    data = PROGRESSIVE[:2] + segment(0xE1, frame) + PROGRESSIVE[2:]
    assert (header_of(data).width, header_of(data).height) == (96, 64)


GIANTS = {
    "png": png(60_000, 60_000),
    "png of the most": png(2**31 - 1, 2**31 - 1),
    "png behind an unknown chunk": png(1, 1)[:8] + chunk(b"abCd", b"") + png(60_000, 60_000)[8:],
    "jpeg": jpeg_of_scans(12, size=(65_500, 65_500)),
    "gif": gif((65_535, 65_535), 1),
    "gif with a frame beyond its canvas": gif((10, 10), 1, frame_size=(65_535, 65_535)),
    "gif of another version": gif((65_535, 65_535), 1).replace(b"GIF89a", b"GIF88x"),
    "bmp": bmp(40_000, 40_000),
    "bmp from the top": bmp(40_000, -40_000),
    "webp": webp_canvas(16_000, 16_000),
    "webp of the most": webp_canvas(1 << 24, 1 << 24),
}


@pytest.mark.parametrize("decoder", ["pillow", "tensorflow"])
@pytest.mark.parametrize("name", GIANTS)
def test_oversized_images_are_refused(name: str, decoder: Decoder) -> None:
    with pytest.raises(TooLarge, match="at most 1,000,000 in all"):
        check(GIANTS[name], decoder=decoder)


@pytest.mark.parametrize(
    "data",
    [
        png(1, 5_001),
        png(5_001, 1),
        jpeg_of_scans(12, size=(1, 5_001)),
        gif((5_001, 1), 1),
        bmp(1, 5_001),
        webp_canvas(5_001, 1),
    ],
)
def test_the_length_of_a_side_is_limited(data: bytes) -> None:
    with pytest.raises(TooLarge, match=r"5001.*a side may have at most 5,000"):
        check(data)


def test_images_at_the_limits_are_accepted() -> None:
    for width, height in ((1_000, 1_000), (5_000, 200), (1, 5_000)):
        check(png(width, height))


def test_the_size_of_an_avif_is_at_least_that_of_its_stream() -> None:
    data = encode(noise((1_200, 1_000)), "AVIF", speed=10)
    place = data.index(b"ispe") + 8
    data = data[:place] + struct.pack(">II", 7, 5) + data[place + 8 :]
    with pytest.raises(TooLarge, match="1200 x 1000"):
        check(data, decoder="pillow")


def test_a_truncated_frame_header_is_ignored() -> None:
    place = PROGRESSIVE.index(b"\xff\xc2") + 2
    assert read_header(PROGRESSIVE[:place] + b"\0\3" + PROGRESSIVE[place + 2 :]) is None


@pytest.mark.parametrize("data", [png(0, 5), gif((0, 0), 1, frame_size=(0, 0)), jpeg_of_scans(12, size=(64, 0))])
def test_an_image_without_pixels_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="nothing to decode"):
        check(data)


@pytest.mark.parametrize("data", [gif((1_000, 100), 11), webp_canvas(1_000, 100, frames=11)])
def test_all_frames_count_for_tensorflow_and_one_for_pillow(data: bytes) -> None:
    check(data, decoder="pillow")
    with pytest.raises(TooLarge, match="11 frames of 1000 x 100"):
        check(data, decoder="tensorflow")


def test_the_number_of_frames_is_limited() -> None:
    with pytest.raises(TooLarge, match=r"20,000 frames"):
        check(gif((1, 1), 20_000))


def test_metadata_counts_only_for_tensorflow() -> None:
    data = png(8, 8, extra=chunk(b"zTXt", b"k\0\0" + bytes(8_000)) * 5, rows=8)
    check(data, decoder="pillow")
    with pytest.raises(TooLarge, match="compressed text"):
        check(data, decoder="tensorflow")
    check(png(8, 8, extra=chunk(b"iTXt", b"k\0\0\0\0\0" + b"x" * 500_000), rows=8))


BLOCK = b"!\xfe" + b"\x01x" * 11_000 + b"\0"
PARTS = {
    "jpeg of segments": PROGRESSIVE[:2] + segment(0xFE) * 10_001 + PROGRESSIVE[2:],
    "jpeg of tables": PROGRESSIVE[:2] + segment(0xDB, bytes(65_000)) * 5 + PROGRESSIVE[2:],
    "png of chunks": png(8, 8, extra=chunk(b"abCd", b"") * 100_001),
    "png with its header behind chunks": png(8, 8)[:8] + chunk(b"abCd", b"") * 100_001 + png(8, 8)[8:],
    "gif of comments": gif((8, 8), 1)[:19] + BLOCK + gif((8, 8), 1)[19:],
    "webp of chunks": webp_canvas(8, 8, frames=1) + struct.pack("<4sI", b"abcd", 0) * 100_001,
    "bmp of runs": bmp(8, 8)[:30] + b"\1\0\0\0" + bytes(1 << 20),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_file_with_too_many_parts_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"more than|more tables|too many blocks|at most"):
        check(PARTS[name], decoder="pillow")


@settings(max_examples=300, deadline=None)
@given(
    prefix=st.sampled_from([b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP", b""]),
    data=st.binary(max_size=400),
)
def test_any_bytes_are_read_without_an_error(prefix: bytes, data: bytes) -> None:
    header = read_header(prefix + data)
    if header is not None:
        assert header.width >= 0
        assert header.height >= 0
        assert 1 <= header.scans <= 101


@settings(max_examples=300, deadline=None)
@given(
    whole=st.sampled_from(ALL_KINDS),
    changes=st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=6)), max_size=5),
    kept=st.floats(0, 1),
)
def test_damaged_files_are_read_without_an_error(whole: bytes, changes: list[tuple[int, bytes]], kept: float) -> None:
    for place, content in changes:
        whole = whole[:place] + content + whole[place + len(content) :]
    header = read_header(whole[: round(len(whole) * kept)])
    if header is not None:
        with contextlib.suppress(InvalidRequest, TooLarge):
            check_image(header, LIMITS, decoder="tensorflow")


@pytest.mark.slow  # measures, and takes longer where coverage is measured
@pytest.mark.parametrize(
    "data",
    [
        PROGRESSIVE[:-2] + b"\xff" * 8_000_000,
        PROGRESSIVE[:-2] + b"\xff\x00" * 4_000_000,
        PROGRESSIVE[:-2] + b"\xff\xd0" * 4_000_000,
        b"\xff\xd8\xff" + b"\xfe\x00\x02\xff" * 2_000_000,
        png(8, 8, extra=chunk(b"abCd", b"") * 600_000),
        gif((8, 8), 1)[:-1] + BLOCK * 300,
        gif((1, 1), 500_000),
        webp_canvas(8, 8, frames=150_000),
    ],
    ids=["fill bytes", "stuffed bytes", "restarts", "comments", "chunks", "blocks", "gif frames", "webp frames"],
)
def test_headers_with_many_parts_are_read_quickly(data: bytes) -> None:
    started_s = time.thread_time()  # of this thread, whatever else runs
    read_header(data)
    assert time.thread_time() - started_s < 2

"""Compares the estimates with the peak memory of processes that decode."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from image_formats.content import read_header
from image_formats.header import ImageHeader
from serving.images.limits import decode_cost, is_quick
from tests.serving.conftest import PROJECT
from tests.serving.image_files import bmp, chunk, encode, gif, jpeg_of_scans, noise, png

pytestmark = pytest.mark.slow

SIZE = (4_000, 3_000)  # 12 megapixels
FRAMES = [noise((500, 400), seed=seed) for seed in range(60)]
TURNED = Image.Exif()
TURNED[0x0112] = 6

# Decodes each file in its own child process, and prints the increase of the peak resident set size.
MEASURE = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

def peak(decode, small, file):
    decode(small)  # allocates what is kept between calls
    data = open(file, "rb").read()
    open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM
    before = status("VmRSS")
    decode(data)
    return status("VmHWM") - before

decode = make_decode()
for file in sys.argv[2:]:
    if os.fork() == 0:
        print(peak(decode, open(sys.argv[1], "rb").read(), file), flush=True)
        os._exit(0)
    if os.wait()[1] != 0:
        sys.exit(file + " was not decoded")
"""
WITH_PILLOW = """
from serving.images.limits import ImageLimits
from serving.images.decoding import _decode, check_file

def make_decode():
    limits = ImageLimits(10**8, 10**7)
    return lambda data: _decode(data, check_file(data, limits), (224, 224))
"""
# Like models that convert to float32 before resizing, which need the most memory.
WITH_TENSORFLOW = """
def make_decode():
    import tensorflow as tf
    session = None

    def decode(data):
        nonlocal session
        if session is None:
            file = tf.compat.v1.placeholder(tf.string)
            with tf.compat.v1.get_default_graph().as_default():
                image = tf.cond(
                    tf.equal(tf.strings.substr(file, 0, 3), b"GIF"),
                    lambda: tf.io.decode_gif(file),
                    lambda: tf.io.decode_image(file, channels=3, expand_animations=False)[None],
                )
                image = tf.image.convert_image_dtype(tf.ensure_shape(image, (None, None, None, 3)), tf.float32)
                resized = tf.image.resize(image, (224, 224), antialias=True)
            config = tf.compat.v1.ConfigProto(
                intra_op_parallelism_threads=1, inter_op_parallelism_threads=-1, use_per_session_threads=True
            )
            session = (tf.compat.v1.Session(config=config), file, resized)
        session[0].run(session[2], {session[1]: data})

    tf.compat.v1.disable_eager_execution()
    return decode
"""
# Like the exported models.
WITH_THE_EXPORTED_GRAPH = """
def make_decode():
    import tensorflow as tf
    from training.exporter.image_decoding import decode_images
    function = tf.function(lambda files: decode_images(files, height=224, width=224))
    tf.config.threading.set_intra_op_parallelism_threads(1)
    return lambda data: function(tf.constant([data]))
"""

PILLOW_FILES = {
    "jpeg": lambda: encode(noise(SIZE), "JPEG"),
    "jpeg turned": lambda: encode(noise(SIZE), "JPEG", exif=TURNED),
    "jpeg progressive": lambda: encode(noise(SIZE), "JPEG", progressive=True, subsampling=0),
    "jpeg cmyk": lambda: encode(noise(SIZE, "CMYK"), "JPEG"),
    "jpeg cmyk progressive": lambda: encode(noise(SIZE, "CMYK"), "JPEG", progressive=True),
    "jpeg grey": lambda: encode(noise(SIZE, "L"), "JPEG"),
    "png": lambda: png(*SIZE, rows=SIZE[1]),
    "png of 50 megapixels": lambda: png(8_000, 6_250, rows=6_250),
    "png palette": lambda: encode(noise(SIZE).quantize(16), "PNG", compress_level=1),
    "png alpha": lambda: encode(noise(SIZE, "RGBA"), "PNG", compress_level=1),
    "png 16-bit": lambda: encode(Image.new("I;16", SIZE), "PNG", compress_level=1),
    "png tall": lambda: png(1, 2_000_000, rows=2_000_000),
    "png wide": lambda: png(2_000_000, 1, rows=1),
    "gif": lambda: encode(noise(SIZE, "L"), "GIF"),
    "bmp": lambda: encode(noise(SIZE), "BMP"),
    "webp": lambda: encode(noise(SIZE), "WEBP", method=0),
    "png with a transparent colour": lambda: encode(noise(SIZE), "PNG", compress_level=1, transparency=(1, 2, 3)),
    "avif": lambda: encode(noise(SIZE), "AVIF", speed=10),
    "avif alpha": lambda: encode(noise(SIZE, "RGBA"), "AVIF", speed=10),
    "webp alpha": lambda: encode(noise(SIZE, "RGBA"), "WEBP", method=0),
}
TENSORFLOW_FILES = {
    "jpeg": lambda: encode(noise(SIZE), "JPEG"),
    "jpeg cmyk progressive": lambda: encode(noise(SIZE, "CMYK"), "JPEG", progressive=True),
    "png": lambda: png(*SIZE, rows=SIZE[1]),
    "gif animated": lambda: encode(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
}


def header_of(data: bytes) -> ImageHeader:
    header = read_header(data)
    assert header is not None
    return header


def measure(script: str, files: dict[str, bytes], folder: Path) -> dict[str, int]:
    (folder / "small").write_bytes(encode(Image.new("RGB", (40, 40)), "PNG"))
    paths = []
    for name, data in files.items():
        paths.append(folder / name)
        paths[-1].write_bytes(data)
    ran = subprocess.run(
        [sys.executable, "-c", script + MEASURE, folder / "small", *paths],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return dict(zip(files, map(int, ran.stdout.split()), strict=True))


def test_the_estimate_for_pillow_is_a_tight_upper_bound(tmp_path: Path) -> None:
    files = {name: make() for name, make in PILLOW_FILES.items()}
    for name, peak in measure(WITH_PILLOW, files, tmp_path).items():
        cost = decode_cost(header_of(files[name]), decoder="pillow", size=(224, 224))
        assert peak <= cost <= 2.2 * peak, (name, peak, cost)


def test_the_estimate_for_tensorflow_is_a_tight_upper_bound(tmp_path: Path) -> None:
    files = {name: make() for name, make in TENSORFLOW_FILES.items()}
    for name, peak in measure(WITH_TENSORFLOW, files, tmp_path).items():
        cost = decode_cost(header_of(files[name]), decoder="tensorflow", size=(224, 224))
        assert peak <= cost <= 2.2 * peak, (name, peak, cost)


def test_the_exported_graph_stays_below_the_estimate(tmp_path: Path) -> None:
    files = {"jpeg turned": encode(noise(SIZE), "JPEG", exif=TURNED, progressive=True)}
    (peak,) = measure(WITH_THE_EXPORTED_GRAPH, files, tmp_path).values()
    assert peak <= decode_cost(header_of(files["jpeg turned"]), decoder="tensorflow", size=(224, 224))


@pytest.mark.parametrize(
    "slow",
    [
        png(8_000, 6_250),
        png(1, 30_000),
        png(30_000, 1),
        jpeg_of_scans(100, size=(512, 512)),
        png(8, 8, extra=chunk(b"zTXt", b"k\0\0" + bytes(2_000))),
        png(8, 8, extra=chunk(b"abCd", b"") * 50_000),
        gif((100, 100), 1_000),
        bmp(64, 64)[:30] + b"\1\0\0\0" + bytes(100_000),
        encode(noise((1_024, 768)), "JPEG"),
    ],
)
def test_a_slow_image_is_not_quick(slow: bytes) -> None:
    assert not is_quick(header_of(slow))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_a_small_image_is_quick(kind: str) -> None:
    assert is_quick(header_of(encode(noise((224, 224)), kind)))
    assert is_quick(header_of(encode(noise((32, 32)), kind)))

"""Request bodies that are expensive for a server and cheap to make: image files, JSON documents, gRPC messages.

The models they are for take images of 32x32 pixels.
"""

from __future__ import annotations

import base64
import gzip
import io
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from PIL import ExifTags, Image

from client.protos import prediction_pb2

SIDE = 32
_GREY, _RGB, _RGBA = 0, 2, 6  # the colour types of PNG
_SAMPLES = {_GREY: 1, _RGB: 3, _RGBA: 4}
_STRING, _UINT8 = 7, 4  # types.proto

# What a JSON document repeats a million times: each is parsed into other objects.
JSON_ELEMENTS = {
    "lists": b"[],",
    "objects": b"{},",
    "strings": b'"",',
    "members": b'{"a":0},',
    "numbers": b"0,",
    "floats": b"1e9,",
    "escapes": b'"\\u0041",',
    "nested": b"[[[[]]]],",
    "mixed": b'[],{"a":[0.5,"b"]},"c",null,',
}


@cache
def make_png(width: int, height: int, *, colour: int = _RGB, bits: int = 8) -> bytes:
    """Make a black PNG file of any size, compressed about a thousandfold."""
    row = bytes(1 + width * _SAMPLES[colour] * bits // 8)
    compressor = zlib.compressobj(9)
    rows_at_once = max(1, 2**22 // len(row))
    block = row * rows_at_once
    pixels = [compressor.compress(block) for _ in range(height // rows_at_once)]
    pixels += [compressor.compress(row * (height % rows_at_once)), compressor.flush()]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b"".join(pixels)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def make_tall_png() -> bytes:
    """194 KB, one pixel wide and 50,000,000 high."""
    return make_png(1, 50_000_000)


def make_giant_png() -> bytes:
    """389 KB, 50 megapixels of four samples of 16 bits: 400 MB when inflated."""
    return make_png(10_000, 5_000, colour=_RGBA, bits=16)


def make_slow_png() -> bytes:
    """About 200 KB that take more than half a second to decode."""
    return make_png(7_000, 7_100, colour=_RGBA)


@cache
def make_photo(width: int, height: int) -> bytes:
    """Make a JPEG file as a telephone does: fine detail everywhere, and turned by its EXIF orientation."""
    rng = np.random.default_rng(width)
    tile = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
    tile = np.asarray(Image.fromarray(tile).resize((1024, 768), Image.Resampling.BICUBIC))
    image = Image.fromarray(np.tile(tile, (-(-height // 768), -(-width // 1024), 1))[:height, :width])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80, exif=exif)
    return file.getvalue()


def make_photos() -> list[bytes]:
    """Sixteen photos of 12 to 50 megapixels."""
    sizes = ((4_000, 3_000), (6_000, 4_000), (8_000, 6_000), (8_160, 6_120))
    return [make_photo(*sizes[number % 4]) for number in range(16)]


@cache
def make_scan_bomb(side: int = 4_000, scans: int = 400) -> bytes:
    """Make a progressive JPEG file of a few hundred KB whose last scan is repeated: each goes over all pixels."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), "grey").save(file, "JPEG", progressive=True, quality=50)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")  # start of scan; without tables of its own before it
    return data[:-2] + data[last:-2] * scans + data[-2:]


@cache
def make_small_image(kind: str = "PNG", colour: str = "red", side: int = SIDE) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, kind)
    return file.getvalue()


@cache
def make_pixels(rows: int, *, seed: int = 0) -> bytes:
    """Make the raw pixels of so many images of the model's size."""
    return random.Random(seed).randbytes(rows * SIDE * SIDE * 3)


@cache
def make_nested_pixels(rows: int) -> bytes:
    """Make the JSON lists of so many images of the model's size."""
    image = b"[" + b",".join([b"[" + b",".join([b"[100,101,102]"] * SIDE) + b"]"] * SIDE) + b"]"
    return b"[" + b",".join([image] * rows) + b"]"


def make_v1_json(instances: bytes, *, signature: str = "serving_default") -> bytes:
    """Make the document of TensorFlow Serving's REST API."""
    return b'{"signature_name":"%s","instances":%s}' % (signature.encode(), instances)


def make_v2_json(data: bytes, shape: Sequence[int], *, name: str = "images", datatype: str = "UINT8") -> bytes:
    """Make the document of the Open Inference Protocol."""
    sizes = ",".join(map(str, shape)).encode()
    head = b'{"inputs":[{"name":"%s","datatype":"%s","shape":[%s],"data":' % (name.encode(), datatype.encode(), sizes)
    return head + data + b"}]}"


def make_b64_json(files: Sequence[bytes]) -> bytes:
    """Make the document with encoded files for the signature image_bytes."""
    items = [b'{"b64":"' + base64.b64encode(file) + b'"}' for file in files]
    return make_v1_json(b"[" + b",".join(items) + b"]", signature="image_bytes")


def repeat_element(element: bytes, total_bytes: int) -> bytes:
    """Make a JSON list of about so many bytes that repeats an element, written with the comma behind it."""
    return b"[" + element * (total_bytes // len(element)) + element.rstrip(b",") + b"]"


def nest_deeply(levels: int) -> bytes:
    """Make so many lists in each other."""
    return b"[" * levels + b"]" * levels


@cache
def compress(body: bytes, encoding: str = "gzip") -> bytes:
    return gzip.compress(body, 9) if encoding == "gzip" else zlib.compress(body, 9)


def compress_repeated(
    element: bytes, total_bytes: int, *, make_document: Callable[[bytes], bytes], encoding: str = "gzip"
) -> bytes:
    """Compress the document of `repeat_element`, in parts: as a whole it takes longer to make than to compress."""
    head, _, tail = make_document(b"[#]").partition(b"#")
    count, at_once = total_bytes // len(element), 2**20 // len(element)
    compressor = zlib.compressobj(9, wbits=31 if encoding == "gzip" else 15)
    part = element * at_once
    parts = [head, *[part] * (count // at_once), element * (count % at_once), element.rstrip(b",") + tail]
    return b"".join([*map(compressor.compress, parts), compressor.flush()])


def make_form(files: Sequence[bytes], *, kind: str = "image/png") -> tuple[dict[str, str], bytes]:
    """Make a multipart form; returns its headers and its body."""
    head = b'--next\r\nContent-Disposition: form-data; name="image"; filename="%d"\r\nContent-Type: %s\r\n\r\n'
    parts = [head % (number, kind.encode()) + file + b"\r\n" for number, file in enumerate(files)]
    return {"Content-Type": "multipart/form-data; boundary=next"}, b"".join(parts) + b"--next--\r\n"


def make_message(
    model: str, tensor: prediction_pb2.Tensor, *, input_name: str = "images", signature: str = "serving_default"
) -> bytes:
    """Make a PredictRequest."""
    spec = prediction_pb2.ModelSpec(name=model, signature_name=signature)
    request = prediction_pb2.PredictRequest(model_spec=spec, inputs={input_name: tensor})
    return bytes(request.SerializeToString())


@cache
def make_pixel_message(model: str, rows: int) -> bytes:
    tensor = prediction_pb2.Tensor(dtype=_UINT8, tensor_content=make_pixels(rows))
    for size in (rows, SIDE, SIDE, 3):
        tensor.tensor_shape.dim.add(size=size)
    return make_message(model, tensor)


def make_zeros_message(model: str, rows: int) -> bytes:
    """Make a PredictRequest of black images, which compresses a thousandfold."""
    tensor = prediction_pb2.Tensor(dtype=_UINT8, tensor_content=bytes(rows * SIDE * SIDE * 3))
    for size in (rows, SIDE, SIDE, 3):
        tensor.tensor_shape.dim.add(size=size)
    return make_message(model, tensor)


def make_files_message(model: str, files: Sequence[bytes]) -> bytes:
    tensor = prediction_pb2.Tensor(dtype=_STRING, string_val=files)
    tensor.tensor_shape.dim.add(size=len(files))
    return make_message(model, tensor, input_name="image_bytes", signature="image_bytes")

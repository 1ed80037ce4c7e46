"""The attacks by name. `CALLS` are calls sent at once; the others hold connections in ways that no client should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

from benchmarks import payloads
from benchmarks.hostile import Call, GrpcCall, HttpCall, Outcome, Server, send_at_once
from benchmarks.rude_clients import RUDE_CLIENTS

JSON = {"Content-Type": "application/json"}
GZIP = {**JSON, "Content-Encoding": "gzip"}
DEFLATE = {**JSON, "Content-Encoding": "deflate"}
PNG = {"Content-Type": "image/png"}
JPEG = {"Content-Type": "image/jpeg"}
REFUSED = frozenset({"400", "413", "503", "504"})
REFUSED_GRPC = frozenset({"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"})
SERVED_OR_LATE = frozenset({"200", "503", "504"})
# The clients give way to all others, and beside other attacks may send more slowly than the server allows: 408.
SERVED_OR_REFUSED = SERVED_OR_LATE | {"408", "413"}
INFLATED_BYTES = 94_000_000  # of 91 KB


def _v1(server: Server) -> str:
    return f"/v1/models/{server.model}:predict"


def _v2(server: Server) -> str:
    return f"/v2/models/{server.model}/infer"


def _upload(server: Server) -> str:
    return f"/predict?model={server.model}"


def gzip_for_no_model(server: Server) -> list[Call]:  # noqa: ARG001
    body = payloads.compress_repeated(b"[],", 60_000_000, make_document=payloads.make_v1_json)
    expected = frozenset({"400", "404", "413", "503", "504"})
    return [HttpCall("/v1/models/nope:predict", body, GZIP, expected=expected)]


def gzip_json(server: Server) -> list[Call]:
    expected = frozenset({"400", "413", "503", "504"})
    bodies = [
        payloads.compress_repeated(element, INFLATED_BYTES, make_document=payloads.make_v1_json)
        for element in payloads.JSON_ELEMENTS.values()
    ]
    bodies.append(payloads.compress(payloads.make_v1_json(payloads.nest_deeply(INFLATED_BYTES // 2))))
    return [HttpCall(_v1(server), body, GZIP, expected=expected) for body in bodies]


def v2_compressed_json(server: Server) -> list[Call]:
    expected = frozenset({"400", "413", "503", "504"})
    calls: list[Call] = []
    for number, element in enumerate(payloads.JSON_ELEMENTS.values()):
        encoding, headers = (("gzip", GZIP), ("deflate", DEFLATE))[number % 2]
        body = payloads.compress_repeated(
            element,
            INFLATED_BYTES,
            make_document=partial(payloads.make_v2_json, shape=(10_000_000, 32, 32, 3)),
            encoding=encoding,
        )
        calls.append(HttpCall(_v2(server), body, headers, expected=expected))
    return calls


def tall_png(server: Server) -> list[Call]:
    image = payloads.make_tall_png()
    return [
        HttpCall(_upload(server), image, PNG, expected=REFUSED),
        HttpCall(_v1(server), payloads.make_b64_json([image]), JSON, expected=REFUSED),
        GrpcCall(payloads.make_files_message(server.model, [image]), expected=REFUSED_GRPC),
    ]


def giant_pngs(server: Server) -> list[Call]:
    images = [payloads.make_giant_png()] * 5
    headers, form = payloads.make_form(images)
    return [
        HttpCall(_upload(server), form, headers),
        HttpCall(_v1(server), payloads.make_b64_json(images), JSON),
        GrpcCall(payloads.make_files_message(server.model, images)),
        *(HttpCall(_upload(server), image, PNG) for image in images),
    ]


def photos(server: Server) -> list[Call]:
    return [HttpCall(_upload(server), photo, JPEG, expected=SERVED_OR_LATE) for photo in payloads.make_photos()]


def large_json(server: Server) -> list[Call]:
    body = payloads.make_v1_json(payloads.make_nested_pixels(1_900))  # 27 MB
    return [HttpCall(_v1(server), body, JSON, expected=SERVED_OR_REFUSED) for _ in range(8)]


def large_v2_json(server: Server) -> list[Call]:
    nested = payloads.make_nested_pixels(1_900)
    body = payloads.make_v2_json(nested, (1_900, 32, 32, 3))
    plain: list[Call] = [HttpCall(_v2(server), body, JSON, expected=SERVED_OR_REFUSED) for _ in range(4)]
    gzipped = [HttpCall(_v2(server), payloads.compress(body), GZIP, expected=SERVED_OR_REFUSED) for _ in range(4)]
    return plain + gzipped


def chunked_json(server: Server) -> list[Call]:
    body = payloads.make_v1_json(payloads.repeat_element(b"[],", 60_000_000))
    return [HttpCall(path, body, JSON, chunked=True) for path in (_v1(server), _v2(server)) for _ in range(2)]


def many_images(server: Server) -> list[Call]:
    images = [payloads.make_png(1_000, 1_000, colour=6, bits=16)] * 250
    headers, form = payloads.make_form(images)
    calls: list[Call] = [HttpCall(_upload(server), form, headers) for _ in range(2)]
    return [*calls, HttpCall(_v1(server), payloads.make_b64_json(images), JSON)]


def grpc_messages(server: Server) -> list[Call]:
    return [GrpcCall(payloads.make_pixel_message(server.model, 19_500)) for _ in range(16)]  # 60 MB each


def grpc_compressed(server: Server) -> list[Call]:
    message = payloads.make_zeros_message(server.model, 100_000)  # 307 MB
    return [GrpcCall(message, compressed=True) for _ in range(6)]


def grpc_message_of_26_mb(server: Server) -> list[Call]:
    return [GrpcCall(payloads.make_pixel_message(server.model, 8_500))]


def b64_slow_png(server: Server) -> list[Call]:
    return [HttpCall(_v1(server), payloads.make_b64_json([payloads.make_slow_png()]), JSON)]


def form_of_155(server: Server) -> list[Call]:
    headers, form = payloads.make_form([payloads.make_png(500, 500, colour=6)] * 155)
    return [HttpCall(_upload(server), form, headers)]


def form_of_10_000_parts(server: Server) -> list[Call]:
    headers, form = payloads.make_form([b"x"] * 10_000)
    return [HttpCall(_upload(server), form, headers)]


def json_of_26_mb(server: Server) -> list[Call]:
    return [HttpCall(_v1(server), payloads.make_v1_json(payloads.make_nested_pixels(1_830)), JSON)]


def v2_json_of_26_mb(server: Server) -> list[Call]:
    body = payloads.make_v2_json(payloads.make_nested_pixels(1_830), (1_830, 32, 32, 3))
    return [HttpCall(_v2(server), body, JSON)]


def nan_json(server: Server) -> list[Call]:
    pixels = payloads.make_nested_pixels(1_830).replace(b"102", b"NaN")
    return [HttpCall(_v1(server), payloads.make_v1_json(pixels), JSON)]


def duplicate_keys(server: Server) -> list[Call]:
    pixels = payloads.make_nested_pixels(900)
    members = b'{"instances":%s,"instances":%s,"a":[%s]}' % (pixels, pixels, b",".join([b'{"a":0,"a":1}'] * 100_000))
    return [HttpCall(_v1(server), members, JSON)]


def json_of_1_mb(server: Server) -> list[Call]:
    """Documents just below the size from which they are parsed in another process, of the kinds that take longest."""
    size = 1_040_000
    rows = [payloads.repeat_element(element, size) for element in (b"[],", b'{"a":0},', b'{"a":0,"a":1},', b"NaN,")]
    bodies = [payloads.make_v1_json(row) for row in rows]
    pixels = payloads.repeat_element(b"1.0,", size)
    v2 = payloads.make_v2_json(pixels, (pixels.count(b","), 1))
    return [*(HttpCall(_v1(server), body, JSON) for body in bodies), HttpCall(_v2(server), v2, JSON)]


def empty_strings(server: Server) -> list[Call]:
    strings = payloads.repeat_element(b'"",', 15_000_000)
    body = payloads.compress(payloads.make_v1_json(strings, signature="image_bytes"))
    return [HttpCall(_v1(server), body, GZIP, expected=frozenset({"400", "413", "503", "504"}))]


def images_20_000(server: Server) -> list[Call]:
    body = payloads.make_b64_json([payloads.make_small_image()] * 20_000)
    return [HttpCall(_v1(server), body, JSON)]


def wide_replies(server: Server) -> list[Call]:
    body = payloads.make_v1_json(b"[" + b",".join([b"[1]"] * 40) + b"]")  # ten million numbers
    return [HttpCall(f"/v1/models/{server.wide_model}:predict", body, JSON)]


def scan_bombs(server: Server) -> list[Call]:
    image = payloads.make_scan_bomb()
    return [
        HttpCall(_upload(server), image, JPEG, expected=REFUSED),
        HttpCall(_v1(server), payloads.make_b64_json([image]), JSON, expected=REFUSED),
        GrpcCall(payloads.make_files_message(server.model, [image]), expected=REFUSED_GRPC),
    ]


def slow_calls(server: Server) -> list[Call]:
    """Twenty large requests to the slow model, each of another shape, so that no two can share a call."""
    rows = [b"[" + b",".join([b"0.125"] * (60_000 + number)) + b"]" for number in range(20)]  # more than 256 KB
    path = f"/v1/models/{server.slow_model}:predict"
    return [HttpCall(path, payloads.make_v1_json(b"[" + row + b"]"), JSON) for row in rows]


def unbatched_calls(server: Server) -> list[Call]:
    body = b'{"inputs":{"x":[0.5,0.5]}}'
    return [HttpCall(f"/v1/models/{server.unbatched_model}:predict", body, JSON) for _ in range(20)]


CALLS: dict[str, Callable[[Server], Sequence[Call]]] = {
    function.__name__: function
    for function in (
        gzip_for_no_model,
        gzip_json,
        v2_compressed_json,
        tall_png,
        giant_pngs,
        photos,
        large_json,
        large_v2_json,
        chunked_json,
        many_images,
        grpc_messages,
        grpc_compressed,
        grpc_message_of_26_mb,
        b64_slow_png,
        form_of_155,
        form_of_10_000_parts,
        json_of_26_mb,
        v2_json_of_26_mb,
        nan_json,
        duplicate_keys,
        json_of_1_mb,
        empty_strings,
        images_20_000,
        wide_replies,
        scan_bombs,
        slow_calls,
        unbatched_calls,
    )
}


@cache
def make_calls(name: str, server: Server) -> Sequence[Call]:
    return CALLS[name](server)


def _send_calls(name: str) -> Callable[[Server], list[Outcome]]:
    return lambda server: send_at_once(server, make_calls(name, server))


ATTACKS: dict[str, Callable[[Server], list[Outcome]]] = {name: _send_calls(name) for name in CALLS} | RUDE_CLIENTS

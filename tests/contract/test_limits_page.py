"""The figures in docs/limits.md are those of the settings and the modules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from client.__main__ import main as client
from image_formats.header import MAX_JPEG_SCANS, ImageHeader
from serving.__main__ import main
from serving.access.__main__ import main as make_token
from serving.api import compression, json_cost, json_process
from serving.api.predict import messages
from serving.api.tensorflow_serving import json_document
from serving.grpc import health, receiving
from serving.http import handshake, parser, protocol, request, server
from serving.images import limits as image_limits
from serving.images.limits import decode_cost
from serving.memory import BODIES_SHARE, SMALL_SHARE, MemoryBudget
from serving.process_memory import SAFETY_SHARE
from serving.settings import Settings
from training.__main__ import main as training

PROJECT = Path(__file__).parents[2]
PAGE = (PROJECT / "docs" / "limits.md").read_text()
TEXT = " ".join(PAGE.split())
KIB, MIB = 2**10, 2**20
GRPC_SHARE = (1 - SMALL_SHARE) * BODIES_SHARE / receiving.COPIES

# The rows of all tables, by their first cell.
ROWS = {line.split(" | ")[0].removeprefix("| "): line for line in PAGE.splitlines() if line.startswith("| ")}


@pytest.mark.parametrize(
    ("limit", "default", "option"),
    [
        ("request body", f"{Settings.max_request_bytes // MIB} MiB", "--max-request-bytes"),
        ("inflated body", f"{compression.MAX_INFLATED_BYTES // MIB} MiB", None),
        ("levels of nested JSON", f"{json_document.MAX_DEPTH}", None),
        ("rows of a request", f"{Settings.max_rows:,}", "--max-rows"),
        ("images in one form", f"{Settings.max_images}", "--max-images"),
        ("other fields in one form", f"{messages.MAX_FORM_FIELDS}", None),
        ("pixels of an image", f"{Settings.max_image_pixels:,}", "--max-image-pixels"),
        ("longest side", f"{Settings.max_image_side:,}", "--max-image-side"),
        ("frames of an animation", f"{image_limits.MAX_FRAMES:,}", None),
        ("compressed text in a PNG", f"{image_limits.MAX_METADATA_BYTES // 10**6} MB inflated", None),
        (
            "scans of a JPEG",
            f"{MAX_JPEG_SCANS}; fewer above 10 megapixels, down to {image_limits.FULL_SIZE_SCANS} at 50",
            None,
        ),
        ("request line and headers", f"{request.MAX_HEAD_BYTES // KIB} KiB", None),
        ("trailers", f"{parser.MAX_TRAILER_BYTES // KIB} KiB", None),
        ("time for a TLS handshake", f"{handshake.HANDSHAKE_TIMEOUT_S:.0f} s", None),
        ("time for the headers", f"{protocol.HEAD_TIMEOUT_S:.0f} s", None),
        ("upload rate", f"{request.UPLOAD_BYTES // KIB} KiB in {request.UPLOAD_PERIOD_S:.0f} s", None),
        (
            "upload rate",
            f"{request.CONTENDED_BYTES // KIB} KiB in {request.CONTENDED_PERIOD_S:.0f} s while",
            None,
        ),
        ("idle connection", f"{protocol.FIRST_REQUEST_TIMEOUT_S:.0f} s until the first request", None),
        ("idle connection", f"{protocol.KEEP_ALIVE_S:.0f} s between two", None),
        ("response that the client does not read", f"{protocol.UNREAD_TIMEOUT_S:.0f} s", None),
        ("open HTTP connections", f"{Settings.max_connections:,}", "--max-connections"),
        ("time for a request", f"{Settings.request_timeout_s:.0f} s", "--request-timeout-s"),
        ("rows that wait", f"{Settings.max_queue_size:,}", "--max-queue-size"),
        ("memory for all requests", f"{SAFETY_SHARE:.0%}".replace("%", " %"), "--memory-budget"),
        ("gRPC message", f"at most {GRPC_SHARE * 48:.0f}/48 of the memory budget", "--max-request-bytes"),
        ("time for a gRPC message", f"{receiving.TIMEOUT_S:.0f} s", None),
        ("time for a gRPC message", f"{receiving.CONTENDED_TIMEOUT_S:.0f} s while others wait", None),
        ("watches of the gRPC health service", f"{health.MAX_WATCHES:,}", None),
    ],
)
def test_each_row_has_the_default_and_the_option(limit: str, default: str, option: str | None) -> None:
    (row,) = (row for name, row in ROWS.items() if name.startswith(limit))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert default in cells[1], row
    assert re.findall(r"--[a-z-]+", cells[2]) == ([option] if option else []), row


def test_every_option_that_a_page_names_exists() -> None:
    commands = [main, make_token, *training.commands.values(), *client.commands.values()]
    options = {option for each in commands for given in each.params for option in (*given.opts, *given.secondary_opts)}
    # TensorFlow Serving's have underscores. `--way` is an option of a benchmark, `--help` of all.
    options |= {"--way", "--help"}
    for page in (PROJECT / "docs").glob("*.md"):
        named = set(re.findall(r"`(--[a-z0-9-]+)(?![a-z0-9_-])", page.read_text()))
        assert named <= options, page.name


def test_every_option_has_a_page() -> None:
    pages = "".join((PROJECT / "docs" / name).read_text() for name in ("commands.md", "importing.md", "limits.md"))
    for command in (main, make_token, *training.commands.values(), *client.commands.values()):
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                assert not option.startswith("--") or f"`{option}`" in pages, option


def test_every_limit_option_is_documented() -> None:
    limits = {option for parameter in main.params for option in parameter.opts if option.startswith("--max-")}
    # The batch size does not limit a request.
    assert limits - {"--max-batch-size"} == set(re.findall(r"--max-[a-z-]+", PAGE))


def test_the_memory_budget_example() -> None:
    """A container of 2 GiB, as in the manifest, and a process of 640 MiB."""
    budget_mib = SAFETY_SHARE * (2_048 - 640)
    budget = MemoryBudget(int(budget_mib * MIB))
    assert f"{SAFETY_SHARE} x (2,048 - 640) = {budget_mib:,.0f} MiB of budget" in TEXT
    small, large = round(budget.small.limit / MIB), round(budget.large.limit / MIB)
    assert f"{small} MiB are for small requests and {large} MiB for large ones" in TEXT
    header = ImageHeader("JPEG", 8_000, 6_250, 0, channels=3)
    assert header.pixels == Settings.max_image_pixels
    uploaded = decode_cost(header, decoder="pillow", size=(32, 32)) / MIB
    in_model = decode_cost(header, decoder="tensorflow", size=(32, 32)) / MIB
    assert (large // uploaded, large // in_model) == (2, 1)  # at a time
    assert f"{round(uploaded, -1):.0f} MiB, so two" in ROWS["a photo of 50 megapixels, uploaded as JPEG"]
    assert f"{round(in_model, -1):.0f} MiB, so one" in ROWS["the same as base64 or over gRPC, decoded by the model"]


def test_the_memory_cost_of_json() -> None:
    row = ROWS["JSON: numbers; base64; text outside ASCII"]
    size = 1_000_000
    costs = [
        json_cost.json_cost(text * (size // len(text))) / size
        for text in (b"0.12345678901234567,", b"1,", b"A", "\N{LATIN SMALL LETTER E WITH ACUTE}".encode())
    ]
    digits, digit, base64, text = map(round, costs)
    assert f"{digits} to {digit} times the body, more with fewer digits; {base64} times; {text} times" in row


def test_the_other_figures() -> None:
    assert f"JSON**, over {json_process.LARGE_JSON_BYTES // MIB} MiB" in TEXT
    assert f"`--drain-timeout-s` ({Settings.drain_timeout_s} s)" in TEXT
    assert protocol.CLOSE_IDLE_AFTER_S == 0.5
    assert "Idle connections are closed half a second later" in TEXT
    assert server.SPARE_FILES == 40
    assert "less 40 for its own files" in " ".join((PROJECT / "docs" / "deploying.md").read_text().split())


def test_both_pages_say_the_same_of_a_grpc_message() -> None:
    other = (PROJECT / "docs" / "tensorflow-serving.md").read_text()
    assert f"at most {GRPC_SHARE * 48:.0f}/48 of the memory budget" in " ".join(other.split())

"""The code in the documentation runs: README.md and docs/*.md, against a model exported in this session.

The first word of a block's info string is its language. A `sh` or `python` block is run, in the order of its page; with
`background` after the language it is started and left running; with `not-run: REASON` it is not run, for that reason.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from serving.server_process import free_ports
from tests.contract.conftest import Served
from tests.serving.conftest import picture

PROJECT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (PROJECT / "docs").glob("*.md"))]
MAX_README_WORDS = 900
LANGUAGES = {"", "sh", "python", "json", "mermaid", "yaml"}  # yaml: tests/deploy/test_manifests.py
TIMEOUT_S = 120


@dataclass(frozen=True)
class Block:
    """A fenced code block and the line it begins at."""

    line: int
    language: str
    note: str  # of the info string, what follows the language
    code: str


def read_blocks(page: str) -> list[Block]:
    text = (PROJECT / page).read_text()
    blocks = []
    for match in re.finditer(r"^```([a-z]*) ?(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        blocks.append(Block(text.count("\n", 0, match.start()) + 1, *match.groups()))
    assert text.count("```") == 2 * len(blocks), f"{page}: a fence that is not at the beginning of a line"
    return blocks


class Checkout:
    """A project folder as `make` leaves it, with an exported model, a few photos, and ports of its own."""

    def __init__(self, folder: Path, version: Path) -> None:
        self.folder = folder
        self.port, self.grpc_port = free_ports(2)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for path in PROJECT.iterdir():
            if path.name not in ("runs", "models", "photos") and not path.name.startswith("."):
                (folder / path.name).symlink_to(path)
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        (folder / ".venv" / ".installed").touch()
        shutil.copytree(version, folder / "models" / "shapes" / "1")
        self._draw("runs/demo-pictures/star-1.png", "runs/demo-pictures/cross-1.png")
        for name, first in (("cats", 1), ("dogs", 3)):
            self._draw(*(f"photos/{name}/IMG_{number:04}.jpg" for number in range(first, first + 20)))

    def _draw(self, *names: str) -> None:
        rng = np.random.default_rng(0)
        for name in names:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (40, 30), tuple(rng.integers(0, 256, 3).tolist()))
            ImageDraw.Draw(image).ellipse((5, 5, 30, 25), fill="white" if "cat" in name else "black")
            image.save(path)

    @property
    def env(self) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        ports = {
            "PORT": str(self.port),
            "GRPC_PORT": str(self.grpc_port),
            "CLIENT_URL": f"http://127.0.0.1:{self.port}",
        }
        return env | ports | {"EPOCHS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}

    def _adapt(self, code: str) -> str:
        return code.replace("127.0.0.1:8501", f"127.0.0.1:{self.port}").replace("0.1:8500", f"0.1:{self.grpc_port}")

    def run(self, block: Block, page: str) -> None:
        if block.language == "python":
            command = [".venv/bin/python", "-c", self._adapt(block.code)]
        else:  # curl ends with 0 whatever the status, unless it is told otherwise
            curl = 'curl() { command curl --silent --show-error --fail-with-body "$@"; }\n'
            command = ["bash", "-euo", "pipefail", "-c", curl + self._adapt(block.code)]
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == 0, f"{page}:{block.line}\n{block.code}{done.stdout}{done.stderr}"

    def start(self, block: Block, page: str) -> None:
        """Start a service, unless an earlier page has, and wait until it is ready."""
        if block.code not in self._processes:
            with (self.folder / "background.log").open("wb") as log:
                self._processes[block.code] = subprocess.Popen(
                    ["bash", "-c", f"exec {block.code}"], cwd=self.folder, env=self.env, stdout=log, stderr=log
                )
        process = self._processes[block.code]
        while not self.is_ready():
            log_text = (self.folder / "background.log").read_text()
            assert process.poll() is None, f"{page}:{block.line}: ended with {process.returncode}: {log_text}"

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        for process in self._processes.values():
            process.terminate()  # make hands it on
            process.wait(timeout=60)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, shapes: Served) -> Iterator[Checkout]:
    checkout = Checkout(tmp_path_factory.mktemp("checkout"), shapes.version)
    yield checkout
    checkout.stop()


EXTRAS = {
    "docs/convert.md": ("convert", ("tf2onnx", "onnxruntime", "ai_edge_litert")),
    "docs/batch-prediction.md": ("batch", ("pyarrow",)),
}


@pytest.mark.parametrize("page", ["docs/getting-started.md", "docs/importing.md", "README.md", *EXTRAS])
def test_every_block_of_code_runs(page: str, checkout: Checkout) -> None:
    extra, packages = EXTRAS.get(page, ("", ()))
    for package in packages:
        pytest.importorskip(package, reason=f"needs {package}, of the extra [{extra}]")
    blocks = [block for block in read_blocks(page) if block.language in ("sh", "python")]
    assert {block.language for block in blocks} == {"sh", "python"}
    for block in blocks:
        if block.note == "background":
            checkout.start(block, page)
        elif not block.note:
            checkout.run(block, page)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_marked_and_those_that_are_not_run_have_a_reason(page: str) -> None:
    for block in read_blocks(page):
        where = f"{page}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: a language that nothing runs"
        assert not block.note or block.language in ("sh", "python"), where
        assert re.fullmatch(r"|background|not-run: .{5,}", block.note), f"{where}: {block.note!r}"
        if block.language == "python":
            compile(block.code, where, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_documented_make_commands_exist(page: str) -> None:
    makefile = (PROJECT / "Makefile").read_text()
    targets, variables = re.findall(r"^([a-z-]+):", makefile, re.M), re.findall(r"^([A-Z_]+) \?=", makefile, re.M)
    text = (PROJECT / page).read_text()
    for command in re.findall(r"(?:^|`)((?:[A-Z_]+=\S+ )*make [^`\n#]*)", text, re.M):
        words = command.split()
        words = words[words.index("make") + 1 :]
        assert {word for word in words if "=" not in word and not re.search(r"[\"'/.]", word)} <= set(targets), command
        named = {word.split("=")[0] for word in words if re.match(r"[A-Z_]+=", word)}
        assert named <= {*variables, "BEFORE", "PYTHON"}, command


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_to_files_and_headings(page: str) -> None:
    folder = (PROJECT / page).parent
    text = re.sub(r"^```.*?^```$", "", (PROJECT / page).read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]*(?:#[^)]*)?)\)|(?:src|href)=\"([^\"]+)\"", text):
        path, _, anchor = (target[0] or target[1]).partition("#")
        if path.startswith("http"):
            continue
        file = folder / path if path else PROJECT / page
        assert file.exists(), f"{page}: {path}"
        headings = (
            [
                re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
                for h in re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            ]
            if anchor
            else []
        )
        assert not anchor or anchor in headings, f"{page}: {path}#{anchor}"


def describe(value: Any) -> Any:
    """Return the keys of a JSON document, of the first element of each list, and the types of its values."""
    if isinstance(value, dict):
        # A prediction set may be empty.
        return {
            key: list if key == "label_set" else describe(child)
            for key, child in value.items()
            if key != "probabilities"
        }
    if isinstance(value, list):
        return [describe(child) for child in value[:1]]
    return type(value)


def read_json_blocks(page: str) -> list[Any]:
    return [json.loads(block.code) for block in read_blocks(page) if block.language == "json"]


def test_documented_responses_have_the_fields_of_real_ones(shapes: Served) -> None:
    predicted, refused = read_json_blocks("docs/predict.md")
    url = shapes.server.url + "/predict"
    image = httpx.post(url, files={"image": ("hexagon-1.png", picture("red"))})
    assert describe(image.json()) == describe(predicted)
    assert describe(predicted) == describe(read_json_blocks("docs/getting-started.md")[0])
    both = {"image": ("notes.png", b"Remember the milk"), "other": ("red.png", picture("red"))}
    assert httpx.post(url, files=both).json() == refused
    readiness, _ = read_json_blocks("docs/operations.md")  # the log line: tests/serving/test_request_log.py
    assert describe(httpx.get(shapes.server.url + "/readyz").json()) == describe(readiness)


def test_documented_metrics_exist(shapes: Served) -> None:
    text = "".join((PROJECT / "docs" / name).read_text() for name in ("operations.md", "drift.md"))
    documented = set(re.findall(r"`((?:serving_|:tensorflow:)[a-z_:]+)`", text))
    page = httpx.get(shapes.server.url + "/metrics").text
    existing = set(re.findall(r"^# HELP ([a-z_:]+) ", page, re.MULTILINE))
    assert documented == {name for name in existing if name.startswith(("serving_", ":tensorflow:"))}


def test_the_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text().split()) <= MAX_README_WORDS


@pytest.mark.parametrize("name", ["page.png", "report.png"])
def test_screenshots_are_small(name: str) -> None:
    path = PROJECT / "docs" / "images" / name
    assert path.stat().st_size < 150_000
    with Image.open(path) as image:
        assert image.width >= 1_000


@pytest.mark.parametrize("page", PAGES)
def test_documented_paths_exist(page: str) -> None:
    text = (PROJECT / page).read_text()
    packages = "training|serving|client|image_formats|tests|benchmarks|deploy|docs|scripts"
    for path in re.findall(rf"`((?:{packages})/[\w./-]*)`", text):
        assert (PROJECT / path).exists(), path


def test_the_changelog_keeps_its_format() -> None:
    headings = re.findall(r"^(##+) (.*)$", (PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("##", "Unreleased")
    kinds = {name for level, name in headings if level == "###"}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}

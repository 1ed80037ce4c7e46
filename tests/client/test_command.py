"""`python -m client`: its output, exit codes and signals."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from client.__main__ import main
from tests.client.conftest import png_of, write_png
from tests.client.service import COLOURS, Handler, Service, busy, hang_up, respond, stall

Run = Callable[..., Result]
PROJECT = Path(__file__).parents[2]


@pytest.fixture
def run(service: Service) -> Run:
    """Run `predict` against the service."""

    def invoke(*arguments: object, stdin: bytes | None = None) -> Result:
        return CliRunner(env={"CLIENT_URL": service.url}).invoke(main, ["predict", *map(str, arguments)], input=stdin)

    return invoke


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images in folders by colour, one of them in the wrong folder."""
    for colour in COLOURS:
        write_png(tmp_path / colour / "1.png", colour)
        write_png(tmp_path / colour / "2.png", "red" if colour == "blue" else colour)
    return tmp_path


# Like `-m client`, with Ctrl-C enabled: processes in the background ignore it, and child processes inherit that.
WITH_CTRL_C = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('client', run_name='__main__', alter_sys=True)"
)


def start(
    service: Service, *arguments: object, module: tuple[str, ...] = ("-m", "client"), **options: Any
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *module, "predict", "--url", service.url, *map(str, arguments)],
        text=True,
        cwd=PROJECT,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def test_table_has_a_line_per_image(run: Run, folder: Path) -> None:
    result = run(folder)
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [f"{folder}/{c}/{n}.png" for c in sorted(COLOURS) for n in (1, 2)]
    assert [line.split()[1] for line in lines] == ["blue", "red", "green", "green", "red", "red"]
    assert all(re.fullmatch(r"\S+ +\w+ +99\.0 %  █████████▉", line) for line in lines)
    assert len({line.index("%") for line in lines}) == 1


def test_top_adds_labels(run: Run, folder: Path) -> None:
    result = run(folder / "red" / "1.png", "--top", 3)
    assert result.stdout.rstrip().endswith("99.0 %  █████████▉  green 0.5 %, blue 0.5 %")


def test_json_has_a_line_per_image(run: Run, service: Service, folder: Path) -> None:
    bad = folder / "notes.txt"
    bad.write_text("no image")
    result = run(folder / "red" / "1.png", bad, "--json", "--model", "colours", "--model-version", 4)
    assert result.exit_code == 1
    classified, failed = map(json.loads, result.stdout.splitlines())
    assert classified == {
        "file": str(folder / "red" / "1.png"),
        "label": "red",
        "class_id": 0,
        "confidence": classified["probabilities"]["red"],
        "probabilities": {
            "red": pytest.approx(201 / 203),
            "green": pytest.approx(1 / 203),
            "blue": pytest.approx(1 / 203),
        },
        "model": "colours",
        "model_version": 4,
    }
    assert failed == {"file": str(bad), "error": "not an image"}
    assert service.received[0].query == {"model": ["colours"], "version": ["4"]}


def test_json_with_top_has_the_most_probable_labels(run: Run, folder: Path) -> None:
    record = json.loads(run(folder / "green" / "1.png", "--json", "--top", 1).stdout)
    assert list(record["probabilities"]) == ["green"]


def test_every_failed_image_is_reported_and_the_others_are_classified(run: Run, folder: Path) -> None:
    bad, empty = folder / "red" / "bad.png", folder / "empty.gif"
    bad.write_text("no image")
    empty.touch()
    nothing = folder / "nothing"
    nothing.mkdir()
    result = run(folder, nothing, folder / "missing.png")
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 6
    assert result.stderr.splitlines() == [
        f"{nothing}: no images in this folder: expected JPEG, PNG, WebP, AVIF, BMP or GIF files",
        f"{empty}: the image is empty: it has no bytes",
        f"{bad}: not an image",
        f"{folder}/missing.png: file not found",
        "4 of 10 failed, see above",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_folder_that_cannot_be_listed_is_reported(run: Run, folder: Path) -> None:
    (folder / "red").chmod(0)
    try:
        result = run(folder)
    finally:
        (folder / "red").chmod(0o700)
    assert result.exit_code == 1
    assert f"{folder}/red: cannot be listed: Permission denied" in result.stderr
    assert len(result.stdout.splitlines()) == 4


def test_image_on_standard_input(run: Run) -> None:
    result = run("-", stdin=png_of("green"))
    assert (result.exit_code, result.stdout.split()[:2]) == (0, ["-", "green"])
    record = json.loads(run("-", "--json", stdin=png_of("blue")).stdout)
    assert (record["file"], record["label"]) == ("-", "blue")
    result = run("-", stdin=b"")
    assert (result.exit_code, result.stderr.splitlines()[0]) == (1, "-: the image is empty: it has no bytes")


def test_batch_size_option(run: Run, service: Service, folder: Path) -> None:
    run(folder, "--batch-size", 4)
    assert [len(batch) for batch in service.batches] == [4, 2]


def test_labels_from_folders_report_the_accuracy(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(folder, "--labels-from-folders")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "accuracy 83.33 % (5 of 6)"
    result = run(folder, "--labels-from-folders", "--json")
    assert result.stderr == "accuracy 83.33 % (5 of 6)\n"
    assert len(result.stdout.splitlines()) == 6
    monkeypatch.chdir(tmp_path / "green")
    assert run("1.png", "../red/1.png", "--labels-from-folders").stdout.endswith("accuracy 100.00 % (2 of 2)\n")


def test_labels_from_folders_reject_unknown_labels(run: Run, folder: Path) -> None:
    write_png(folder / "yellow" / "1.png", "red")
    result = run(folder / "yellow", "--labels-from-folders")
    assert result.exit_code == 2
    assert "yellow/1.png is not a label of the model: red, green, blue" in result.stderr
    assert run("-", "--labels-from-folders", stdin=png_of("red")).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--top", "0", "a.png"),
        ("--batch-size", "0", "a.png"),
        ("--timeout", "0", "a.png"),
        ("--timeout", "nan", "a.png"),
        ("--retries", "-1", "a.png"),
        ("--url", "127.0.0.1:8501", "a.png"),
        ("--no-such-option", "a.png"),
    ],
)
def test_exit_code_2_for_wrong_usage(run: Run, service: Service, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert service.received == []


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (busy(), "is not ready: colours is being loaded"),
        (hang_up, "was closed"),
        (respond(404, {"error": "no model of that name"}), "no model of that name"),
        (respond(400, {"error": "several models are served; choose one: a, b"}), "choose one: a, b"),
        (respond(502, b"<html>", "text/html"), "got 502 Bad Gateway"),
        (respond(500, {"error": "see \033[2J the log"}), "see \ufffd[2J the log"),
    ],
)
def test_exit_code_3_without_predictions(
    run: Run, service: Service, folder: Path, failure: Callable[[Handler], None], message: str
) -> None:
    service.script.extend([lambda handler: handler.predict(handler.received.files), failure])
    result = run(folder, "--batch-size", 2, "--retries", 0)
    assert result.exit_code == 3
    # The second and the third batch are sent concurrently, so either can fail.
    classified = len(result.stdout.splitlines())
    assert classified in (2, 4)
    first, second = result.stderr.splitlines()
    assert first == f"{classified} of 6 images classified"
    assert second.startswith("error: ")
    assert message in second


def test_exit_code_3_if_the_service_is_not_running(run: Run, closed_port: int, folder: Path) -> None:
    result = run(folder / "red" / "1.png", "--url", f"http://127.0.0.1:{closed_port}", "--retries", 0)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "start the service with `make serve`" in result.stderr


def test_timeout_and_retries_options(run: Run, service: Service, folder: Path) -> None:
    service.script.extend([hang_up, stall])
    result = run(folder / "red" / "1.png", "--timeout", 0.5, "--retries", 1)
    assert result.exit_code == 3
    assert "no complete response" in result.stderr
    assert len(service.received) == 2


def test_status_lists_the_models(service: Service, closed_port: int) -> None:
    def status(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["status", *arguments], env={"CLIENT_URL": service.url})

    result = status()
    assert (result.exit_code, result.stdout) == (0, "colours  version 7  AVAILABLE\nready\n")
    failed = {"name": "colours", "version": 8, "state": "END", "error": "its files are damaged"}
    service.script.append(respond(503, {"ready": False, "reason": "colours failed", "models": [failed]}))
    result = status()
    assert (result.exit_code, result.stdout) == (3, "colours  version 8  END  its files are damaged\n")
    assert result.stderr == "not ready: colours failed\n"
    result = status("--url", f"http://127.0.0.1:{closed_port}")
    assert result.exit_code == 3
    assert result.stderr.startswith("error: cannot connect")
    assert status("--url", "nowhere").exit_code == 2


def test_token_option(service: Service, folder: Path) -> None:
    environment = {"CLIENT_URL": service.url, "CLIENT_TOKEN": "from-the-environment"}
    CliRunner(env=environment).invoke(main, ["predict", str(folder / "red")])
    CliRunner(env=environment).invoke(main, ["predict", "--token", "given", str(folder / "red")])
    sent = [request.headers["Authorization"] for request in service.received]
    assert sent == ["Bearer from-the-environment", "Bearer given"]


def test_help_describes_the_exit_codes() -> None:
    text = " ".join(CliRunner().invoke(main, ["predict", "--help"]).stdout.split())
    assert "Exit codes: 0 all images are classified; 1 some are not; 2 wrong usage; 3 the service" in text
    assert "CLIENT_URL" in text


def test_ctrl_c_exits_with_130(service: Service, folder: Path) -> None:
    service.script.extend([lambda handler: handler.predict(handler.received.files), stall])
    with start(service, folder, "--batch-size", 2, module=("-c", WITH_CTRL_C)) as process:
        assert service.arrived.acquire(timeout=30)
        assert service.arrived.acquire(timeout=30)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert len(stdout.splitlines()) == 2
    assert stderr == "2 of 6 images classified\ninterrupted\n"


def test_closed_pipe_exits_without_a_message(service: Service, folder: Path) -> None:
    def respond_later(handler: Handler) -> None:
        service.release.wait(30)
        handler.predict(handler.received.files)

    service.script.extend([lambda handler: handler.predict(handler.received.files), respond_later])
    with start(service, folder, "--batch-size", 1) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "blue" in process.stdout.readline()
        process.stdout.close()
        service.release.set()
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == 1
    assert len(service.received) < 6


def test_output_encoding_without_some_characters(service: Service, tmp_path: Path) -> None:
    image = write_png(tmp_path / "猫.png", "red")
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    with start(service, image, tmp_path / "犬.png", env=environment) as process:
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert stdout.split() == [f"{tmp_path}/?.png", "red", "99.0", "%", "##########"]
    assert "file not found" in stderr


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal of 60 columns: one to read the screen, one for the process."""
    seen, given = pty.openpty()
    fcntl.ioctl(given, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    yield seen, given
    os.close(seen)


def read_terminal(seen: int, given: int) -> str:
    os.close(given)
    text = b""
    while True:
        try:
            text += os.read(seen, 10_000)
        except OSError:  # how Linux reports that the other end is closed
            return text.decode()


def shown_lines(text: str) -> list[str]:
    """Return the lines on the screen, after carriage returns and erased lines."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        line = line.rpartition("\033[2K")[2].rpartition("\r")[2]
        lines.append(re.sub(r"\033\[[0-9;?]*[a-zA-Z]", "", line))
    return lines


def test_terminal_shows_complete_lines_above_a_progress_bar(
    service: Service, folder: Path, terminal: tuple[int, int]
) -> None:
    seen, given = terminal
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    process = start(
        service, folder, folder / "missing.png", "--batch-size", 2, stdout=given, stderr=given, env=environment
    )
    text = read_terminal(seen, given)
    assert process.wait(timeout=30) == 1
    assert "\033[1m" in text  # the label is bold
    lines = shown_lines(text)
    assert [line.split()[1] for line in lines[:6]] == ["blue", "red", "green", "green", "red", "red"]
    assert all(line.startswith("…") and len(line) <= 60 for line in lines[:6])
    assert lines[6] == f"{folder}/missing.png: file not found"
    assert "7/7" in lines[7]
    assert lines[8] == "1 of 7 failed, see above"


def test_progress_bar_is_shown_while_results_are_written_to_a_file(
    service: Service, folder: Path, terminal: tuple[int, int], tmp_path: Path
) -> None:
    seen, given = terminal
    with (tmp_path / "results.txt").open("w") as results:
        process = start(service, folder, stdout=results, stderr=given)
    text = read_terminal(seen, given)
    assert process.wait(timeout=30) == 0
    assert "6/6" in text
    lines = (tmp_path / "results.txt").read_text().splitlines()
    assert len(lines) == 6
    assert all(line.isprintable() and str(folder) in line for line in lines)


def test_too_large_image_is_reported(run: Run, folder: Path) -> None:
    huge = folder / "red" / "huge.png"
    Image.new("L", (2000, 1000)).save(huge)
    result = run(folder)
    assert result.exit_code == 1
    assert result.stderr == f"{huge}: the image has too many pixels\n1 of 7 failed, see above\n"
    assert len(result.stdout.splitlines()) == 6

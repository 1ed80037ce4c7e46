"""The examples in the docstrings of the public API, run against real servers."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import client
from tests.client.conftest import write_png
from tests.client.service import Handler, Service, busy, respond, stall

# What the service does in the examples of errors.
FAILURES: dict[str, Callable[[Handler], None]] = {
    "RequestRejected": respond(401, {"error": "token required"}),
    "RequestTimedOut": stall,
    "ServerBusy": busy(),
    "ServerFailed": respond(500, {"error": "an internal error"}),
    "UnexpectedResponse": respond(200, b"<p>Welcome</p>", "text/html"),
}


def iterate_docstrings() -> Iterator[tuple[str, str]]:
    """Yield the name and docstring of the package, its public classes and functions, and their public methods."""
    yield "client", client.__doc__ or ""
    methods = {}
    for name in client.__all__:
        value = getattr(client, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value.__doc__ or ""
        if inspect.isclass(value):
            for method in vars(value) | vars(value.__mro__[1]):
                if not method.startswith("_") and inspect.isfunction(function := getattr(value, method)):
                    methods[function.__qualname__] = function.__doc__ or ""
    yield from methods.items()


DOCSTRINGS = dict(iterate_docstrings())


def test_public_methods_are_found() -> None:
    assert {"BatchingClient.predict_iter", "AsyncClient.status", "Prediction.top"} < DOCSTRINGS.keys()


def has_example_elsewhere(name: str) -> bool:
    return name.endswith((".close", ".aclose")) or DOCSTRINGS[name].endswith(f"; see `Client.{name.split('.')[-1]}`.")


@pytest.mark.parametrize("name", [name for name in DOCSTRINGS if not has_example_elsewhere(name)])
def test_example(
    name: str, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for colour in ("red", "green"):
        write_png(tmp_path / f"{colour}.png", colour)
        write_png(tmp_path / "photos" / colour / "1.png", colour)
    (tmp_path / "notes.txt").write_text("not an image")
    monkeypatch.chdir(tmp_path)
    if name in FAILURES:
        service.script.append(FAILURES[name])
    docstring = DOCSTRINGS[name].replace("127.0.0.1:8501", f"127.0.0.1:{service.port}")
    if "127.0.0.1:8500" in docstring.partition(">>>")[2]:
        docstring = docstring.replace("127.0.0.1:8500", request.getfixturevalue("grpc_service").address)
    example = doctest.DocTestParser().get_doctest(docstring, {}, name, None, None)
    output: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=output.append)
    assert result.attempted > 0, f"{name} has no example"
    assert not result.failed, "".join(output)

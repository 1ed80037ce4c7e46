"""The layers of serving: which module may import which."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.test_imports import imported

PROJECT = Path(__file__).parents[2]
API = PROJECT / "serving" / "api"
PROTOCOLS = sorted(path.name for path in API.iterdir() if (path / "__init__.py").exists())

# A package, and what it must not import: modules by their full names, with all below them.
FORBIDDEN = {
    "serving/http": (
        "flask",
        "werkzeug",
        "serving.api",
        "serving.app",
        "serving.grpc",
        "serving.inference",
        "serving.settings",
    ),
    "serving/inference": (
        "flask",
        "werkzeug",
        "orjson",
        "serving.api",
        "serving.grpc",
        "serving.http",
        "serving.open_inference",
    ),
    "serving/open_inference": ("flask", "werkzeug", "orjson", "grpc", "serving.api", "serving.grpc", "serving.http"),
    "serving/images": ("flask", "werkzeug", "serving.api", "serving.grpc", "serving.http"),
    "serving/metrics": (
        "flask",
        "werkzeug",
        "serving.api",
        "serving.app",
        "serving.grpc",
        "serving.http",
        "serving.settings",
    ),
    "serving/grpc": ("flask", "werkzeug", "serving.api", "serving.http"),
    "serving/tracing": ("flask", "werkzeug", "serving.api", "serving.grpc", "serving.http"),
    "serving/access": ("flask", "werkzeug", "grpc", "serving.api", "serving.app", "serving.grpc", "serving.settings"),
    **{
        f"serving/api/{protocol}": (
            "serving.grpc",
            "serving.http",
            *(f"serving.api.{other}" for other in PROTOCOLS if other != protocol),
        )
        for protocol in PROTOCOLS
    },
}
COMMAND_LINES = ("serving.__main__", "serving.access.__main__", "training.__main__", "client.__main__")


def find_forbidden(folder: Path, forbidden: tuple[str, ...]) -> dict[str, set[str]]:
    paths = [path for path in folder.rglob("*.py") if path.stem != "__init__"]
    assert paths
    found = {
        str(path.relative_to(PROJECT)): {
            name
            for name in imported(path, in_full=True)
            if any(f"{name}.".startswith(f"{root}.") for root in forbidden)
        }
        for path in paths
    }
    return {path: names for path, names in found.items() if names}


def test_there_are_the_protocols() -> None:
    assert {"predict", "tensorflow_serving", "open_inference", "openapi", "web"} <= set(PROTOCOLS)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_layer_does_not_import_what_is_above_it(package: str) -> None:
    assert find_forbidden(PROJECT / package, FORBIDDEN[package]) == {}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_only_the_server_knows_of_worker_processes(package: str) -> None:
    assert find_forbidden(PROJECT / package, ("serving.workers",)) == {}


@pytest.mark.parametrize("package", ["serving", "training", "client", "image_formats"])
def test_no_module_imports_a_command_line(package: str) -> None:
    assert find_forbidden(PROJECT / package, COMMAND_LINES) == {}


def test_parsing_and_rendering_need_no_flask() -> None:
    """A protocol's parse and render are pure functions, to be tested without a server."""
    paths = [*API.glob("*/messages.py"), API / "tensorflow_serving" / "json_response.py"]
    assert len(paths) == 4
    for path in paths:
        names = imported(path, in_full=True)
        assert not {name for name in names if name.split(".")[0] == "flask" or "flask_app" in name}, path

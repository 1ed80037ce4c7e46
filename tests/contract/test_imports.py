"""Import rules: which packages each of our packages must not import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
FORBIDDEN = {
    "serving": {"keras", "training", "client"},
    "client": {"tensorflow", "keras", "tensorflow_serving", "training", "serving"},
    "training": {"serving", "client"},
    "image_formats": {"tensorflow", "keras", "training", "serving", "client"},
}


def imported(path: Path, *, in_full: bool = False) -> set[str]:
    """Return what a module imports, also inside functions: top-level packages, or full names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names if in_full else {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_module_imports_a_forbidden_package(package):
    paths = list((PROJECT / package).rglob("*.py"))
    assert paths
    found = {str(path): names & FORBIDDEN[package] for path in paths if (names := imported(path)) & FORBIDDEN[package]}
    assert not found


def test_importing_the_http_server_loads_neither_flask_nor_settings():
    """Not even through other modules; `test_layers.py` checks what its own modules import."""
    forbidden = {"flask", "werkzeug", "serving.app", "serving.settings", "serving.api", "serving.grpc"}
    names = sorted(path.stem for path in (PROJECT / "serving" / "http").glob("*.py") if path.stem != "__init__")
    assert {"server", "protocol", "parser", "wsgi"} <= {*names}
    modules = ", ".join(f"serving.http.{name}" for name in names)
    program = f"import sys, {modules}; print(*({forbidden!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("package", "modules", "forbidden"),
    [
        ("client", "client, client.__main__, client.grpc", {"tensorflow", "keras"}),
        (
            "training",
            "training.config, training.data, training.__main__, training.exporter.signing",
            {"tensorflow", "keras"},
        ),
        ("serving", "serving.app, serving.__main__", {"tensorflow", "keras", "training", "opentelemetry"}),
    ],
)
def test_importing_a_package_loads_no_heavy_library(package, modules, forbidden):
    program = f"import sys, {modules}; print(*(set({sorted(forbidden)!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [], package


OURS, THEIRS = "client.grpc", "tensorflow_serving.apis.predict_pb2"


@pytest.mark.parametrize("modules", [f"{OURS}, {THEIRS}", f"{THEIRS}, {OURS}"])
def test_the_clients_protos_do_not_conflict_with_the_official_ones(modules):
    """In either order: a duplicate message name aborts the process."""
    subprocess.run([sys.executable, "-c", f"import {modules}"], cwd=PROJECT, check=True)


@pytest.mark.parametrize("order", [1, -1])
def test_the_protos_of_the_open_inference_protocol_do_not_conflict_with_other_ones(order):
    """Not in either order, although the names of the messages are the same."""
    modules = ", ".join(["serving.grpc.protos.open_inference_pb2", "tritonclient.grpc.service_pb2"][::order])
    subprocess.run([sys.executable, "-c", f"import {modules}"], cwd=PROJECT, check=True)


def test_the_http_client_does_not_import_grpc():
    program = "import sys, client.__main__; client.Client('http://127.0.0.1:1'); print('grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]

"""TensorFlow Serving's model config file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from serving.errors import StartupError
from serving.inference.model_config import ModelConfig, VersionPolicy, read_config_file
from tests.serving.conftest import Server


def write(path: Path, *models: str) -> Path:
    path.write_text("model_config_list { " + " ".join(f"config {{ {model} }}" for model in models) + " }")
    return path


def test_a_config_file_is_read(tmp_path: Path) -> None:
    file = write(
        tmp_path / "models.config",
        'name: "a" base_path: "/m/a" model_platform: "tensorflow"',
        'name: "b" base_path: "/m/b" model_version_policy { latest { num_versions: 3 } }',
        'name: "c" base_path: "/m/c" model_version_policy { all {} } version_labels { key: "stable" value: 4 }',
        'name: "d" base_path: "/m/d" model_version_policy { specific { versions: 4 versions: 9 } }',
    )
    assert read_config_file(file) == [
        ModelConfig("a", Path("/m/a")),
        ModelConfig("b", Path("/m/b"), VersionPolicy(latest=3)),
        ModelConfig("c", Path("/m/c"), VersionPolicy(latest=None), {"stable": 4}),
        ModelConfig("d", Path("/m/d"), VersionPolicy(latest=None, specific=frozenset({4, 9}))),
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model_config_list {", "not a ModelServerConfig in text format"),
        ("", "Only ModelConfigList"),
        ('model_config_list { config { name: "a" base_path: "m" } }', "absolute base_path, got 'm'"),
        ('model_config_list { config { name: "a/b" base_path: "/m" } }', "a model name without / and :"),
        (
            'model_config_list { config { name: "a" base_path: "/m" model_platform: "torch" } }',
            "expected the platform 'tensorflow', got 'torch'",
        ),
        (
            'model_config_list { config { name: "a" base_path: "/m" model_version_policy { specific {} } } }',
            "lists no versions",
        ),
        (
            'model_config_list { config { name: "a" base_path: "/m" version_labels { key: "" value: 1 } } }',
            "must not be empty",
        ),
    ],
)
def test_an_invalid_config_file_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "models.config"
    file.write_text(text)
    with pytest.raises(StartupError) as refused:
        read_config_file(file)
    assert problem in str(refused.value)
    assert str(file) in str(refused.value)


@pytest.mark.slow
def test_the_service_serves_the_models_of_the_config_file(
    tmp_path: Path, models_dir: Path, start_server: Callable[..., Server]
) -> None:
    file = write(
        tmp_path / "models.config",
        f'name: "rgb" base_path: "{models_dir}/colours" model_version_policy {{ specific {{ versions: 2 }} }} '
        'version_labels { key: "stable" value: 2 }',
    )
    server = start_server(tmp_path / "none", "--model-config-file", str(file))
    server.wait_for("/readyz")
    (status,) = httpx.get(server.url + "/v1/models/rgb").json()["model_version_status"]
    assert (status["version"], status["state"]) == ("2", "AVAILABLE")
    assert httpx.get(server.url + "/v1/models/rgb/labels/stable/metadata").json()["model_spec"]["version"] == "2"
    assert httpx.get(server.url + "/v1/models/colours").status_code == 404


def test_an_invalid_config_file_ends_the_service(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    file = write(tmp_path / "models.config", 'name: "m" base_path: "relative"')
    server = start_server(tmp_path / "none", "--model-config-file", str(file))
    assert server.process.wait(timeout=60) == 1
    assert "expected an absolute base_path, got 'relative'" in server.log
    assert "Traceback" not in server.log

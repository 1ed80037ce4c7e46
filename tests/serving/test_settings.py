from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from serving.errors import StartupError
from serving.settings import Settings


def test_the_defaults_are_valid_and_fixed() -> None:
    settings = Settings(models_dir=Path("models"))
    assert settings.rest_port == 8501
    with pytest.raises(FrozenInstanceError):
        settings.rest_port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rest_port", -1),
        ("rest_port", 65_536),
        ("threads", 0),
        ("max_request_bytes", 0),
        ("max_image_pixels", -1),
        ("max_image_pixels", 10**12),
        ("max_image_side", 0),
        ("max_image_side", 10**7),
        ("max_images", 0),
        ("drain_timeout_s", 0),
        ("grpc_port", -1),
        ("workers", 0),
        ("workers", "many"),
        ("poll_interval_s", 0.0),
        ("max_batch_size", 0),
        ("max_queue_size", 0),
        ("log_level", "loud"),
        ("rate_limit", 0.0),
        ("url_prefix", "models-api"),
        ("url_prefix", "/models-api/"),
        ("url_prefix", "/a b"),
    ],
)
def test_values_out_of_range_are_refused_by_their_flag(name: str, value: Any) -> None:
    with pytest.raises(StartupError) as refused:
        Settings(models_dir=Path("models"), **{name: value})
    assert "--" + name.replace("_", "-") in str(refused.value)
    assert str(value) in str(refused.value)


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"remote": "h:1", "model_config_file": Path("x")}, "--model-config-file"),
        ({"remote_models": ("m",)}, "--remote"),
        ({"rest_port": 8500}, "--grpc-port"),
        ({"tls_cert": Path("cert.pem")}, "--tls-key"),
        ({"tls_key": Path("key.pem")}, "--tls-cert"),
        ({"verify_key": Path("key.pem"), "remote": "h:1"}, "--verify-key"),
        ({"tls_client_ca": Path("ca.pem")}, "--tls-cert"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], flag: str) -> None:
    with pytest.raises(StartupError, match=flag):
        Settings(models_dir=Path("models"), **values)

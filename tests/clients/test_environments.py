"""Clients of others in environments of their own, where `make test-clients` has created these."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import serving
from tests.clients.environments import ENVIRONMENTS, FOLDER, LIGHT_CLIENTS, PROJECT, Environment


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda environment: environment.name)
def test_a_client_in_its_environment(environment: Environment, request: pytest.FixtureRequest) -> None:
    if not environment.is_installed:
        pytest.skip(f"{environment.name} has no environment; make test-clients creates it")
    service: serving.Server = request.getfixturevalue("service")
    image_file: Path = request.getfixturevalue("image_file")
    done = environment.run(service.url, service.grpc_address, image_file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_environment_has_a_script_and_exact_versions() -> None:
    assert {environment.script for environment in ENVIRONMENTS} == set((FOLDER / "scripts").glob("*.py"))
    for environment in ENVIRONMENTS:
        for line in environment.requirements.read_text().splitlines():
            assert re.fullmatch(r"[a-z0-9._-]+==[^ ]+( ; .+)?", line), line


def test_the_page_names_the_tested_versions() -> None:
    page = (PROJECT / "docs" / "clients.md").read_text()
    rows = {
        row[0].split("`")[1].split("[")[0]: row[1].strip() for row in re.findall(r"^\| (`.+?) \| (.+?) \|", page, re.M)
    }
    locked = dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", (PROJECT / "requirements.lock").read_text(), re.M))
    beside_the_service = {name: locked[name] for name in LIGHT_CLIENTS}
    separate = {environment.name: environment.version for environment in ENVIRONMENTS}
    assert rows == beside_the_service | separate == separate | beside_the_service  # tritonclient is in both

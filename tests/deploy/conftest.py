"""Fixtures of tests/serving."""

from tests.serving.conftest import app, colours

__all__ = ["app", "colours"]

"""Serves Keras models, exported as SavedModels, over HTTP and gRPC. Independent of how they were trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from image_formats import __version__

if TYPE_CHECKING:
    from serving.app import create_app
    from serving.errors import StartupError
    from serving.server import serve
    from serving.server_process import Server
    from serving.settings import Settings

__all__ = ["Server", "Settings", "StartupError", "__version__", "create_app", "serve"]

_MODULES = {
    "Server": "serving.server_process",
    "Settings": "serving.settings",
    "StartupError": "serving.errors",
    "create_app": "serving.app",
    "serve": "serving.server",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that importing one module does not import the whole service."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)

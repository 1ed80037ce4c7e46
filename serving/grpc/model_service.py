"""`tensorflow.serving.ModelService`: GetModelStatus and HandleReloadConfigRequest.

After `apis/model_service.proto`, `model_servers/get_model_status_impl.cc` and `model_service_impl.cc`.
"""

from __future__ import annotations

import logging
from typing import Any

from tensorflow.core.protobuf import error_codes_pb2
from tensorflow_serving.apis import get_model_status_pb2, model_management_pb2

from serving.errors import InvalidRequest, ServingError
from serving.inference.model_config import read_config
from serving.inference.repository import ModelRepository, VersionStatus

logger = logging.getLogger(__name__)


class ModelService:
    """Tells what became of a repository's models, and changes which they are."""

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository

    def get_model_status(self, request: Any, _: float | None) -> Any:
        """Tell the state of each version of a model, or of the one asked for."""
        reply = get_model_status_pb2.GetModelStatusResponse()
        for version in self._find_versions(request):
            _describe(reply.model_version_status.add(), version)
        return reply

    def handle_reload_config_request(self, request: Any, _: float | None) -> Any:
        """Serve exactly the models of the request's configuration; answers when they are loaded."""
        try:
            configs = read_config(request.config)
            logger.info("new configuration: %s", ", ".join(config.name for config in configs) or "no models")
            self._repository.reload(configs)
        except ServingError:
            logger.error("the new configuration cannot be served as a whole")
            raise
        reply = model_management_pb2.ReloadConfigResponse()
        reply.status.SetInParent()
        return reply

    def _find_versions(self, request: Any) -> list[VersionStatus]:
        if not request.HasField("model_spec"):
            raise InvalidRequest("Missing ModelSpec")
        spec = request.model_spec
        return self._repository.versions(spec.name, spec.version.value if spec.HasField("version") else None)


def _describe(status: Any, version: VersionStatus) -> None:
    status.version = version.version
    status.state = get_model_status_pb2.ModelVersionStatus.State.Value(version.state)
    status.status.error_code = error_codes_pb2.Code.Value(version.error_code)
    status.status.error_message = version.error_message

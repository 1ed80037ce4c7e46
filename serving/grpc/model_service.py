"""`tensorflow.serving.ModelService`: GetModelStatus and HandleReloadConfigRequest.

After `apis/model_service.proto`, `model_servers/get_model_status_impl.cc` and `model_service_impl.cc`.
"""

from __future__ import annotations

import logging
from typing import Any

from tensorflow_serving.apis import model_management_pb2

from serving.errors import InvalidRequest, ServingError
from serving.inference.model_config import read_config
from serving.inference.service import InferenceService
from serving.tfs_messages import make_status

logger = logging.getLogger(__name__)


class ModelService:
    """Reports the state of the models, and replaces the served models."""

    def __init__(self, inference: InferenceService) -> None:
        self._inference = inference

    def get_model_status(self, request: Any) -> Any:
        """Return the state of all versions of a model, or of the requested version."""
        if not request.HasField("model_spec"):
            raise InvalidRequest("Missing ModelSpec")
        spec = request.model_spec
        number = spec.version.value if spec.HasField("version") else None
        return make_status(self._inference.status(spec.name, number))

    def handle_reload_config_request(self, request: Any) -> Any:
        """Serve exactly the models of the new configuration; responds when they are loaded."""
        try:
            configs = read_config(request.config)
            logger.info("new configuration: %s", ", ".join(config.name for config in configs) or "no models")
            self._inference.repository.reload(configs)
        except ServingError:
            logger.error("the new configuration could not be fully applied")
            raise
        response = model_management_pb2.ReloadConfigResponse()
        response.status.SetInParent()
        return response

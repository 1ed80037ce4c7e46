"""Builds the model repository from the settings: models in this process with batching, or on a remote server."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

from serving.errors import StartupError
from serving.images.inspection import ImageInspector, InspectedPredictor
from serving.inference.batcher import Batcher
from serving.inference.liveness import Liveness
from serving.inference.local import LocalRepository
from serving.inference.model_config import ModelConfig, ModelsFolder, has_versions, read_config_file
from serving.inference.repository import ModelRepository
from serving.inference.row_independence import find_dependent_signatures
from serving.inference.saved_model import SavedModelPredictor
from serving.inference.signatures import Predictor
from serving.metrics import Metrics
from serving.settings import Settings


def make_repository(settings: Settings, metrics: Metrics, liveness: Liveness) -> ModelRepository:
    """Make the model repository; its models are not loaded yet.

    Raises:
        StartupError: the models folder does not exist, or the model config is invalid.
    """
    inspector = ImageInspector(settings.image_limits)
    if settings.remote:
        from serving.inference.remote import RemoteRepository

        def inspect(model: str, predictor: Predictor) -> Predictor:
            return InspectedPredictor(metrics.time_predictor(model, predictor), inspector)

        return RemoteRepository(
            settings.remote,
            name_remote_models(settings),
            required=settings.require_models,
            wrap_predictor=inspect,
        )

    def batch(model: str, predictor: Predictor, unbatched: Collection[str]) -> Predictor:
        return Batcher(
            metrics.time_predictor(model, predictor),
            max_batch_rows=settings.max_batch_size,
            max_queued_rows=settings.max_queue_size,
            concurrency=settings.concurrency,
            liveness=liveness,
            inspect=inspector.inspect,
            unbatched=unbatched,
        )

    if settings.model_config_file:
        listed = read_config_file(settings.model_config_file)
        configs: Callable[[], Sequence[ModelConfig]] = lambda: listed  # noqa: E731
    else:
        configs = ModelsFolder(settings.models_dir)
    load = partial(SavedModelPredictor, intra_op_threads=settings.intra_op_threads)
    return LocalRepository(
        configs,
        required=settings.require_models,
        load_predictor=load,
        find_dependent=find_dependent_signatures,
        wrap_predictor=batch,
    )


def name_remote_models(settings: Settings) -> tuple[str, ...]:
    """Return the models to serve from the remote server: the configured names, otherwise those in the models folder.

    Raises:
        StartupError: no name is configured, and the models folder does not exist or is empty.
    """
    if settings.remote_models:
        return settings.remote_models
    try:
        names = tuple(config.name for config in ModelsFolder(settings.models_dir)() if has_versions(config))
        if not names:
            raise StartupError(f"no model in {settings.models_dir}")
        return names
    except (OSError, StartupError) as error:
        raise StartupError(
            f"{settings.remote} cannot list its models: name each model with --remote-model ({error})"
        ) from error

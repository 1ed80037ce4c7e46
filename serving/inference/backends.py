"""The models that the settings ask for: in this process, behind a batcher each, or at another server."""

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
    """Make the repository of the models; none is loaded yet.

    Raises:
        StartupError: there is no models folder, or the model config cannot be used.
    """
    inspector = ImageInspector(settings.image_limits)
    if settings.remote:
        from serving.inference.remote import RemoteRepository

        def limit(model: str, predictor: Predictor) -> Predictor:
            return InspectedPredictor(metrics.time_predictor(model, predictor), inspector)

        return RemoteRepository(
            settings.remote,
            name_remote_models(settings),
            required=settings.require_models,
            wrap_predictor=limit,
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
    """Return the models to ask the remote server for: those named, else those in the folder that both can see.

    Raises:
        StartupError: none is named, and there is no such folder, or no model in it.
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
            f"which models to ask {settings.remote} for? It cannot list them: name each with --remote-model ({error})"
        ) from error

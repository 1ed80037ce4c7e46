"""The messages between the supervisor and its workers; see `Channel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serving.inference.model_config import ModelConfig
from serving.inference.model_info import ModelInfo
from serving.inference.repository import FolderProblem, LoadCounts, VersionStatus
from serving.inference.version_loader import WarmUp
from serving.metrics.snapshot import Snapshot
from serving.settings import Settings


@dataclass(frozen=True)
class Setup:
    """What a worker is told first: its number of how many, its index in the table of connections, its settings."""

    number: int
    count: int
    index: int
    settings: Settings
    connection_age_s: float  # see `GrpcServer`


@dataclass(frozen=True)
class Served:
    """A version that every worker serves: the number of its load, its model info and its signatures without batches."""

    load: int
    info: ModelInfo
    unbatched: frozenset[str]

    def has_same_batcher(self, other: Served) -> bool:
        """Return True if only the model info can differ."""
        return (self.load, self.unbatched) == (other.load, other.unbatched)


@dataclass(frozen=True)
class State:
    """What all workers serve and report, as in `ModelRepository`."""

    is_loaded: bool = False
    names: tuple[str, ...] = ()
    labels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    statuses: Mapping[str, Mapping[int, VersionStatus]] = field(default_factory=dict)
    folder_problems: tuple[FolderProblem, ...] = ()
    load_counts: Mapping[str, LoadCounts] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)  # of the models without an available version
    versions: Mapping[str, Mapping[int, Served]] = field(default_factory=dict)


# From the supervisor to a worker. The replies to `Load` and `WarmUpAgain` are `LoadReport` and `WarmUp`.


@dataclass(frozen=True)
class Connect:
    """The reply says that the worker takes messages. Until then its imports may take long."""


@dataclass(frozen=True)
class Load:
    """Load and warm up a version, without serving it."""

    number: int
    path: Path


@dataclass(frozen=True)
class WarmUpAgain:
    """Replay the warm-up records of a loaded version."""

    load: int
    path: Path


@dataclass(frozen=True)
class LoadReport:
    """What a worker tells about a version that it has loaded."""

    warmup: WarmUp
    label_names: tuple[str, ...]
    load_s: float
    warmup_s: float


@dataclass(frozen=True)
class Drop:
    """Forget a loaded version that will not be served."""

    load: int


@dataclass(frozen=True)
class Apply:
    """Serve this; the reply says that it is in effect."""

    state: State


@dataclass(frozen=True)
class Accept:
    """Accept connections: everything that the others serve is loaded."""


@dataclass(frozen=True)
class TakeSnapshot:
    """Return a `Snapshot` of the metrics. With `forget`, at a scrape, remove the series of versions that have gone."""

    forget: bool


@dataclass(frozen=True)
class Retire:
    """End without a failed request: another worker has taken over."""


# From a worker to the supervisor.


@dataclass(frozen=True)
class Beat:
    """The event loop runs. `problem` is that of the liveness check."""

    problem: str | None


@dataclass(frozen=True)
class Serving:
    """Connections to both ports are accepted."""


@dataclass(frozen=True)
class Failed:
    """The service cannot start, for a reason that the user can mend."""

    reason: str


@dataclass(frozen=True)
class Released:
    """The last request of an unloaded version has ended, and its memory is free."""

    load: int


@dataclass(frozen=True)
class Push:
    """The latest metrics, which count when the worker has ended."""

    snapshot: Snapshot


@dataclass(frozen=True)
class ReadOthers:
    """Return the snapshots of the other workers, and of those that have ended.

    `known` are the models and versions whose series stay; None if this is no scrape.
    """

    known: frozenset[tuple[str, int | None]] | None


@dataclass(frozen=True)
class Reload:
    """`ModelRepository.reload`, in all workers."""

    configs: Sequence[ModelConfig]


@dataclass(frozen=True)
class LoadModel:
    """`ModelRepository.load_model`, in all workers."""

    name: str


@dataclass(frozen=True)
class UnloadModel:
    """`ModelRepository.unload_model`, in all workers."""

    name: str

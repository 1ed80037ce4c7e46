"""Training with several replicas of a model: devices of this process, or worker processes that `TF_CONFIG` lists.

Every replica computes the gradients of its part of each batch. Their sum updates every replica, so that the batch size
is that of all replicas together, and the weights are equal everywhere. The first worker is the chief: it alone reads
and writes the run directory, evaluates and exports.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.errors import ClusterError

if TYPE_CHECKING:
    import tensorflow as tf

    from training.config import TrainingConfig

# TensorFlow is imported by the functions that need it: the command line reads TF_CONFIG before.

_EXAMPLE = '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}'


@dataclass(frozen=True)
class Cluster:
    """The worker processes of a run, as "host:port", and the index of this one."""

    workers: tuple[str, ...]
    index: int

    @property
    def is_chief(self) -> bool:
        """Whether this process reads and writes the run directory."""
        return self.index == 0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Cluster:
        """Read the environment variable `TF_CONFIG`.

        Raises:
            ClusterError: it is missing or invalid.
        """
        text = environ.get("TF_CONFIG")
        if not text:
            raise ClusterError(
                f"--strategy multiworker needs the environment variable TF_CONFIG in each worker, such as {_EXAMPLE}"
            )
        try:
            values = json.loads(text)
            workers, task = values["cluster"]["worker"], values["task"]
            kind, index = task["type"], int(task["index"])
            if not isinstance(workers, list) or not all(isinstance(worker, str) for worker in workers):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ClusterError(f"TF_CONFIG is invalid: expected JSON such as {_EXAMPLE}, got {text[:200]}") from None
        if set(values["cluster"]) != {"worker"} or kind != "worker":
            raise ClusterError("TF_CONFIG may only have tasks of the type worker; the first worker is the chief")
        if len(workers) < 2 or len(set(workers)) < len(workers):
            raise ClusterError(f"TF_CONFIG must list at least two different workers, got {workers}")
        if not 0 <= index < len(workers):
            raise ClusterError(f"TF_CONFIG lists {len(workers)} workers, so the index is below that, not {index}")
        return cls(tuple(workers), index)


class Distribution:
    """The replicas of a run.

    Attributes:
        strategy: of TensorFlow; the default one if there is a single replica.
        replicas: their number, in all workers.
        own: the indices of the replicas of this process.
        is_chief: whether this process reads and writes the run directory.
    """

    def __init__(self, strategy: tf.distribute.Strategy, *, cluster: Cluster | None = None) -> None:
        self.strategy = strategy
        self.replicas: int = strategy.num_replicas_in_sync
        own = self.replicas // (len(cluster.workers) if cluster else 1)
        first = cluster.index * own if cluster else 0
        self.own = range(first, first + own)
        self.is_chief = cluster is None or cluster.is_chief

    @classmethod
    def of(cls, config: TrainingConfig) -> Distribution:
        """Make the distribution of a run; with several workers, wait until all of them are started.

        Raises:
            ClusterError: `TF_CONFIG` is missing or invalid.
            tf.errors.OpError: a worker cannot be reached; see `explain_lost_workers`.
        """
        import tensorflow as tf

        if config.strategy == "multiworker":
            cluster = Cluster.from_environment()
            return cls(tf.distribute.MultiWorkerMirroredStrategy(), cluster=cluster)
        if config.strategy == "mirrored":
            devices = [device.name for kind in ("GPU", "CPU") for device in tf.config.list_logical_devices(kind)]
            gpus = [name for name in devices if "GPU" in name]
            return cls(tf.distribute.MirroredStrategy(gpus or devices))
        return cls(tf.distribute.get_strategy())

    def check_batches(self, *, images: int, batch_size: int) -> None:
        """Raise `ClusterError` if a batch has fewer images than there are replicas."""
        last = images % batch_size or batch_size
        if min(last, batch_size) < self.replicas:
            raise ClusterError(
                f"each of the {self.replicas} replicas needs an image of every batch, but the last of an epoch has "
                f"{last} (of {images:,} images): choose another --batch-size"
            )

    def distribute(self, parts: tf.data.Dataset) -> Any:
        """Return the batches of this process: of each global batch, `parts` has one part for each of its replicas."""
        if len(self.own) == 1:
            return parts
        return self.strategy.distribute_datasets_from_function(lambda _: parts)

    def broadcast(self, values: Sequence[Any]) -> list[Any]:
        """Return the chief's `values`, numbers or arrays, in every worker."""
        import tensorflow as tf

        def add(*own: tf.Tensor) -> list[tf.Tensor]:
            context = tf.distribute.get_replica_context()
            is_source = context.replica_id_in_sync_group == 0
            sent = [tf.where(is_source, value, tf.zeros_like(value)) for value in own]
            return [context.all_reduce(tf.distribute.ReduceOp.SUM, value) for value in sent]

        tensors = tuple(tf.convert_to_tensor(value) for value in values)
        sums = self.strategy.run(tf.function(add), args=tensors)
        return [self.strategy.experimental_local_results(value)[0].numpy() for value in sums]

    def check_equal(self, digest: str) -> None:
        """Raise `ClusterError` unless all workers have the same hexadecimal `digest` of config and data."""
        if len(self.own) == self.replicas:
            return
        own = [int(digest[start : start + 7], 16) for start in range(0, 28, 7)]
        if (chief := [int(value) for value in self.broadcast(own)]) != own:
            raise ClusterError(
                "this worker has other settings or data than the chief: start all workers with the same command "
                f"({own} and {chief})"
            )


@contextlib.contextmanager
def explain_lost_workers() -> Iterator[None]:
    """Raise `ClusterError` for the errors of TensorFlow when a worker has ended or cannot be reached."""
    import tensorflow as tf

    lost = (
        tf.errors.UnavailableError,
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.DeadlineExceededError,
    )
    try:
        yield
    except lost as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ClusterError(
            f"another worker has ended or cannot be reached ({reason}). Start all workers again; the chief with "
            "--resume and the run directory continues after the last complete epoch"
        ) from error

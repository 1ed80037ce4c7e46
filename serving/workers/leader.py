"""The supervisor's part in serving versions: it decides what is served, and all workers load and switch together.

`LeadingRepository` polls the folders as in a single process. Where that would load a version, every worker loads it;
where that would make versions available, every worker is told to serve them, and has done so before the next step.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from typing_extensions import override

from serving.errors import ModelLoadError
from serving.inference.local import LocalRepository
from serving.inference.model_config import ModelConfig
from serving.inference.signatures import Predictor, Signature
from serving.inference.statistics import CountedPredictor
from serving.inference.version_files import read_model_stamp
from serving.inference.version_loader import LoadedPredictor, WarmUp
from serving.workers.channel import ChannelClosed
from serving.workers.messages import Apply, Drop, Load, LoadReport, Served, State, WarmUpAgain

logger = logging.getLogger(__name__)

APPLY_TIMEOUT_S = 10.0  # for a worker to switch; one that does not is hung, and is replaced


class Member(Protocol):
    """A worker, as this module sees it."""

    number: int
    is_retiring: bool
    loads: set[int]  # numbers of the loads that it holds

    def post(self, message: Any) -> Future[Any]:
        """Send a message; see `Channel.post`."""


class JoinFailed(Exception):  # noqa: N818 - named for the condition
    """A worker cannot load the version in the folder `path`."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(reason)
        self.path = path


class LoadedInWorkers:
    """Stands for a predictor that all workers have loaded."""

    def __init__(self, load: int, unbatched: Collection[str], label_names: tuple[str, ...] = ()) -> None:
        self.load = load
        self.unbatched = frozenset(unbatched)
        self.label_names = label_names
        self.signatures: Mapping[str, Signature] = {}

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """Not possible: requests are served by the workers."""
        raise NotImplementedError


class Members:
    """The workers that serve. All of them hold the same versions; a `VersionLoader` for all of them. Thread-safe."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._changed = threading.Condition(threading.RLock())
        self._members: list[Member] = []
        self._required: dict[int, Path] = {}  # loads that every member has
        self._held: dict[int, LoadedInWorkers] = {}  # versions that a worker still holds
        self._state = State()

    def join(self, worker: Member) -> None:
        """Let a worker load what the others have loaded, and make it a member.

        Raises:
            ChannelClosed: it has ended.
            JoinFailed: it cannot load a version that the others serve.
            TimeoutError: it hangs.
        """
        while True:
            with self._changed:
                missing = {number: path for number, path in self._required.items() if number not in worker.loads}
                if not missing:
                    worker.post(Apply(self._state)).result(APPLY_TIMEOUT_S)
                    self._members.append(worker)
                    self._changed.notify_all()
                    return
            for number, path in missing.items():
                try:
                    worker.post(Load(number, path)).result()
                except ModelLoadError as error:
                    raise JoinFailed(path, str(error)) from error
                worker.loads.add(number)

    def leave(self, worker: Member) -> None:
        """Forget a worker that has ended."""
        with self._changed:
            if worker in self._members:
                self._members.remove(worker)
            held, worker.loads = worker.loads, set()
            for number in held:
                self._release_unheld(number)

    def release(self, worker: Member, load: int) -> None:
        """Note that a worker holds a version no longer."""
        with self._changed:
            worker.loads.discard(load)
            self._release_unheld(load)

    def hold(self, served: LoadedInWorkers) -> None:
        """Keep a version referenced for as long as a worker holds it, so that it is unloading until then."""
        with self._changed:
            self._held[served.load] = served

    def _release_unheld(self, load: int) -> None:
        if load not in self._required and not any(load in member.loads for member in self._members):
            self._held.pop(load, None)

    def load(self, path: Path) -> LoadedPredictor:
        """Load a version in every member: in one first, because a version may end the process that loads it.

        Raises:
            ModelLoadError: a member cannot load it, or has ended meanwhile, or the files have changed meanwhile.
        """
        for unserved in self._required.keys() - self._held.keys():  # loaded, but then rejected
            self._drop(unserved)
        number, stamp = next(self._numbers), read_model_stamp(path)
        reports: list[LoadReport] = []
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._members)
                missing = [member for member in self._members if number not in member.loads]
                if not missing:
                    self._required[number] = path
                    break
            try:
                reports += self._load(number, path, missing if reports else missing[:1])
            except ModelLoadError:
                self._drop(number)
                raise
        if read_model_stamp(path) != stamp:
            self._drop(number)
            raise ModelLoadError(f"{path} changed while it was loaded; it will be loaded again")
        first = reports[0]
        predictor = LoadedInWorkers(number, first.warmup.unbatched, first.label_names)
        return LoadedPredictor(
            predictor, first.warmup, max(each.load_s for each in reports), max(each.warmup_s for each in reports)
        )

    def _load(self, number: int, path: Path, members: Sequence[Member]) -> list[LoadReport]:
        reports = []
        for member, future in [(member, member.post(Load(number, path))) for member in members]:
            try:
                reports.append(future.result())
                member.loads.add(number)
            except ChannelClosed:
                if not member.is_retiring:
                    raise ModelLoadError(f"worker {member.number} ended while it loaded {path}") from None
        return reports

    def _drop(self, number: int) -> None:
        with self._changed:
            self._required.pop(number, None)
            for member in self._members:
                member.loads.discard(number)
                member.post(Drop(number))

    def warm_up(self, path: Path, predictor: Predictor) -> WarmUp:
        """See `VersionLoader.warm_up`."""
        assert isinstance(predictor, LoadedInWorkers)
        with self._changed:
            members = tuple(self._members)
        warmups: list[WarmUp] = []
        for future in [member.post(WarmUpAgain(predictor.load, path)) for member in members]:
            try:
                warmups.append(future.result())
            except ChannelClosed:
                continue
        if not warmups:
            raise ModelLoadError(f"no worker could replay the warm-up records of {path}")
        return warmups[0]

    def read_label_names(self, predictor: Predictor) -> tuple[str, ...]:
        """See `VersionLoader.read_label_names`."""
        assert isinstance(predictor, LoadedInWorkers)
        return predictor.label_names

    def apply(self, make_state: Callable[[], State]) -> None:
        """Tell all members what to serve, unless that is unchanged, and wait until it is in effect."""
        with self._changed:
            state = make_state()
            if state == self._state:
                return
            self._state = state
            served = {each.load for versions in state.versions.values() for each in versions.values()}
            for number in self._required.keys() & self._held.keys() - served:
                del self._required[number]
                self._release_unheld(number)
            for member, future in [(member, member.post(Apply(state))) for member in self._members]:
                try:
                    future.result(APPLY_TIMEOUT_S)
                except ChannelClosed:
                    continue
                except TimeoutError:
                    logger.error("worker %d does not switch its versions", member.number)


class LeadingRepository(LocalRepository):
    """The repository of the supervisor: what it serves, all `members` serve."""

    def __init__(self, configs: Callable[[], Sequence[ModelConfig]], members: Members, **options: Any) -> None:
        self._members = members
        super().__init__(configs, loader=members, wrap_predictor=self._wrap, **options)

    def _wrap(self, _: str, counted: Predictor, unbatched: Collection[str]) -> Predictor:
        assert isinstance(counted, CountedPredictor)
        loaded = counted.inner
        assert isinstance(loaded, LoadedInWorkers)
        served = LoadedInWorkers(loaded.load, unbatched, loaded.label_names)
        self._members.hold(served)
        return served

    def unload_failed(self, path: Path) -> None:
        """Stop serving the version in a folder, because no worker is left that could load it again."""
        with self._update_lock:
            for (name, version), loaded in tuple(self._loaded_versions.items()):
                if loaded.path == path:
                    self._unload(name, keep=set(self._available.get(name, ())) - {version})

    @override
    def _on_change(self) -> None:
        """Tell the workers what this repository serves and reports, if that has changed, and wait until they do."""
        self._members.apply(self._make_state)

    def _make_state(self) -> State:
        versions: dict[str, dict[int, Served]] = {}
        for name, available in self._available.items():
            for number, version in available.items():
                assert isinstance(version.predictor, LoadedInWorkers)
                served = Served(version.predictor.load, version.info, version.predictor.unbatched)
                versions.setdefault(name, {})[number] = served
        return State(
            is_loaded=self._loaded,
            names=self._names,
            labels=self._labels,
            statuses=self._statuses,
            folder_problems=self._folder_problems,
            load_counts=dict(self._load_counts),
            problems={name: self.problem(name) for name in self._names if name not in self._available},
            versions=versions,
        )

"""Fault isolation: of a valid and a faulty model or folder, only the faulty one is reported."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import httpx
import numpy as np
import pytest
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import get_model_status_pb2, model_service_pb2_grpc

from serving.access.model_folders import ModelFolders
from serving.api.flask_app import ServingApp
from serving.app import make_app
from serving.errors import ModelFailed
from serving.grpc.services import ModelService
from serving.inference.local import LocalRepository
from serving.inference.model_config import ModelConfig, ModelsFolder, VersionPolicy
from serving.inference.saved_model import SavedModelPredictor
from serving.inference.service import InferenceService
from serving.inference.signatures import Predictor
from serving.inference.version_loader import InProcessLoader
from serving.settings import Settings
from tests.serving.conftest import Server, picture

PAGES = ("/readyz", "/metrics", "/models.json", "/", "/v2/health/ready", "/v1/models/colours", "/healthz")
IMAGE = {"images": np.zeros((1, 32, 32, 3), np.uint8)}

Fault = Callable[[Path], None]  # damages a copy of a valid version


def write_info(text: str) -> Fault:
    def write(version: Path) -> None:
        (version / "assets.extra" / "model.json").write_text(text)

    return write


def edit_signature(edit: Callable[[Any], None]) -> Fault:
    def damage(version: Path) -> None:
        file = version / "saved_model.pb"
        saved_model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
        edit(saved_model.meta_graphs[0].signature_def["serving_default"])
        file.write_bytes(saved_model.SerializeToString())

    return damage


def set_dtype(number: int, *, of: str) -> Fault:
    def edit(signature: Any) -> None:
        for tensor in getattr(signature, of).values():
            tensor.dtype = number

    return edit_signature(edit)


def replace_file(name: str, make: Callable[[Path], object]) -> Fault:
    def replace(version: Path) -> None:
        file = version / name
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        make(file)

    return replace


# Fault and part of its error message, by name.
NOT_SERVED: dict[str, tuple[Fault, str]] = {
    "unknown input dtype": (set_dtype(250, of="inputs"), "unknown dtype 250"),
    "unknown output dtype": (set_dtype(99, of="outputs"), "unknown dtype 99"),
    "tensor that is not in the graph": (edit_signature(lambda s: setattr(s.inputs["images"], "name", "no:0")), "no"),
    "tensor without a name": (edit_signature(lambda s: setattr(s.inputs["images"], "name", "")), "cannot load"),
    "no variables": (replace_file("variables", Path.touch), "cannot load"),
    "no variables data": (replace_file("variables/variables.data-00000-of-00001", lambda _: None), "No such file"),
    "folder as saved_model.pb": (replace_file("saved_model.pb", Path.mkdir), "not a regular file"),
    "pipe as saved_model.pb": (replace_file("saved_model.pb", os.mkfifo), "not a regular file"),
    "loop as saved_model.pb": (replace_file("saved_model.pb", lambda p: p.symlink_to(p)), "symbolic links"),
    "empty saved_model.pb": (replace_file("saved_model.pb", Path.touch), "no graph"),
    "folder as warm-up records": (
        replace_file("assets.extra/tf_serving_warmup_requests", Path.mkdir),
        "not a regular file",
    ),
    "garbage as warm-up records": (
        replace_file("assets.extra/tf_serving_warmup_requests", lambda p: p.write_bytes(b"\xff" * 64)),
        "damaged",
    ),
    "loop as the version": (lambda v: replace_file(v.name, lambda p: p.symlink_to(p))(v.parent), "symbolic links"),
    "more nodes than there are": (
        edit_signature(lambda s: setattr(s.outputs["label"], "name", "label:9")),
        "cannot load",
    ),
    "nothing in the version": (lambda v: replace_file(v.name, Path.mkdir)(v.parent), "no saved_model.pb"),
}
SERVED_WITHOUT_INFO: dict[str, tuple[Fault, str]] = {
    "deep nesting": (write_info("[" * 100_000), "nested too deeply"),
    "deep nesting of objects": (write_info('{"a":' * 100_000), "nested too deeply"),
    "classes that are objects": (write_info('{"class_names": [{"a": 1}, {}, []]}'), "class_names must"),
    "a class that is huge": (write_info('{"class_names": [' + "9" * 5_000 + ', "b", "c"]}'), "model.json"),
    "accuracy that is not a number": (write_info('{"test": {"accuracy": NaN}}'), "test.accuracy must"),
    "everything of another type": (write_info('{"class_names": 1, "dataset": [], "test": "x"}'), "class_names must"),
    "folder as model.json": (replace_file("assets.extra/model.json", Path.mkdir), "not a regular file"),
    "pipe as model.json": (replace_file("assets.extra/model.json", os.mkfifo), "not a regular file"),
}
ALL = {**NOT_SERVED, **SERVED_WITHOUT_INFO}


def add_faulty(models_dir: Path, colours: Path, fault: Fault, name: str = "alpha") -> None:
    """Add a faulty model whose name sorts before `colours`, so that it is polled first."""
    shutil.copytree(colours, models_dir / name / "1")
    fault(models_dir / name / "1")


def publish(colours: Path, models_dir: Path, version: int) -> None:
    shutil.copytree(colours, models_dir / "colours" / ".partial")
    (models_dir / "colours" / ".partial").rename(models_dir / "colours" / str(version))


def grpc_status(repository: Any, name: str) -> Any:
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = name
    service = ModelService(InferenceService(repository, max_rows=1), ModelFolders([]))
    return service.get_model_status(request).model_version_status


def assert_pages(app: ServingApp) -> None:
    """Every page is available, and neither pages nor errors contain paths of the server."""
    client = app.test_client()
    hidden = str(app.settings.models_dir.parent)
    for page in PAGES:
        response = client.get(page)
        assert response.status_code == 200, page
        assert hidden not in response.text, page
    for name in app.inference.repository.all_names():
        for page in (f"/v1/models/{name}", f"/v1/models/{name}/metadata", f"/v2/models/{name}/ready"):
            assert hidden not in client.get(page).text, page
        response = client.post(f"/predict?model={quote(name)}", data=b"x", content_type="image/png")
        assert hidden not in response.text


@pytest.mark.timeout(120)
@pytest.mark.parametrize("when", ["at the start", "later"])
@pytest.mark.parametrize("case", ALL)
def test_only_the_faulty_model_is_reported(models_dir: Path, colours: Path, case: str, when: str) -> None:
    fault, error = ALL[case]
    app = make_app(Settings(models_dir=models_dir))
    repository = app.inference.repository
    if when == "at the start":
        add_faulty(models_dir, colours, fault)
        app = make_app(Settings(models_dir=models_dir))
        repository = app.inference.repository
        repository.load()
    else:
        repository.load()
        add_faulty(models_dir, colours, fault)
        repository.poll()
    assert_pages(app)
    publish(colours, models_dir, 11)
    repository.poll()
    assert repository.resolve("colours").version == 11
    assert repository.resolve("colours").predictor.predict("serving_default", IMAGE)["class_id"].shape == (1,)
    assert_pages(app)

    client = app.test_client()
    (shown,) = (model for model in (client.get("/readyz").json or {})["models"] if model["name"] == "alpha")
    assert error in shown["error"]
    (status,) = (client.get("/v1/models/alpha").json or {})["model_version_status"]
    assert error in status["status"]["error_message"]
    (over_grpc,) = grpc_status(repository, "alpha")
    assert error in over_grpc.status.error_message
    metrics = client.get("/metrics").text
    described = {model["name"]: model for model in client.get("/models.json").json or []}["alpha"]
    if case in NOT_SERVED:
        assert (shown["state"], repository.names()) == ("END", ["colours"])
        assert error in described["problem"]
        assert 'serving_model_version_error{code="' in metrics
    else:
        assert (shown["state"], described["problem"]) == ("AVAILABLE", None)
        assert repository.resolve("alpha").predictor.predict("serving_default", IMAGE)["class_id"].shape == (1,)
        assert 'serving_model_version_warning{kind="model_info",model="alpha",version="1"} 1.0' in metrics


@pytest.mark.parametrize(
    "info",
    [
        r'{"class_names": ["\ud800", "\udcff", "blue"], "dataset": {"name": "a\ude00"}, "\udfff": "\ud800"}',
        r'{"class_names": ["\ud83d", "\ud83d\ude00", "\ude00\ud83d"], "dataset": {"name": "\udfff\ud800"}}',
        r'{"class_names": {"\udc80": "\ud800"}, "dataset": "\udcff", "test": "\ud800"}',
    ],
    ids=["names", "halves", "wrong types"],
)
@pytest.mark.parametrize("when", ["at the start", "later"])
def test_lone_surrogates_in_a_model_info_do_no_harm(models_dir: Path, colours: Path, info: str, when: str) -> None:
    app = make_app(Settings(models_dir=models_dir))
    repository = app.inference.repository
    if when == "later":
        repository.load()
    add_faulty(models_dir, colours, write_info(info))
    repository.poll() if when == "later" else repository.load()
    assert_pages(app)
    client = app.test_client()
    described = {model["name"]: model for model in client.get("/models.json").json or []}
    assert described.keys() == {"alpha", "colours"}
    names = described["alpha"]["class_names"]
    for page in ("/", "/models.json", "/readyz", "/metrics", "/v1/models/alpha", "/v2/models/alpha"):
        response = client.get(page)
        assert response.status_code == 200, page
        response.data.decode("utf-8")  # strictly
    response = client.post("/predict?model=alpha", data=picture("blue"), content_type="image/png")
    (prediction,) = (response.json or {})["predictions"]
    assert prediction["label"] == "blue"
    assert len(prediction["probabilities"]) == 3
    if '"class_names": [' in info:
        assert list(prediction["probabilities"]) == names
        assert any("\\ud8" in name for name in names)  # shown with escapes, not dropped


def test_a_signature_with_too_many_classes_does_not_affect_others(models_dir: Path, colours: Path) -> None:
    def edit(signature: Any) -> None:
        signature.outputs["probabilities"].tensor_shape.dim[1].size = 10**12

    add_faulty(models_dir, colours, edit_signature(edit))
    app = make_app(Settings(models_dir=models_dir))
    app.inference.repository.load()
    assert_pages(app)


def test_unsupported_dtypes_do_not_affect_other_signatures(models_dir: Path, colours: Path) -> None:
    for name, number in (("alpha", 14), ("beta", 20), ("gamma", 21)):  # bfloat16, resource, variant
        add_faulty(models_dir, colours, set_dtype(number, of="inputs"), name)
        add_faulty(models_dir, colours, set_dtype(number, of="outputs"), name + "-out")
    app = make_app(Settings(models_dir=models_dir))
    app.inference.repository.load()
    assert_pages(app)
    assert app.inference.repository.resolve("colours").version == 10


ERRORS = [
    MemoryError(),
    RecursionError("maximum recursion depth exceeded"),
    OSError(5, "Input/output error"),
    KeyError("x"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ValueError("\ud800 \udcff"),
    AssertionError(),
    ModelFailed("no memory", code="RESOURCE_EXHAUSTED"),
    SystemExit(3),
    GeneratorExit(),
]


@pytest.mark.parametrize(
    ("where", "error"),
    [("load", error) for error in ERRORS]
    + [(where, ERRORS[i]) for where in ("warm-up", "wrap", "rows") for i in (0, -2)],
    ids=repr,
)
def test_any_exception_during_loading_affects_only_its_model(
    models_dir: Path, colours: Path, adder: Path, error: BaseException, where: str
) -> None:
    shutil.copytree(colours, models_dir / "alpha" / "1")
    shutil.copytree(adder, models_dir / "zeta" / "1")

    def fail_in(place: str, name: str) -> None:
        if place == where and name == "alpha":
            raise error

    class Failing(SavedModelPredictor):
        def __init__(self, path: Path) -> None:
            self.name = path.parent.name
            fail_in("load", self.name)
            super().__init__(path)

        def predict(self, *args: Any, **options: Any) -> dict[str, np.ndarray]:
            fail_in("warm-up", self.name)
            return super().predict(*args, **options)

    def wrap(name: str, predictor: Predictor, _: Any) -> Predictor:
        fail_in("wrap", name)
        return predictor

    def find_dependent(path: Path, _: Predictor) -> tuple[str, ...]:
        fail_in("rows", path.parent.name)
        return ()

    repository = LocalRepository(
        ModelsFolder(models_dir), loader=InProcessLoader(Failing, find_dependent), wrap_predictor=wrap
    )
    app = make_app(Settings(models_dir=models_dir))
    app.inference.repository = repository
    repository.load()
    assert (repository.names(), repository.ready) == (["colours", "zeta"], True)
    (status,) = repository.versions("alpha")
    assert (status.state, bool(status.error_message), status.error_code == "OK") == ("END", True, False)
    assert len(grpc_status(repository, "alpha")) == 1
    assert_pages(app)
    publish(colours, models_dir, 11)
    repository.poll()
    assert repository.resolve("colours").version == 11


def make_unlistable(path: Path) -> None:
    path.mkdir()
    path.chmod(0)


FOLDERS: dict[str, tuple[bytes, Callable[[Path], object]]] = {
    "lost+found": (b"lost+found", make_unlistable),
    "unlistable": (b"alpha", make_unlistable),
    "loop": (b"alpha", lambda path: path.symlink_to(path)),
    "link to nowhere": (b"alpha", lambda path: path.symlink_to(path.parent / "nowhere")),
    "not UTF-8": (b"caf\xe9", lambda path: (path / "1").mkdir(parents=True)),
    "not UTF-8 and unlistable": (b"\xff\xfe", make_unlistable),
    "not UTF-8 link": (b"\xff\xfe", lambda path: path.symlink_to(path)),
}


@pytest.fixture
def as_user(models_dir: Path) -> Iterator[None]:
    """Run as the user `nobody`, because file permissions do not apply to root."""
    if os.geteuid() != 0:
        yield
        return
    above = [folder for folder in models_dir.parents if folder.is_relative_to(tempfile.gettempdir())]
    modes = {folder: stat.S_IMODE(folder.stat().st_mode) for folder in above}
    for folder, mode in modes.items():
        folder.chmod(mode | 0o011)
    for path in (models_dir.parent, *models_dir.parent.rglob("*")):
        os.chown(path, 65534, 65534)
    os.seteuid(65534)
    yield
    os.seteuid(0)
    for folder, mode in modes.items():
        folder.chmod(mode)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("when", ["at the start", "later"])
@pytest.mark.parametrize("case", FOLDERS)
def test_only_the_faulty_folder_is_reported(
    models_dir: Path, case: str, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, make = FOLDERS[case]
    folder = Path(os.fsdecode(os.fsencode(models_dir) + b"/" + name))
    app = make_app(Settings(models_dir=models_dir))
    repository = app.inference.repository
    if when == "at the start":
        make(folder)
        app = make_app(Settings(models_dir=models_dir))
        repository = app.inference.repository
        repository.load()
    else:
        repository.load()
        make(folder)
        repository.poll()
    (models_dir / "colours" / "2").rename(models_dir / "colours" / "11")
    repository.poll()
    repository.poll()
    try:
        assert repository.resolve("colours").version == 11
        assert repository.ready
        assert_pages(app)
        shown = name.decode("utf-8", "backslashreplace")
        client = app.test_client()
        ready = client.get("/readyz").json or {}
        errors = [each["error"] for each in ready["models"] if each["name"] == shown]
        errors += [each["error"] for each in ready["problems"] if each["model"] == shown]
        assert len(errors) == 1
        assert errors[0]
        assert {model["name"]: model["problem"] for model in client.get("/models.json").json or []}[shown]
        escaped = shown.replace("\\", "\\\\")
        assert f'model="{escaped}"' in client.get("/metrics").text
        said = [r.getMessage() for r in caplog.records if shown in r.getMessage() and r.levelname == "ERROR"]
        assert len(said) == 1  # not at every poll
        if not any(each["model"] == shown for each in ready["problems"]):
            (status,) = (client.get(f"/v1/models/{shown}").json or {})["model_version_status"]
            assert "not valid UTF-8" in status["status"]["error_message"]
            assert len(grpc_status(repository, shown)) == 1
        else:  # may not be a model
            assert repository.all_names() == ["colours"]
            assert client.post("/predict", data=picture("red"), content_type="image/png").status_code == 200
            response = client.get(f"/v1/models/{shown}")
            assert (response.status_code, errors[0] in (response.json or {})["error"]) == (404, True)
    finally:
        if folder.is_dir() and not folder.is_symlink():
            folder.chmod(0o755)


@pytest.mark.usefixtures("as_user")
def test_an_unlistable_version_is_reported(models_dir: Path) -> None:
    version, assets = models_dir / "colours" / "11", models_dir / "colours" / "10" / "assets.extra"
    make_unlistable(version)
    make_unlistable(models_dir / "colours" / "lost+found")
    app = make_app(Settings(models_dir=models_dir))
    repository = app.inference.repository
    repository.load()
    assert (repository.resolve("colours").version, repository.folder_problems) == (10, ())
    assert "Permission denied" in repository.versions("colours")[0].error_message
    assets.chmod(0)
    repository.poll()
    assert repository.resolve("colours").version == 10
    assert repository.versions("colours")[1].warnings == ("model_info", "warmup")
    assert_pages(app)
    for path in (version, assets, models_dir / "colours" / "lost+found"):
        path.chmod(0o755)
    repository.poll()
    assert repository.versions("colours")[1].warnings == ()


@pytest.mark.usefixtures("as_user")
def test_a_models_folder_that_is_unlistable_at_startup_is_polled(models_dir: Path) -> None:
    models_dir.chmod(0)
    app = make_app(Settings(models_dir=models_dir))
    repository = app.inference.repository
    repository.load()
    assert "the models folder cannot be read: Permission denied" in str(repository.not_ready_because)
    for page in ("/metrics", "/models.json", "/", "/healthz"):
        assert app.test_client().get(page).status_code == 200
    models_dir.chmod(0o755)
    repository.poll()
    assert repository.ready


@pytest.mark.usefixtures("as_user")
def test_an_unreadable_version_is_loaded_once_readable(models_dir: Path) -> None:
    """Permissions change neither size nor mtime, only ctime."""
    file = models_dir / "colours" / "10" / "saved_model.pb"
    file.chmod(0)
    repository = LocalRepository(ModelsFolder(models_dir))
    repository.load()
    assert repository.resolve("colours").version == 2
    assert "Permission denied" in repository.versions("colours")[0].error_message
    file.chmod(0o644)
    repository.poll()
    assert repository.resolve("colours").version == 10


def test_a_label_of_a_failed_version_does_not_end_the_service(models_dir: Path, adder: Path) -> None:
    shutil.copytree(adder, models_dir / "adder" / "1")
    (models_dir / "colours" / "10" / "saved_model.pb").write_bytes(b"")
    both = VersionPolicy(latest=None)
    repository = LocalRepository(
        lambda: [
            ModelConfig("a", models_dir / "adder"),
            ModelConfig("c", models_dir / "colours", both, {"new": 10, "old": 2}),
            ModelConfig("gone", models_dir / "gone", VersionPolicy(), {"stable": 1}),
        ]
    )
    repository.load()
    assert (repository.names(), repository.ready) == (["a", "c"], True)
    assert repository.resolve("c", label="old").version == 2
    assert "does not exist" in repository.problem("gone")


def test_the_process_serves_a_valid_model_beside_every_faulty_one(
    models_dir: Path, colours: Path, start_server: Callable[..., Server]
) -> None:
    def add(prefix: str) -> list[str]:
        names = []
        for number, (fault, _) in enumerate(ALL.values()):
            names.append(f"{prefix}{number}")
            add_faulty(models_dir, colours, fault, names[-1])
        folder = os.fsdecode(os.fsencode(models_dir / prefix) + b"\xe9")
        shutil.copytree(colours, f"{folder}/1")
        names.append(prefix + r"\xe9")
        return names

    names = add("a")
    server = start_server(models_dir, "--poll-interval-s", "0.1")
    server.wait_for("/readyz")
    names += add("b")
    publish(colours, models_dir, 11)
    server.wait_until(lambda: "colours version 11 is available" in server.log)
    server.wait_until(lambda: r"b\xe9 version 1 is not served" in server.log)
    image: dict[str, Any] = {"content": picture("blue"), "headers": {"Content-Type": "image/png"}}
    reply = httpx.post(server.url + "/predict?model=colours", **image).json()
    assert (reply["model"]["version"], reply["predictions"][0]["label"]) == (11, "blue")
    for page in PAGES:
        assert httpx.get(server.url + page).status_code == 200, page

    def read_errors() -> dict[str, Any]:
        return {model["name"]: model["error"] for model in httpx.get(server.url + "/readyz").json()["models"]}

    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)

        def shows_one_error(name: str) -> bool:
            request = get_model_status_pb2.GetModelStatusRequest()
            request.model_spec.name = name
            (status,) = stub.GetModelStatus(request, timeout=60).model_version_status
            return bool(status.status.error_message) and status.status.error_message == read_errors()[name]

        for name in names:
            # A version that is loaded, for the first time or again after a failure, has no error for that moment.
            server.wait_until(partial(shows_one_error, name))
            assert httpx.get(f"{server.url}/v1/models/{name}").status_code == 200
    assert json.loads(httpx.get(server.url + "/models.json").text)
    assert server.stop() == 0
    assert "updating model" not in server.log

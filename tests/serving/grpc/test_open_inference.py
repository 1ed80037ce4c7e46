"""`inference.GRPCInferenceService` on a real gRPC server in this process, beside the HTTP form of the same app."""

from __future__ import annotations

import base64
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from flask.testing import FlaskClient
from google.protobuf import json_format
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as triton_pb2

from serving.api.flask_app import ServingApp
from serving.app import make_app
from serving.errors import InvalidRequest
from serving.grpc.open_inference_messages import parse
from serving.grpc.protos import open_inference_pb2 as pb2
from serving.grpc.server import GrpcServer
from serving.inference.signatures import Signature, TensorSpec
from serving.server_process import free_ports
from serving.settings import Settings
from tests.serving.conftest import picture
from tests.serving.saved_models import DTYPES, save_colour_classifier, save_echo

pytestmark = pytest.mark.slow

PIXELS = np.random.default_rng(3).integers(0, 256, (2, 32, 32, 3), np.uint8)
MAX_BYTES = 2_000_000
METHODS = [method.name for method in pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods]
CONTENTS = {
    "BOOL": "bool",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int"),
    "INT64": "int64",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint"),
    "UINT64": "uint64",
    "FP32": "fp32",
    "FP64": "fp64",
    "BYTES": "bytes",
}


@dataclass(frozen=True)
class Served:
    app: ServingApp
    address: str
    channel: grpc.Channel
    gate: Path  # the model `gated` waits for this file

    @property
    def http(self) -> FlaskClient:
        return self.app.test_client()

    def call(self, method: str, request: Any, timeout: float = 60) -> Any:
        invoke = self.channel.unary_unary(
            f"/inference.GRPCInferenceService/{method}",
            request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            response_deserializer=getattr(pb2, f"{method}Response").FromString,
        )
        return invoke(request, timeout=timeout)

    def refusal(self, method: str, request: Any) -> tuple[str, str]:
        with pytest.raises(grpc.RpcError) as refused:
            self.call(method, request)
        return refused.value.code().name, refused.value.details()

    def infer_over_http(self, model: str, document: dict[str, Any]) -> dict[str, Any]:
        response = self.http.post(f"/v2/models/{model}/infer", json=document)
        assert response.status_code == 200, response.text
        return dict(response.json or {})

    def infer_over_both(self, request: Any, document: dict[str, Any]) -> dict[str, list[Any]]:
        """Send the same request over gRPC, with typed outputs, and over HTTP; returns the equal outputs."""
        over_http = self.infer_over_http(request.model_name, document)
        request.parameters["binary_data_output"].bool_param = False
        over_grpc = self.call("ModelInfer", request)
        assert (over_grpc.model_name, over_grpc.model_version) == (over_http["model_name"], over_http["model_version"])
        outputs = {output["name"]: output["data"] for output in over_http["outputs"]}
        assert {output.name: typed(output) for output in over_grpc.outputs} == outputs
        for output, other in zip(over_grpc.outputs, over_http["outputs"], strict=True):
            assert (output.name, output.datatype) == (other["name"], other["datatype"])
            assert list(output.shape) == other["shape"]
        return outputs


def typed(output: Any) -> list[Any]:
    ((_, values),) = output.contents.ListFields()
    if output.datatype == "BYTES":
        return [value.decode() for value in values]
    # JSON has the shortest digits of a float32.
    return [float(str(value)) for value in np.array(values, np.float32)] if output.datatype == "FP32" else list(values)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, colours: Path, adder: Path) -> Iterator[Served]:
    """`colours` version 7, `adder`, `echo` and `gated` version 1, with model control."""
    folder = tmp_path_factory.mktemp("open_inference")
    models_dir = folder / "models"
    shutil.copytree(colours, models_dir / "colours" / "7")
    shutil.copytree(adder, models_dir / "adder" / "1")
    save_echo(models_dir / "echo" / "1")
    save_colour_classifier(models_dir / "gated" / "1", gate=folder / "gate")
    app = make_app(Settings(models_dir=models_dir, max_request_bytes=MAX_BYTES, allow_model_control=True))
    app.inference.repository.load()
    address = f"127.0.0.1:{free_ports(1)[0]}"
    server = GrpcServer(
        app.inference,
        app.observer,
        app.memory,
        app.liveness,
        app.policy,
        address=address,
        threads=2,
        max_message_bytes=MAX_BYTES,
    )
    with grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as channel:
        yield Served(app, address, channel, folder / "gate")
    server.stop(grace_s=5)


def tensor(name: str, datatype: str, shape: Any, **contents: Any) -> Any:
    made = pb2.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    if contents:
        made.contents.CopyFrom(pb2.InferTensorContents(**contents))
    return made


def request_of(model: str, *inputs: Any, raw: Any = (), outputs: Any = (), **parameters: Any) -> Any:
    """Return a ModelInferRequest; `outputs` are names, or pairs of a name and its parameters."""
    request = pb2.ModelInferRequest(model_name=model, inputs=inputs, raw_input_contents=raw)
    set_parameters(request.parameters, parameters)
    for output in outputs:
        name, own = (output, {}) if isinstance(output, str) else output
        set_parameters(request.outputs.add(name=name).parameters, own)
    return request


def set_parameters(target: Any, parameters: dict[str, Any]) -> None:
    fields = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for name, value in parameters.items():
        setattr(target[name], fields[type(value)], value)


def images(array: Any = PIXELS, **options: Any) -> Any:
    return request_of("colours", tensor("images", "UINT8", array.shape), raw=[array.tobytes()], **options)


def document(array: np.ndarray = PIXELS, **others: Any) -> dict[str, Any]:
    sent = {"name": "images", "datatype": "UINT8", "shape": list(array.shape), "data": array.tolist()}
    return {"inputs": [sent], **others}


def test_the_states_and_descriptions_equal_those_of_http(served: Served) -> None:
    assert served.call("ServerLive", pb2.ServerLiveRequest()).live
    assert served.call("ServerReady", pb2.ServerReadyRequest()).ready
    assert served.call("ModelReady", pb2.ModelReadyRequest(name="colours", version="7")).ready
    expected = 'there is no model "x"; available: adder, colours, echo, gated'
    assert served.refusal("ModelReady", pb2.ModelReadyRequest(name="x")) == ("NOT_FOUND", expected)
    refused = served.refusal("ModelReady", pb2.ModelReadyRequest(name="colours", version="8"))
    assert refused == ("NOT_FOUND", "there is no version 8 of model colours; available: 7")
    refused = served.refusal("ModelMetadata", pb2.ModelMetadataRequest(name="colours", version="x"))
    assert refused[0] == "INVALID_ARGUMENT"
    for method, path in {
        "ServerMetadata": "/v2",
        "ModelMetadata": "/v2/models/colours/versions/7",
        "ModelStatistics": "/v2/models/colours/stats",
    }.items():
        request = getattr(pb2, f"{method}Request")()
        if method != "ServerMetadata":
            request.name = "colours"
        response = served.call(method, request)
        assert response == json_format.ParseDict(served.http.get(path).json, type(response)()), method
    config = served.call("ModelConfig", pb2.ModelConfigRequest(name="colours", version="7")).config
    assert config == json_format.ParseDict(served.http.get("/v2/models/colours/config").json, pb2.ModelConfig())
    assert "model_repository" in served.call("ServerMetadata", pb2.ServerMetadataRequest()).extensions


def test_the_configuration(served: Served) -> None:
    config = served.http.get("/v2/models/colours/config").json or {}
    assert (config["name"], config["platform"], config["backend"]) == ("colours", "tensorflow_savedmodel", "tensorflow")
    assert config["max_batch_size"] == Settings.max_rows
    assert config["input"] == [{"name": "images", "data_type": "TYPE_UINT8", "dims": [32, 32, 3]}]
    assert {"name": "label", "data_type": "TYPE_STRING", "dims": []} in config["output"]
    assert config["dynamic_batching"]["preferred_batch_size"] == [Settings.max_batch_size]
    # A signature without a batch axis.
    config = served.http.get("/v2/models/adder/versions/1/config?signature_name=shout").json or {}
    assert config["max_batch_size"] == 0
    assert "dynamic_batching" not in config
    assert config["input"] == [{"name": "text", "data_type": "TYPE_STRING", "dims": []}]


def test_http_and_grpc_give_the_same_outputs(served: Served) -> None:
    outputs = served.infer_over_both(images(), document())
    assert outputs.keys() == {"probabilities", "class_id", "label"}
    response = served.call("ModelInfer", images(outputs=("label", "probabilities")))
    assert [output.name for output in response.outputs] == ["label", "probabilities"]
    assert not response.outputs[1].HasField("contents")
    probabilities = np.frombuffer(response.raw_output_contents[1], "<f4")
    np.testing.assert_array_equal(probabilities, np.array(outputs["probabilities"], np.float32))
    request = images()
    request.id = "a 1"
    assert served.call("ModelInfer", request).id == "a 1"


@pytest.mark.parametrize("is_raw", [True, False])
def test_every_datatype_goes_through_a_model_unchanged(served: Served, is_raw: bool) -> None:
    values: dict[str, list[Any]] = {"BOOL": [True, False], "BYTES": [b"\xff\0", b""]}
    for name, dtype in DTYPES.items():
        if dtype.is_integer:
            values[name] = [dtype.min, dtype.max]
        elif dtype.is_floating:
            values[name] = [1.5, float("inf")]
    raws = {name: np.array(values[name], dtype.as_numpy_dtype).tobytes() for name, dtype in DTYPES.items()}
    raws["BYTES"] = b"\2\0\0\0\xff\0\0\0\0\0"
    inputs = [tensor(name, name, [2]) for name in DTYPES]
    request = request_of("echo", *inputs, raw=[raws[name] for name in DTYPES], binary_data_output=is_raw)
    if not is_raw:
        expected = "output FP16: FP16 cannot be sent as contents; request it as binary data"
        assert served.refusal("ModelInfer", request) == ("INVALID_ARGUMENT", expected)
        for name in CONTENTS:
            request.outputs.add(name=name)
    response = served.call("ModelInfer", request)
    assert [output.datatype for output in response.outputs] == [output.name for output in response.outputs]
    if is_raw:
        by_name = dict(zip((output.name for output in response.outputs), response.raw_output_contents, strict=True))
        assert by_name == raws
    else:
        assert not response.raw_output_contents
        for output in response.outputs:
            assert list(getattr(output.contents, f"{CONTENTS[output.name]}_contents")) == values[output.name]


def test_fp16_is_sent_in_raw_contents_only(served: Served) -> None:
    problem = "input FP16: FP16 cannot be sent in contents; send it in raw_input_contents"
    inputs = [tensor(name, name, [2]) for name in ("FP16", *(name for name in DTYPES if name != "FP16"))]
    assert served.refusal("ModelInfer", request_of("echo", *inputs)) == ("INVALID_ARGUMENT", problem)


@pytest.mark.parametrize(("datatype", "contents"), [(n, c) for n, c in CONTENTS.items() if n != "BYTES"])
def test_typed_contents_of_every_datatype(datatype: str, contents: str) -> None:
    spec = TensorSpec("x", "DT_" + {"FP32": "FLOAT", "FP64": "DOUBLE"}.get(datatype, datatype), (None,), "x:0")
    signatures = {"serving_default": Signature("serving_default", "", {"x": spec}, {})}
    sent = [True, False] if datatype == "BOOL" else [1, 0]
    message = request_of("m", tensor("x", datatype, [2], **{f"{contents}_contents": sent}))
    array = parse(message, "m", signatures).inputs["x"]
    assert (array.dtype, array.tolist()) == (spec.numpy_dtype, sent)


def bad(change: Any) -> Any:
    request = images()
    change(request)
    return request


def set_contents(request: Any, **contents: Any) -> None:
    del request.raw_input_contents[:]
    request.inputs[0].contents.CopyFrom(pb2.InferTensorContents(**contents))


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (bad(lambda r: r.raw_input_contents.append(b"")), "raw_input_contents has 2 entries for 1 inputs"),
        (images(PIXELS[:0]), "an empty batch cannot be predicted"),
        (bad(lambda r: r.inputs[0].shape.pop()), "UINT8 of the shape [2, 32, 32] needs 2048 bytes, got 6144"),
        (bad(lambda r: r.inputs[0].ClearField("shape")), "UINT8 of the shape [] needs 1 bytes, got 6144"),
        (bad(lambda r: r.inputs[0].shape.append(-1)), "a size in the shape must be a whole number, not -1"),
        (bad(lambda r: r.inputs[0].shape.extend([1] * 61)), "a list of at most 64 sizes, not a list of 65"),
        (bad(lambda r: r.inputs[0].shape.extend([2**62, 2**62])), "bytes, got 6144"),
        (bad(lambda r: r.inputs[0].shape.extend([0, 2**62, 2**62])), "needs 0 bytes, got 6144"),
        (bad(lambda r: set_contents(r)), "takes 6144 elements; uint_contents has 0"),
        (bad(lambda r: set_contents(r, uint_contents=[1] * 6143 + [256])), "UINT8 is from 0 to 255, not 256"),
        (bad(lambda r: set_contents(r, int_contents=[1])), "UINT8 is sent in uint_contents, not in int_contents"),
        (
            bad(lambda r: r.inputs[0].contents.uint_contents.append(1)),
            "it is in contents, but raw_input_contents is for all inputs",
        ),
        (bad(lambda r: setattr(r.inputs[0], "datatype", "FP32")), 'the datatype is UINT8, not "FP32"'),
        (bad(lambda r: setattr(r.inputs[0], "name", "x")), 'has no input "x"; it has images'),
        (bad(lambda r: r.inputs.pop()), "raw_input_contents has 1 entries for 0 inputs"),
        (images(outputs=["x"]), 'has no output "x"'),
        (images(outputs=["label", "label"]), "output label is repeated"),
        (images(signature_name="x"), 'model colours has no signature "x"; it has image_bytes, serving_default'),
        (images(signature_name=1), "the parameter signature_name must be a string, not 1"),
        (images(priority=2), "the parameter priority is not supported, so it cannot be 2; leave it out"),
        (images(sequence_id="a"), "the parameter sequence_id is not supported"),
        (images(sequence_start=True), "the parameter sequence_start is not supported"),
        (images(timeout=-1), "the parameter timeout must be a number of microseconds, not -1"),
        (images(content_type="pd"), 'the content_type "pd" is not supported; it may be np, str'),
        (images(outputs=[("label", {"classification": 1})]), "classification needs numbers, not BYTES"),
        (images(outputs=[("class_id", {"classification": -1})]), "must be a number of classes, not -1"),
        (
            images(outputs=["label", ("class_id", {"binary_data": False})]),
            "binary_data must be the same for all",
        ),
        (
            bad(lambda r: set_parameters(r.inputs[0].parameters, {"shared_memory_region": "x"})),
            "input images: shared memory is not supported",
        ),
    ],
)
def test_a_malformed_request_is_an_invalid_argument_with_the_reason(
    served: Served, request_: Any, problem: str
) -> None:
    code, details = served.refusal("ModelInfer", request_)
    assert code == "INVALID_ARGUMENT"
    assert problem in details


def test_other_errors_have_their_status_codes(served: Served) -> None:
    request = images()
    request.model_name = "x"
    assert served.refusal("ModelInfer", request)[0] == "NOT_FOUND"
    request = images()
    request.model_version = "8"
    assert served.refusal("ModelInfer", request) == (
        "NOT_FOUND",
        "there is no version 8 of model colours; available: 7",
    )
    code, details = served.refusal("ModelInfer", images(np.zeros((Settings.max_rows + 1, 0), np.uint8)))
    assert code == "INVALID_ARGUMENT"
    code, details = served.refusal("ModelInfer", images(np.zeros((700, 32, 32, 3), np.uint8)))
    assert code == "RESOURCE_EXHAUSTED", details  # larger than a message may be
    assert served.refusal("ModelInfer", b"\xff\xff") == (
        "INTERNAL",
        "the message cannot be parsed as inference.ModelInferRequest",
    )
    empty = request_of("adder", tensor("text", "BYTES", []), raw=[b"\0\0\0\0"], signature_name="shout")
    assert "nothing to shout" in served.refusal("ModelInfer", empty)[1]
    assert served.call("ServerLive", pb2.ServerLiveRequest()).live


def test_a_timeout_shortens_the_deadline(served: Served) -> None:
    code, _ = served.refusal("ModelInfer", images(timeout=1))
    assert code in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
    response = served.http.post("/v2/models/colours/infer", json=document(parameters={"timeout": 1}))
    assert response.status_code in (503, 504), response.text
    accepted: dict[str, Any] = {"timeout": 10_000_000, "priority": 0, "sequence_start": False, "content_type": "np"}
    served.infer_over_both(images(**accepted), document(parameters=accepted))
    served.infer_over_both(images(timeout=0), document(parameters={"timeout": 0}))


def test_classification(served: Served) -> None:
    probabilities = np.array(served.infer_over_both(images(), document())["probabilities"], np.float32).reshape(2, 3)
    wanted = [("probabilities", {"classification": 2}), ("class_id", {"classification": 5})]
    as_json = [{"name": name, "parameters": parameters} for name, parameters in wanted]
    outputs = served.infer_over_both(images(outputs=wanted), document(outputs=as_json))
    names = ("red", "green", "blue")
    expected = [
        f"{row[index]:.6f}:{index}:{names[index]}" for row in probabilities for index in np.argsort(-row)[:2].tolist()
    ]
    assert outputs["probabilities"] == expected
    # One number in each row is no class of three, so it has no label.
    assert [entry.split(":")[1:] for entry in outputs["class_id"]] == [["0"], ["0"]]
    response = served.call("ModelInfer", images(outputs=wanted[:1]))
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == ("BYTES", [2, 2])
    assert expected[0].encode() in response.raw_output_contents[0]


@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_base64_images_in_a_row_or_a_column(served: Served, shape: list[int]) -> None:
    files = [base64.b64encode(picture(colour, kind="JPEG")) for colour in ("blue", "red")]
    request = request_of("colours", tensor("image_bytes", "BYTES", shape, bytes_contents=files))
    set_parameters(request.inputs[0].parameters, {"content_type": "base64"})
    sent = {
        "name": "image_bytes",
        "datatype": "BYTES",
        "shape": shape,
        "data": [file.decode() for file in files],
        "parameters": {"content_type": "base64"},
    }
    assert served.infer_over_both(request, {"inputs": [sent]})["label"] == ["blue", "red"]
    request.inputs[0].contents.bytes_contents[1] = b"/9j!"
    problem = "input image_bytes: element 1 is not base64, as its content_type says"
    assert problem in served.refusal("ModelInfer", request)[1]
    refused = served.http.post("/v2/models/colours/infer", json={"inputs": [{**sent, "data": ["", "/9j!"]}]})
    assert (refused.status_code, problem in (refused.json or {})["error"]) == (400, True)
    set_parameters(request.inputs[0].parameters, {"content_type": "hg_json"})
    assert "it may be base64, np, str" in served.refusal("ModelInfer", request)[1]


def test_statistics_count_requests_of_all_protocols_and_model_calls(served: Served) -> None:
    def read(path: str = "/v2/models/adder/versions/1/stats") -> dict[str, Any]:
        (statistics,) = (served.http.get(path).json or {})["model_stats"]
        return dict(statistics)

    before = read()
    a = tensor("a", "FP32", [3, 2], fp32_contents=[1] * 6)
    b = tensor("b", "FP32", [3, 2], fp32_contents=[2] * 6)
    served.call("ModelInfer", request_of("adder", a, b))
    assert (
        served.http.post("/v1/models/adder:predict", json={"inputs": {"a": [[1, 2]], "b": [[3, 4]]}}).status_code == 200
    )
    empty = request_of("adder", tensor("text", "BYTES", []), raw=[b"\0\0\0\0"], signature_name="shout")
    served.refusal("ModelInfer", empty)
    served.refusal("ModelInfer", request_of("adder", a))  # does not fit the signature, so it is not counted
    after = read()
    assert after["inference_count"] - before["inference_count"] == 4
    assert after["execution_count"] - before["execution_count"] == 2
    for name, count in {"success": 2, "fail": 1, "queue": 2, "compute_infer": 2}.items():
        assert after["inference_stats"][name]["count"] - before["inference_stats"][name]["count"] == count, name
    assert after["inference_stats"]["success"]["ns"] >= after["inference_stats"]["compute_infer"]["ns"] > 0
    assert {entry["batch_size"] for entry in after["batch_stats"]} == {1, 3}
    assert after["last_inference"] > 1_600_000_000_000
    everything = served.call("ModelStatistics", pb2.ModelStatisticsRequest())
    assert [entry.name for entry in everything.model_stats] == ["adder", "colours", "echo", "gated"]
    assert served.refusal("ModelStatistics", pb2.ModelStatisticsRequest(name="x"))[0] == "NOT_FOUND"
    assert len((served.http.get("/v2/models/stats").json or {})["model_stats"]) == 4


def test_a_model_is_unloaded_with_a_request_in_flight_and_loaded_again(served: Served) -> None:
    request = images()
    request.model_name = "gated"
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(served.call("ModelInfer", request)))
    thread.start()
    gated = served.app.inference.repository.resolve("gated")
    while not served.app.liveness._calls:
        assert thread.is_alive()
        time.sleep(0.01)
    served.call("RepositoryModelUnload", pb2.RepositoryModelUnloadRequest(model_name="gated"))
    index = served.call("RepositoryIndex", pb2.RepositoryIndexRequest())
    assert {model.name: model.state for model in index.models}["gated"] == "UNLOADING"
    ready = served.call("RepositoryIndex", pb2.RepositoryIndexRequest(ready=True))
    assert [model.name for model in ready.models] == ["adder", "colours", "echo"]
    assert not outcome
    served.gate.touch()
    thread.join()
    assert outcome[0].model_name == "gated"
    del gated
    reason = "model gated cannot be used: it was unloaded; load it to use it again"
    assert served.refusal("ModelInfer", request) == ("NOT_FOUND", reason)
    assert not served.call("ModelReady", pb2.ModelReadyRequest(name="gated")).ready
    served.app.inference.repository.poll()
    served.refusal("ModelInfer", request)
    assert served.http.post("/v2/repository/models/gated/load").status_code == 200
    assert served.call("ModelInfer", request).model_name == "gated"
    assert served.http.post("/v2/repository/models/gated/unload", json={}).status_code == 200
    index_over_http = served.http.post("/v2/repository/index").json or []
    (entry,) = [model for model in index_over_http if model["name"] == "gated"]
    assert entry["state"] in ("UNLOADING", "UNAVAILABLE")
    served.call("RepositoryModelLoad", pb2.RepositoryModelLoadRequest(model_name="gated"))
    ready_over_http = served.http.post("/v2/repository/index", json={"ready": True}).json or []
    assert {"name": "gated", "version": "1", "state": "READY", "reason": ""} in ready_over_http


def test_what_cannot_be_loaded_is_refused_with_the_reason(served: Served) -> None:
    for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
        code, details = served.refusal(method, getattr(pb2, f"{method}Request")(model_name="x"))
        assert (code, details) == ("NOT_FOUND", 'there is no model "x"; available: adder, colours, echo, gated')
    request = pb2.RepositoryModelLoadRequest(model_name="colours")
    request.parameters["config"].string_param = "{}"
    assert "parameters (config, file:...) are not supported" in served.refusal("RepositoryModelLoad", request)[1]
    for body, problem in ((b"{", "not valid JSON"), (b"[]", "expected a JSON object"), (b'{"ready": 1}', "ready must")):
        response = served.http.post("/v2/repository/index", data=body)
        assert (response.status_code, problem in (response.json or {})["error"]) == (400, True), body


def test_loading_is_not_allowed_without_the_option(models_dir: Path) -> None:
    app = make_app(Settings(models_dir=models_dir))
    for action in ("load", "unload"):
        response = app.test_client().post(f"/v2/repository/models/colours/{action}")
        assert response.status_code == 403
        assert "--allow-model-control allows it" in (response.json or {})["error"]


def test_reflection_lists_the_service_once_with_its_methods(served: Served) -> None:
    database = ProtoReflectionDescriptorDatabase(served.channel)
    services = list(database.get_services())
    assert services.count("inference.GRPCInferenceService") == 1
    assert "tensorflow.serving.PredictionService" in services
    file = database.FindFileContainingSymbol("inference.GRPCInferenceService")
    assert [method.name for method in file.service[0].method] == METHODS
    assert database.FindFileContainingSymbol("tensorflow.serving.PredictionService").package == "tensorflow.serving"
    with pytest.raises(KeyError):
        database.FindFileContainingSymbol("inference.Unknown")


def test_the_messages_are_those_of_tritons_client() -> None:
    """Both define them in this process. Ours have a part of the fields, with the same numbers and types."""
    theirs_by_name = triton_pb2.DESCRIPTOR.pool
    compared = 0
    pending = list(pb2.DESCRIPTOR.message_types_by_name.values())
    while pending:
        ours = pending.pop()
        pending += ours.nested_types
        theirs = theirs_by_name.FindMessageTypeByName(ours.full_name).fields_by_name
        for field in ours.fields:
            other = theirs[field.name]
            assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated)
            if field.enum_type is not None:
                values = {value.name: value.number for value in other.enum_type.values}
                assert {value.name: value.number for value in field.enum_type.values}.items() <= values.items()
            compared += 1
    assert compared > 100
    methods = triton_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    assert set(METHODS) <= set(methods)


def test_tritons_client_in_the_same_process(served: Served) -> None:
    with tritonclient.grpc.InferenceServerClient(served.address) as client:
        assert client.is_server_live()
        assert client.is_model_ready("colours", "7")
        made = tritonclient.grpc.InferInput("images", list(PIXELS.shape), "UINT8")
        made.set_data_from_numpy(PIXELS)
        wanted = [tritonclient.grpc.InferRequestedOutput("probabilities", class_count=1)]
        result = client.infer("colours", [made], outputs=wanted, timeout=10_000_000)
        assert result.as_numpy("probabilities").shape == (2, 1)
        assert client.get_model_config("colours").config.dynamic_batching.preferred_batch_size == [64]
        assert client.get_model_config("colours", as_json=True)["config"]["max_batch_size"] == Settings.max_rows
        with pytest.raises(tritonclient.utils.InferenceServerException, match="sequence_id is not supported"):
            client.infer("colours", [made], sequence_id=1)


CHANGES = st.sampled_from(
    [
        lambda m: m.ClearField("raw_input_contents"),
        lambda m: m.raw_input_contents.append(b"\1\0\0\0"),
        lambda m: m.inputs.add(name="b", datatype="BYTES", shape=[2]),
        lambda m: m.inputs[0].shape.append(2**63 - 1),
        lambda m: m.inputs[0].shape.append(0),
        lambda m: m.inputs[0].shape.append(-5),
        lambda m: m.inputs[0].ClearField("shape"),
        lambda m: m.inputs[0].contents.bytes_contents.append(b"\xff"),
        lambda m: m.inputs[0].contents.int_contents.append(-(2**31)),
        lambda m: m.inputs[0].contents.fp32_contents.append(float("nan")),
        lambda m: set_parameters(m.inputs[0].parameters, {"content_type": "base64"}),
        lambda m: set_parameters(m.parameters, {"timeout": 2**62}),
        lambda m: set_parameters(m.parameters, {"binary_data_output": False}),
        lambda m: set_parameters(m.parameters, {"priority": float("nan")}),
        lambda m: m.parameters["signature_name"].Clear(),
        lambda m: set_parameters(m.outputs.add(name="y").parameters, {"classification": 2**62}),
        lambda m: setattr(m.inputs[0], "datatype", "INT8"),
    ]
)


@given(changes=st.lists(CHANGES, max_size=5), garbage=st.binary(max_size=40))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_message_causes_another_error_than_an_invalid_request(changes: list[Any], garbage: bytes) -> None:
    specs = {
        "a": TensorSpec("a", "DT_INT8", (None,), "a:0"),
        "b": TensorSpec("b", "DT_STRING", (None,), "b:0"),
    }
    output = {"y": TensorSpec("y", "DT_FLOAT", (None, 2), "y:0")}
    signatures = {"serving_default": Signature("serving_default", "", specs, output)}
    message = request_of("m", tensor("a", "INT8", [2]), tensor("b", "BYTES", [1]), raw=[b"\1\2", b"\1\0\0\0x"])
    message.raw_input_contents[1] = garbage
    for change in changes:
        change(message)
    try:
        parsed = parse(pb2.ModelInferRequest.FromString(message.SerializeToString()), "m", signatures)
    except InvalidRequest:
        return
    assert all(array.nbytes <= 1_000 for array in parsed.inputs.values())

"""What can be held to be true of deploy/ without a container engine or a cluster."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from benchmarks.memory_cgroup import parse_bytes
from benchmarks.service import Service
from image_formats.header import ImageHeader
from serving.__main__ import main
from serving.grpc.handlers import OBJECT_BYTES
from serving.grpc.receiving import COPIES
from serving.images.limits import decode_cost
from serving.inference.remote_addresses import RESOLVE_INTERVAL_S, parse_addresses
from serving.memory import MemoryBudget
from serving.process_memory import SAFETY_SHARE
from serving.settings import Settings
from tests.serving.saved_models import save_adder

PROJECT = Path(__file__).parents[2]
DEPLOY = PROJECT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
MANIFESTS = [
    document
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    if file.name != "kustomization.yaml"
    for document in yaml.safe_load_all(file.read_text())
]
DEPLOYMENTS = {manifest["metadata"]["name"]: manifest for manifest in MANIFESTS if manifest["kind"] == "Deployment"}
KSERVE = yaml.safe_load((DEPLOY / "kserve" / "inferenceservice.yaml").read_text())
RUNTIME = yaml.safe_load((DEPLOY / "kserve" / "clusterservingruntime.yaml").read_text())
(RUNTIME_CONTAINER,) = RUNTIME["spec"]["containers"]
OUR_FLAGS = {option for parameter in main.params for option in parameter.opts}
# As `tensorflow_model_server --help` of 2.20 lists them; the ones used here.
TFSERVING_FLAGS = {
    "--model_config_file",
    "--model_config_file_poll_wait_seconds",
    "--monitoring_config_file",
}

MIB = 2**20
# What is resident: with one small model, and with none, in front of a TensorFlow Serving.
RESIDENT_MIB, FRONT_RESIDENT_MIB = 640, 570
# The least budget that takes what the default limits allow: the largest photo as an upload, the largest gRPC message.
MIN_BUDGET_MIB = 768


def named(manifest: dict[str, Any]) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


@pytest.mark.parametrize("manifest", MANIFESTS, ids=named)
def test_a_manifest_has_the_shape_that_kubernetes_wants(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, "1.34", strict=True)


def test_both_servers_have_all_that_they_need() -> None:
    kinds = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in MANIFESTS}
    for name in ("image-classifier", "tensorflow-serving"):
        for kind in ("Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"):
            assert (kind, name) in kinds
    listed = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    present = {file.name for file in (DEPLOY / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(listed) == present


def test_names_in_the_manifests_lead_somewhere() -> None:
    claims = {manifest["metadata"]["name"] for manifest in MANIFESTS if manifest["kind"] == "PersistentVolumeClaim"}
    configs = {manifest["metadata"]["name"] for manifest in MANIFESTS if manifest["kind"] == "ConfigMap"}
    for name, deployment in DEPLOYMENTS.items():
        pod = deployment["spec"]["template"]
        assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        (container,) = pod["spec"]["containers"]
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        ports = {port["name"] for port in container["ports"]}
        for volume in pod["spec"]["volumes"]:
            assert volume.get("persistentVolumeClaim", {}).get("claimName", "models") in claims
            assert volume.get("configMap", {}).get("name", "tensorflow-serving") in configs
        for manifest in MANIFESTS:
            if manifest["metadata"]["name"] != name:
                continue
            if manifest["kind"] == "Service":
                assert manifest["spec"]["selector"] == pod["metadata"]["labels"]
                assert {port["targetPort"] for port in manifest["spec"]["ports"]} <= ports
            if manifest["kind"] == "HorizontalPodAutoscaler":
                assert manifest["spec"]["scaleTargetRef"]["name"] == name
            if manifest["kind"] == "PodDisruptionBudget":
                assert manifest["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]


def manifests_of(name: str, kind: str) -> list[dict[str, Any]]:
    """Return the manifests of a kind that belong to a Deployment: of its name, or one that begins with it."""
    return [each for each in MANIFESTS if each["kind"] == kind and each["metadata"]["name"].startswith(name)]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_rolling_update_and_an_eviction_leave_the_pods_that_are_needed(name: str) -> None:
    spec = DEPLOYMENTS[name]["spec"]
    assert "replicas" not in spec  # the autoscaler's, which an apply would reset
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    dns_cache_s = 5
    assert spec["minReadySeconds"] > RESOLVE_INTERVAL_S + dns_cache_s + Settings.poll_interval_s
    (container,) = spec["template"]["spec"]["containers"]
    assert container["readinessProbe"]
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] >= 5
    (budget,) = manifests_of(name, "PodDisruptionBudget")
    (scaler,) = manifests_of(name, "HorizontalPodAutoscaler")
    assert budget["spec"]["maxUnavailable"] < scaler["spec"]["minReplicas"] <= scaler["spec"]["maxReplicas"]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_pods_are_spread_over_zones_and_nodes(name: str) -> None:
    pod = DEPLOYMENTS[name]["spec"]["template"]
    constraints = pod["spec"]["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in constraints] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    for each in constraints:
        assert each["labelSelector"]["matchLabels"] == pod["metadata"]["labels"]
        assert each["whenUnsatisfiable"] == "ScheduleAnyway"  # on one node too


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_headless_service_names_the_grpc_address_of_every_pod(name: str) -> None:
    pod = DEPLOYMENTS[name]["spec"]["template"]
    ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
    headless = [each for each in manifests_of(name, "Service") if each["spec"].get("clusterIP") == "None"]
    (spec,) = [each["spec"] for each in headless]
    assert spec["selector"] == pod["metadata"]["labels"]
    (port,) = spec["ports"]
    assert port["port"] == ports[port["targetPort"]]  # without a cluster IP no port is translated
    address = f"{headless[0]['metadata']['name']}:{port['port']}"
    parse_addresses(address)
    assert f"--remote {address}" in (DEPLOY / "kubernetes" / "service.yaml").read_text()
    assert f"--remote {address}" in (PROJECT / "docs" / "remote.md").read_text()


def test_the_autoscaler_uses_metrics_that_the_adapter_provides() -> None:
    (scaler,) = manifests_of("image-classifier", "HorizontalPodAutoscaler")
    metrics = scaler["spec"]["metrics"]
    used = {metric["pods"]["metric"]["name"] for metric in metrics if metric["type"] == "Pods"}
    rules = yaml.safe_load((DEPLOY / "observability" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert (
        used == {rule["name"]["as"] for rule in rules} == {"serving_queue_wait_seconds", "serving_requests_in_flight"}
    )
    assert [metric["resource"]["name"] for metric in metrics if metric["type"] == "Resource"] == ["cpu"]
    pod = DEPLOYMENTS["image-classifier"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    annotations = pod["metadata"]["annotations"]  # with which Prometheus finds the pods
    assert int(annotations["prometheus.io/port"]) == container["ports"][0]["containerPort"]
    assert "cpu" in container["resources"]["requests"]  # of which the utilization is a share


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")
def test_kubectl_builds_what_the_kustomization_lists() -> None:
    done = subprocess.run(["kubectl", "kustomize", DEPLOY / "kubernetes"], capture_output=True, text=True, check=True)
    assert sorted(map(named, yaml.safe_load_all(done.stdout))) == sorted(map(named, MANIFESTS))


def test_a_pod_is_given_longer_than_the_service_takes_to_stop() -> None:
    for pod in (DEPLOYMENTS["image-classifier"]["spec"]["template"]["spec"], KSERVE["spec"]["predictor"]):
        (container,) = pod["containers"]
        drain_s = int(container["args"][container["args"].index("--drain-timeout-s") + 1])
        pre_stop_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert pod["terminationGracePeriodSeconds"] > drain_s + pre_stop_s
    for name in ("service", "backend"):
        assert int(COMPOSE["services"][name]["stop_grace_period"].rstrip("s")) > Settings.drain_timeout_s


def our_memory() -> list[tuple[str, int, int]]:
    """Each file that runs the service, the limit that it sets in bytes, and what is resident there in MiB."""
    limits = []
    for name, pod in (
        ("kubernetes/service.yaml", DEPLOYMENTS["image-classifier"]["spec"]["template"]["spec"]),
        ("kserve/inferenceservice.yaml", KSERVE["spec"]["predictor"]),
        ("kserve/clusterservingruntime.yaml", RUNTIME["spec"]),
    ):
        resources = pod["containers"][0]["resources"]
        # Less could be evicted: the budget follows from the limit.
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        limits.append((name, parse_bytes(resources["limits"]["memory"]), RESIDENT_MIB))
    for name, resident_mib in (("backend", RESIDENT_MIB), ("service", FRONT_RESIDENT_MIB)):
        service = COMPOSE["services"][name]
        assert ("--remote" in service.get("command", ())) == (name == "service")
        assert service["memswap_limit"] == service["mem_limit"]
        # Compose counts in powers of two.
        limits.append(("compose.yaml", parse_bytes(service["mem_limit"].upper() + "i"), resident_mib))
    return limits


def test_the_memory_limits_are_the_resident_set_and_a_budget_as_they_say() -> None:
    for name, limit, resident_mib in our_memory():
        budget_mib = SAFETY_SHARE * (limit / MIB - resident_mib)
        assert budget_mib >= MIN_BUDGET_MIB, name
        comments = " ".join(re.findall(r"^ *# (.*)$", (DEPLOY / name).read_text(), re.M))
        assert f"About {resident_mib} MiB are resident" in comments, name
        assert f"{SAFETY_SHARE * 100:.0f} % is the memory budget" in comments, name
        assert f"{budget_mib:,.0f} MiB" in comments, name
    page = " ".join((PROJECT / "docs" / "deploying.md").read_text().split())
    least_mib = RESIDENT_MIB + MIN_BUDGET_MIB / SAFETY_SHARE
    assert f"at least {MIN_BUDGET_MIB} MiB, and so a limit of {least_mib:,.0f} MiB" in page


def test_the_least_budget_takes_what_the_default_limits_allow() -> None:
    budget = MemoryBudget(MIN_BUDGET_MIB * MIB)
    photo = ImageHeader("JPEG", 8_000, 6_250, 20_000_000, channels=3)
    assert photo.pixels == Settings.max_image_pixels
    assert photo.file_bytes + decode_cost(photo, decoder="pillow") <= budget.large.limit
    assert COPIES * Settings.max_request_bytes <= budget.large.body_limit
    assert (1 + OBJECT_BYTES) * Settings.max_request_bytes <= budget.large.limit


def test_the_resident_set_is_what_the_manifests_count_on(tmp_path: Path) -> None:
    """In processes of their own: the service with a model, and another in front of it."""
    save_adder(tmp_path / "models" / "adder" / "1")
    with Service(tmp_path / "models", tmp_path / "service.log") as service:
        remote = ("--remote", service.grpc_address, "--remote-model", "adder")
        with Service(tmp_path / "models", tmp_path / "front.log", *remote) as front:
            assert service.resident_mb() < 1.1 * RESIDENT_MIB
            assert front.resident_mb() < 1.1 * FRONT_RESIDENT_MIB


def test_a_pod_without_models_waits_for_them_and_is_not_restarted() -> None:
    probes = DEPLOYMENTS["image-classifier"]["spec"]["template"]["spec"]["containers"][0]
    paths = {name: probe["httpGet"]["path"] for name, probe in probes.items() if name.endswith("Probe")}
    assert paths == {"startupProbe": "/healthz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}


def test_the_inference_service_is_a_pod_that_kserve_takes() -> None:
    assert (KSERVE["apiVersion"], KSERVE["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = dict(KSERVE["spec"]["predictor"])
    for own in ("minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "timeout"):
        predictor.pop(own)
    kubernetes_validate.validate(as_pod(predictor), "1.34", strict=True)
    assert predictor["containers"][0]["name"] == "kserve-container"


def as_pod(spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}


def test_the_runtime_has_the_fields_that_kserve_knows() -> None:
    """Those of `ServingRuntimeSpec` and `SupportedModelFormat` in KServe's API v1alpha1; unknown ones are dropped."""
    assert (RUNTIME["apiVersion"], RUNTIME["kind"]) == ("serving.kserve.io/v1alpha1", "ClusterServingRuntime")
    spec = dict(RUNTIME["spec"])
    formats = spec.pop("supportedModelFormats")
    assert [(entry["name"], entry["version"]) for entry in formats] == [("tensorflow", "2"), ("savedmodel", "2")]
    for entry in formats:
        assert entry.keys() <= {"name", "version", "autoSelect", "priority"}
        assert isinstance(entry["version"], str)
        assert entry["priority"] >= 1
    assert spec.pop("protocolVersions") == ["v1", "v2", "grpc-v2"]
    assert spec.pop("annotations") == {"prometheus.kserve.io/port": "8080", "prometheus.kserve.io/path": "/metrics"}
    assert spec.keys() == {"containers", "volumes"}
    kubernetes_validate.validate(as_pod(spec), "1.34", strict=True)
    assert RUNTIME_CONTAINER["name"] == "kserve-container"
    assert "ports" not in RUNTIME_CONTAINER  # or an InferenceService's would be a second one, which Knative rejects
    (volume,) = spec["volumes"]
    assert [mount["name"] for mount in RUNTIME_CONTAINER["volumeMounts"]] == [volume["name"]]


def test_the_runtime_stops_within_the_time_that_kubernetes_gives_by_default() -> None:
    options = dict(zip(RUNTIME_CONTAINER["args"][::2], RUNTIME_CONTAINER["args"][1::2], strict=True))
    assert int(options["--request-timeout-s"]) <= int(options["--drain-timeout-s"]) < 30


def test_the_runtime_serves_the_model_that_kserve_mounts(tmp_path: Path) -> None:
    options = dict(zip(RUNTIME_CONTAINER["args"][::2], RUNTIME_CONTAINER["args"][1::2], strict=True))
    assert options["--model"] == "{{.Name}}=/mnt/models"  # a template, of the InferenceService's metadata
    assert RUNTIME_CONTAINER["readinessProbe"]["grpc"] == {"port": int(options["--grpc-port"])}
    live = {"path": "/v2/health/live", "port": int(options["--rest-port"])}
    assert RUNTIME_CONTAINER["livenessProbe"]["httpGet"] == live
    assert options["--rest-port"] == "8080"  # KServe's default port
    arguments = [part.replace("{{.Name}}=/mnt/models", f"pets={tmp_path}") for part in RUNTIME_CONTAINER["args"]]
    context = main.make_context("serving", arguments)
    assert context.params["models"] == (("pets", tmp_path),)


def test_the_documented_inference_service_fits_the_runtime() -> None:
    page = (PROJECT / "docs" / "deploying.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.+?)^```", page, re.M | re.S)
    model = yaml.safe_load(block)["spec"]["predictor"]["model"]
    assert model.keys() == {"modelFormat", "protocolVersion", "runtime", "storageUri", "ports"}
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    assert model["protocolVersion"] in RUNTIME["spec"]["protocolVersions"]
    formats = RUNTIME["spec"]["supportedModelFormats"]
    assert model["modelFormat"] in [{"name": entry["name"], "version": entry["version"]} for entry in formats]
    (port,) = model["ports"]
    grpc_port = RUNTIME_CONTAINER["args"][RUNTIME_CONTAINER["args"].index("--grpc-port") + 1]
    assert (port["name"], str(port["containerPort"])) == ("h2c", grpc_port)
    kubernetes_validate.validate(as_pod({"containers": [{"name": "x", "ports": [port]}]}), "1.34", strict=True)


def our_commands() -> list[list[str]]:
    return [
        DEPLOYMENTS["image-classifier"]["spec"]["template"]["spec"]["containers"][0]["args"],
        KSERVE["spec"]["predictor"]["containers"][0]["args"],
        RUNTIME_CONTAINER["args"],
        COMPOSE["services"]["service"]["command"],
        ["--remote", "tensorflow-serving-backends:8500", "--remote-model", "cifar10"],  # docs/deploying.md
    ]


def test_every_flag_and_variable_exists() -> None:
    for command in our_commands():
        assert {part for part in command if part.startswith("--")} <= OUR_FLAGS
    variables = set(re.findall(r"\bSERVING_[A-Z_]+", DOCKERFILE))
    assert variables
    assert {"--" + name.removeprefix("SERVING_").lower().replace("_", "-") for name in variables} <= OUR_FLAGS
    theirs = [
        *COMPOSE["services"]["tensorflow-serving"]["command"],
        *DEPLOYMENTS["tensorflow-serving"]["spec"]["template"]["spec"]["containers"][0]["args"],
    ]
    assert {flag.split("=")[0] for flag in theirs} == TFSERVING_FLAGS


def test_every_path_exists() -> None:
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert all((PROJECT / source).exists() for source in copied)
    allowed = {line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == copied == {"requirements-image.lock", "serving", "image_formats"}
    service = COMPOSE["services"]["service"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    mounts = COMPOSE["services"]["tensorflow-serving"]["volumes"]
    for source in (mount.split(":/")[0] for mount in mounts):
        written = source in ("./models.config", "${MODELS:-../models}")  # by tfserving.sh, and by an export
        assert written or (DEPLOY / source).is_file()
    targets = {mount.split(":")[-2] for mount in mounts}
    flags = dict(flag.split("=") for flag in COMPOSE["services"]["tensorflow-serving"]["command"] if "=" in flag)
    assert {path for path in flags.values() if path.startswith("/")} <= targets


def test_the_versions_of_tensorflow_and_its_server_go_together() -> None:
    (locked,) = re.findall(r"^tensorflow-cpu==(\d+\.\d+)\.", (PROJECT / "requirements-image.lock").read_text(), re.M)
    images = {
        COMPOSE["services"]["tensorflow-serving"]["image"],
        DEPLOYMENTS["tensorflow-serving"]["spec"]["template"]["spec"]["containers"][0]["image"],
    }
    assert images == {f"tensorflow/serving:{locked}.0"}


def test_the_configurations_are_ones_that_tensorflow_serving_reads(tmp_path: Path) -> None:
    (config_map,) = [manifest["data"] for manifest in MANIFESTS if manifest["kind"] == "ConfigMap"]
    alone = re.sub(r"^#.*\n", "", (DEPLOY / "monitoring.config").read_text(), flags=re.M)
    assert config_map["monitoring.config"] == alone
    text_format.Parse(config_map["models.config"], model_server_config_pb2.ModelServerConfig())
    for name, file in (("b", "saved_model.pb"), ("a", "saved_model.pbtxt")):
        (tmp_path / "models" / name / "1").mkdir(parents=True)
        (tmp_path / "models" / name / "1" / file).touch()
    (tmp_path / "models" / "notes" / "x").mkdir(parents=True)
    write = [sys.executable, str(DEPLOY / "write_models_config.py"), str(tmp_path / "models"), str(tmp_path / "out")]
    subprocess.run(write, check=True)
    parsed = text_format.Parse((tmp_path / "out").read_text(), model_server_config_pb2.ModelServerConfig())
    assert [(c.name, c.base_path) for c in parsed.model_config_list.config] == [("a", "/models/a"), ("b", "/models/b")]


def test_the_model_config_has_what_tensorflow_serving_can_serve(tmp_path: Path) -> None:
    models = tmp_path / "models"
    latin_1 = os.fsdecode(b"caf\xe9")
    for folder in (
        "a/99999999999999999999",
        'b "1"\\\n/1',
        "c/1x",
        "d/1\N{SUPERSCRIPT TWO}",
        f"{latin_1}/1",
        "größe/007",
    ):
        (models / folder).mkdir(parents=True)
        (models / folder / "saved_model.pb").touch()
    write = [sys.executable, str(DEPLOY / "write_models_config.py"), str(models), str(tmp_path / "out")]
    done = subprocess.run(write, check=True, capture_output=True, text=True)
    parsed = text_format.Parse((tmp_path / "out").read_text(), model_server_config_pb2.ModelServerConfig())
    names = ['b "1"\\\n', "größe"]
    assert [(c.name, c.base_path) for c in parsed.model_config_list.config] == [(n, f"/models/{n}") for n in names]
    assert done.stderr == "'caf\\udce9' is left out: the name is not valid UTF-8; rename the folder\n"


def test_nothing_turns_on_the_batching_that_an_empty_batch_hangs() -> None:
    settings = re.compile(r"^[^#\n]*batching", re.M)  # outside comments
    assert not [path for path in DEPLOY.rglob("*") if path.is_file() and settings.search(path.read_text())]


def test_the_documented_container_serves_what_the_recordings_need() -> None:
    page = (PROJECT / "docs" / "deploying.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^docker run .*golden.*$", page, re.M)
    image, *flags = shlex.split(line)[shlex.split(line).index("tensorflow/serving:2.20.0") :]
    assert image == COMPOSE["services"]["tensorflow-serving"]["image"]
    options = dict(flag.split("=") for flag in flags)
    # The config gives a label to a version that is not loaded yet, and the metrics were recorded.
    assert options.pop("--allow_version_labels_for_unavailable_models") == "true"
    assert options.keys() == {"--model_config_file", "--monitoring_config_file"}
    sources = {mount[1]: PROJECT / mount[0] for mount in re.findall(r'-v "\$PWD/([^:]+):([^:"]+)(?::ro)?"', line)}
    files = {}
    for flag, path in options.items():
        (mount,) = [mount for mount in sources if path == mount or path.startswith(mount + "/")]
        files[flag] = Path(f"{sources[mount]}{path.removeprefix(mount)}")
        assert files[flag].is_file()
    config = text_format.Parse(files["--model_config_file"].read_text(), model_server_config_pb2.ModelServerConfig())
    for model in config.model_config_list.config:
        assert (sources["/models"] / model.base_path.removeprefix("/models/") / "1" / "saved_model.pb").is_file()


def run_tfserving(tmp_path: Path, *tools: str, models: Path) -> subprocess.CompletedProcess[str]:
    """Run deploy/tfserving.sh on a copy, with these commands as its only docker."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name in ("bash", "dirname", "python3"):
        path = sys.executable if name == "python3" else shutil.which(name)
        (bin_dir / name).symlink_to(str(path))
    for tool in tools:
        (bin_dir / "docker").write_text(f"#!/bin/sh\n{tool}\n")
        (bin_dir / "docker").chmod(0o755)
    return subprocess.run(
        [str(tmp_path / "deploy" / "tfserving.sh")],
        env={"PATH": str(bin_dir), "MODELS": str(models)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models" / "m" / "1").mkdir(parents=True)
    (tmp_path / "models" / "m" / "1" / "saved_model.pb").touch()
    return tmp_path / "models"


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ([], "docker is not installed"),
        (["exit 1"], "no compose plugin"),
        (['[ "$1" = compose ]'], "the docker daemon cannot be reached"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, models: Path, tools: list[str], said: str) -> None:
    done = run_tfserving(tmp_path, *tools, models=models)
    assert (done.returncode, said in done.stderr) == (1, True), done.stderr


def test_missing_models_are_said_first(tmp_path: Path) -> None:
    done = run_tfserving(tmp_path, models=tmp_path)
    assert (done.returncode, "no exported model in" in done.stderr) == (1, True), done.stderr


def test_with_everything_there_compose_is_started(tmp_path: Path, models: Path) -> None:
    done = run_tfserving(tmp_path, 'echo "$BACKEND $@"', models=models)
    expected = "tensorflow-serving compose -p image-classifier -f compose.yaml up --build tensorflow-serving service"
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, expected)
    assert 'name: "m"' in (tmp_path / "deploy" / "models.config").read_text()


def compose_command() -> list[str] | None:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and not subprocess.run([*command, "version"], capture_output=True).returncode:
            return command
    return None


@pytest.mark.skipif(compose_command() is None, reason="there is no compose command")
def test_compose_understands_its_file() -> None:
    command = [*(compose_command() or []), "-f", str(DEPLOY / "compose.yaml"), "config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def locked_versions(lock: str) -> dict[str, set[str]]:
    """Return each package of a lock file with its versions: of several, a marker chooses one."""
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9.-]+)==([^ ]+)", (PROJECT / lock).read_text(), re.M):
        versions.setdefault(name, set()).add(version)
    return versions


def left_out_of_the_image() -> set[str]:
    (names,) = re.findall(r"^NOT_IN_IMAGE := (.+(?:\\\n.+)*)$", (PROJECT / "Makefile").read_text(), re.M)
    return set(names.replace("\\", "").split())


def test_the_image_has_the_locked_versions() -> None:
    image, everything = locked_versions("requirements-image.lock"), locked_versions("requirements.lock")
    assert image.pop("tensorflow-cpu") == everything["tensorflow"]
    assert image.items() <= everything.items()
    assert not image.keys() & left_out_of_the_image()


def test_the_service_imports_nothing_that_the_image_leaves_out() -> None:
    """Without those packages, and with the import of every module: a step of the Dockerfile, and the server's start."""
    modules = {
        "libclang": "clang",
        "markdown-it-py": "markdown_it",
        "tensorboard-data-server": "tensorboard_data_server",
    }
    missing = [modules.get(name, name) for name in left_out_of_the_image() - {"tensorflow"}]
    (imports,) = re.findall(r'^RUN /venv/bin/python -c "(.+?)"$', DOCKERFILE, re.M | re.S)
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\n" + imports.replace("\\\n", "")
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""Every route and gRPC method behind tokens: a server process with TLS, the app in another server, a gRPC server."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tensorflow_serving.apis import get_model_status_pb2

from serving.access.policy import ADMIN_METHODS, OPEN_METHODS, OPEN_PATHS
from serving.api.flask_app import ServingApp
from serving.app import make_app
from serving.grpc.access import GuardedHandlers
from serving.grpc.server import GrpcServer
from serving.server_process import Server, free_ports
from serving.settings import Settings
from tests.serving.access.test_tokens import hash_of, write
from tests.serving.certificates import Authority
from tests.serving.conftest import picture
from tests.serving.http.conftest import Client

PREFIX = "/models-api"
ORIGIN = "https://app.example.com"
PREDICT, ADMIN, WRONG = "a-token-to-predict", "a-token-to-reload", "not-a-token"
ANY_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = (f"shop predict {hash_of(PREDICT)}", f"ops admin {hash_of(ADMIN)}")
    return write(tmp_path_factory.mktemp("tokens") / "tokens", *lines)


class Service:
    """The server process, with TLS and tokens."""

    def __init__(self, server: Server, authority: Authority) -> None:
        self.server = server
        self.authority = authority
        self.context = authority.client_context()
        self.url = server.url

    def client(self, base: str = PREFIX, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url + base, verify=self.context, **options)

    def connect(self) -> Client:
        """Open a connection for raw requests."""
        client = Client(int(self.url.rpartition(":")[2]))
        client.socket = self.context.wrap_socket(client.socket, server_hostname="localhost")
        return client

    def find_line(self, text: str) -> str:
        """Wait for the log line with a text, and return it."""
        while True:
            for line in self.server.log.splitlines():
                if text in line:
                    return line
            time.sleep(0.02)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, colours: Path, token_file: Path) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("access")
    shutil.copytree(colours, folder / "models" / "colours" / "7")
    authority = Authority(folder / "tls")
    files = authority.issue()
    server = Server(
        folder / "models",
        tls_cert=files.certificate,
        tls_key=files.key,
        auth_token_file=token_file,
        url_prefix=PREFIX,
        cors_origins=[ORIGIN],
        max_request_bytes=200_000,
        forwarded_allow_ips="127.0.0.1",
        access_log=True,
        allow_model_control=True,
    )
    with server:
        yield Service(server, authority)
        for token in (PREDICT, ADMIN, WRONG):
            assert token not in server.log
        assert server.stop() == 0


def list_routes(app: ServingApp) -> set[tuple[str, str]]:
    """Every method and path of the app, its variables filled in."""
    values = {
        "<model>": "colours",
        "<version>": "7",
        "<path:filename>": "page.js",
        "<rest:_>": "models/colours:predict",
    }
    routes = set()
    for rule in app.url_map.iter_rules():
        path = re.sub("<[^>]*>", lambda match: values.get(match[0], "1"), rule.rule)
        routes |= {(method, path) for method in rule.methods or ANY_METHODS}
    return routes


@pytest.fixture(scope="module")
def closed_routes(token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    """What needs a token: every route but health checks, and paths without a route."""
    routes = list_routes(make_app(Settings(tmp_path_factory.mktemp("models"), auth_token_file=token_file)))
    assert {("POST", "/predict"), ("GET", "/"), ("GET", "/static/page.js"), ("OPTIONS", "/healthz")} <= routes
    assert {("POST", "/v1/models/colours:predict"), ("POST", "/v2/models/colours/infer"), ("GET", "/metrics")} <= routes
    assert ("POST", "/v2/repository/models/colours/unload") in routes
    opened = {(method, path) for path in OPEN_PATHS for method in ("GET", "HEAD")}
    assert opened <= routes
    return routes - opened | {("GET", "/nothing"), ("POST", "/v3"), ("GET", "//healthz"), ("TRACE", "/healthz")}


def check_routes(send: Callable[..., Any], routes: set[tuple[str, str]]) -> None:
    for method, path in sorted(routes):
        for headers in ({}, bearer(WRONG)):
            response = send(method, path, headers=headers)
            assert response.status_code == 401, (method, path)
            assert response.headers["WWW-Authenticate"] == 'Bearer realm="serving"'
        status = send(method, path, headers=bearer(PREDICT)).status_code
        assert status != 401, (method, path)
        is_admin = path.endswith(("/load", "/unload"))
        assert (status == 403) == is_admin, (method, path)
        status = send(method, path.replace("colours", "missing"), headers=bearer(ADMIN)).status_code
        assert status != 401, (method, path)
        assert (status == 403) != is_admin, (method, path)
    for path in sorted(OPEN_PATHS):
        for headers in ({}, bearer(WRONG)):
            assert send("GET", path, headers=headers).status_code in (200, 400, 503), path


def test_no_route_but_health_responds_without_a_token(service: Service, closed_routes: set[tuple[str, str]]) -> None:
    with service.client() as client:
        check_routes(client.request, closed_routes)
    with service.client("") as client:
        for path in OPEN_PATHS:
            assert client.get(path).status_code == 200
        assert client.get("/").status_code == 401
        assert client.get("/", headers=bearer(PREDICT)).status_code == 404


def test_no_route_but_health_responds_in_another_wsgi_server(
    token_file: Path, tmp_path: Path, closed_routes: set[tuple[str, str]]
) -> None:
    client = make_app(Settings(tmp_path, auth_token_file=token_file, allow_model_control=True)).test_client()

    def send(method: str, path: str, headers: dict[str, str]) -> Any:
        return client.open(path, method=method, headers=headers)

    # Werkzeug's test client takes `//healthz` for a host.
    check_routes(send, {route for route in closed_routes if not route[1].startswith("//")})


def test_a_token_gives_access(service: Service) -> None:
    with service.client(headers=bearer(PREDICT)) as client:
        response = client.post("/predict", content=picture("red"), headers={"Content-Type": "image/png"})
        assert response.json()["model"] == {"name": "colours", "version": 7}
        assert client.get("/v1/models/colours").json()["model_version_status"][0]["state"] == "AVAILABLE"
        assert client.get("/v2/models/colours").json()["name"] == "colours"
        metrics = client.get("/metrics").text
    assert re.search(r'serving_requests_total\{.*route="/predict".*\} 1', metrics)


def test_refused_requests_are_counted_without_their_paths(service: Service) -> None:
    with service.client() as client:
        client.get("/a-path-of-an-attacker")
        metrics = client.get("/metrics", headers=bearer(PREDICT)).text
    assert re.search(r'serving_requests_total\{.*route="unrouted",status="401"\}', metrics)
    assert "a-path-of-an-attacker" not in metrics


def test_details_of_readiness_need_a_token(service: Service) -> None:
    with service.client() as client:
        assert client.get("/readyz").json() == {"ready": True}
        assert client.get("/readyz", headers=bearer(PREDICT)).json()["models"][0]["name"] == "colours"


def test_the_page_below_a_prefix_with_a_password(service: Service) -> None:
    with service.client(auth=("", PREDICT), follow_redirects=True) as browser:
        page = browser.get(service.url + PREFIX)
        assert str(page.url) == service.url + PREFIX + "/"
        links = re.findall('(?:href|src)="([^"#]+)"', page.text)
        assert {"static/page.js", "static/page.css"} <= set(links)
        for link in links:
            assert browser.get(page.url.join(link)).status_code == 200, link


def test_pages_of_an_allowed_origin_can_read_every_response(service: Service) -> None:
    url = service.url + PREFIX
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    with service.client(headers={"Origin": ORIGIN}) as client:
        image = bearer(PREDICT) | {"Content-Type": "image/png"}
        responses = [
            client.options(url + "/v1/models/colours:predict", headers=preflight),
            client.get(url + "/v1/models/colours", headers=bearer(PREDICT)),
            client.get(url + "/healthz"),
            client.get(url + "/predict", headers=bearer(PREDICT)),
            client.post(url + "/predict", content=b"x", headers=bearer(PREDICT)),
            client.post(url + "/predict", content=b"x" * 200_001, headers=image),
            client.post(url + "/predict", content=iter([b"x" * 200_001]), headers=image),
            client.get(url + "/nothing", headers=bearer(PREDICT)),
            client.get(url + "/v2", headers=bearer(PREDICT) | {"X-Request-Timeout-S": "x"}),  # refused by the server
            client.get(url + "/v2"),
        ]
    assert [response.status_code for response in responses] == [200, 200, 200, 405, 415, 413, 413, 404, 400, 401]
    for response in responses:
        assert response.headers.get_list("Access-Control-Allow-Origin") == [ORIGIN], response.url
        assert response.headers["Vary"] == "Origin"
    with service.client() as client:
        other = client.get("/healthz", headers={"Origin": "https://evil.example"})
        assert "Access-Control-Allow-Origin" not in other.headers
        # As without CORS, where the origin or the kind of the request is another.
        options = client.options("/v1/models/colours", headers=bearer(PREDICT) | {"Origin": "https://other.example"})
        assert (options.status_code, "Access-Control-Allow-Origin" in options.headers) == (200, False)


@pytest.mark.parametrize("framing", [b"Content-Length: 150000", b"Transfer-Encoding: chunked"])
def test_an_upload_without_a_token_is_refused_before_its_body(service: Service, framing: bytes) -> None:
    with service.connect() as client:
        client.send(b"POST /models-api/predict HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n" + framing + b"\r\n\r\n")
        response = client._read_any("POST")
        assert response.status == 401  # not 100 Continue
        assert response.closes


def test_a_refused_request_whose_body_has_arrived_keeps_the_connection(service: Service) -> None:
    refused = b"POST /models-api/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nGET /"
    with service.connect() as client:
        client.send(refused + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.read("POST").status == 401
        assert client.read().status == 200


def test_the_log_has_the_caller_and_the_address_that_a_trusted_proxy_names(service: Service) -> None:
    for name, headers, status in (("shop", bearer(PREDICT), 200), (None, {}, 401)):
        with service.client(headers=headers) as client:
            response = client.get("/v2", headers={"X-Forwarded-For": "203.0.113.7", "X-Request-ID": f"by-{name}"})
        assert (response.status_code, response.headers["X-Request-ID"]) == (status, f"by-{name}")
        line = service.find_line(f"id=by-{name}")
        assert "203.0.113.7 HTTP GET" in line
        assert ("caller=shop" in line) == (name == "shop")


def test_grpc_with_tls_and_a_token(service: Service) -> None:
    credentials = grpc.ssl_channel_credentials(service.authority.file.read_bytes())
    with grpc.secure_channel(service.server.grpc_address, credentials) as channel:
        call = channel.unary_unary("/tensorflow.serving.ModelService/GetModelStatus")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=60)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = "colours"
        metadata = (("authorization", f"Bearer {PREDICT}"), ("x-forwarded-for", "203.0.113.8"), ("x-request-id", "g1"))
        assert call(request.SerializeToString(), timeout=60, metadata=metadata)
        assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=60) == b"\x08\x01"
    line = service.find_line("id=g1")
    assert "203.0.113.8 gRPC" in line
    assert "caller=shop" in line


class GrpcMethods:
    """A gRPC server with tokens in this process, and the paths of all its methods."""

    def __init__(self, app: ServingApp, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: set[str] = set()
        add = GuardedHandlers.add_generic_rpc_handlers

        def record(guarded: GuardedHandlers, handlers: Any) -> None:
            self.paths |= {path for handler in handlers for path in handler._method_handlers}
            add(guarded, handlers)

        monkeypatch.setattr(GuardedHandlers, "add_generic_rpc_handlers", record)
        (port,) = free_ports(1)
        policy = make_app(settings).policy
        self.server = GrpcServer(
            app.inference,
            app.observer,
            app.memory,
            app.liveness,
            policy,
            address=f"127.0.0.1:{port}",
            threads=1,
            max_message_bytes=200_000,
        )
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")

    def call(
        self, path: str, message: bytes = b"", token: str | None = None, header: tuple[str, str] | None = None
    ) -> tuple[str, Any]:
        """Send one raw message; returns the name of the status code, and the response or the error."""
        metadata = [header] if header else []
        metadata += [("authorization", f"Bearer {token}")] if token else []
        try:
            if path.endswith("/Watch"):  # its stream does not end; one response shows that it is admitted
                response = next(self.channel.unary_stream(path)(message, timeout=60, metadata=metadata))
            else:
                response = self.channel.unary_unary(path)(message, timeout=60, metadata=metadata)
        except grpc.RpcError as error:
            return error.code().name, error
        return "OK", response


@pytest.fixture
def start_grpc(app: ServingApp, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GrpcMethods]]:
    started: list[GrpcMethods] = []

    def start(**options: Any) -> GrpcMethods:
        started.append(GrpcMethods(app, Settings(app.settings.models_dir, **options), monkeypatch))
        return started[-1]

    yield start
    for methods in started:
        methods.channel.close()
        methods.server.stop(grace_s=0)


def test_no_grpc_method_but_health_responds_without_a_token(
    start_grpc: Callable[..., GrpcMethods], token_file: Path
) -> None:
    methods = start_grpc(auth_token_file=token_file)
    known = {"Predict", "GetModelStatus", "HandleReloadConfigRequest", "Check", "ServerReflectionInfo"}
    known |= {"ServerLive", "ModelInfer", "RepositoryModelUnload"}
    assert known <= {path.rpartition("/")[2] for path in methods.paths}
    unknown = {"/tensorflow.serving.PredictionService/Nothing", "/a.Service/Method", "/grpc.health.v1.Health/List"}
    for path in sorted(methods.paths | unknown | ADMIN_METHODS):
        expected = {"OK"} if path in OPEN_METHODS else {"UNAUTHENTICATED"}
        for token in (None, WRONG):
            code, error = methods.call(path, token=token)
            assert code in expected, path
            if code == "UNAUTHENTICATED":
                assert "a valid token is required" in error.details()
        if path in OPEN_METHODS:
            continue
        allowed, other = (ADMIN, PREDICT) if path in ADMIN_METHODS else (PREDICT, ADMIN)
        assert methods.call(path, token=other)[0] == "PERMISSION_DENIED", path
        code, error = methods.call(path, token=allowed)
        assert code != "UNAUTHENTICATED", path
        assert code != "PERMISSION_DENIED" or "--allow-model-control" in error.details(), path  # admitted to a method
        assert path not in unknown or code == "UNIMPLEMENTED"


def test_what_changes_the_models_is_an_admin_method(start_grpc: Callable[..., GrpcMethods]) -> None:
    changing = {path for path in start_grpc().paths if re.search("Load|Unload|Reload|Register|Update|Set", path)}
    assert changing
    assert changing <= ADMIN_METHODS


def test_reflection_works_with_a_token(start_grpc: Callable[..., GrpcMethods], token_file: Path) -> None:
    methods = start_grpc(auth_token_file=token_file)
    stub = reflection_pb2_grpc.ServerReflectionStub(methods.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    metadata = [("authorization", f"Bearer {PREDICT}")]
    (response,) = stub.ServerReflectionInfo(iter([request]), timeout=60, metadata=metadata)
    assert "grpc.health.v1.Health" in {service.name for service in response.list_services_response.service}


def test_a_large_message_without_a_token_is_not_received(
    start_grpc: Callable[..., GrpcMethods], token_file: Path, app: ServingApp
) -> None:
    """A message over the limit would be refused with RESOURCE_EXHAUSTED if it was received."""
    methods = start_grpc(auth_token_file=token_file)
    path = "/tensorflow.serving.PredictionService/Predict"
    assert methods.call(path, bytes(300_000), token=PREDICT)[0] == "RESOURCE_EXHAUSTED"
    assert methods.call(path, bytes(300_000))[0] == "UNAUTHENTICATED"
    assert app.memory.used_bytes == 0


def test_the_rate_limit_of_grpc(start_grpc: Callable[..., GrpcMethods], token_file: Path, app: ServingApp) -> None:
    methods = start_grpc(auth_token_file=token_file, rate_limit=0.01)
    path = "/tensorflow.serving.ModelService/GetModelStatus"
    assert methods.call(path, token=PREDICT)[0] == "INVALID_ARGUMENT"
    code, error = methods.call(path, token=PREDICT)
    assert code == "RESOURCE_EXHAUSTED"
    assert b'serving_shed_requests_total{reason="rate_limit"} 1.0' in app.metrics.render()
    trailer = dict(error.trailing_metadata())
    assert 90 <= int(trailer["retry-after"]) <= 100
    assert methods.call("/tensorflow.serving.ModelService/HandleReloadConfigRequest", token=ADMIN)[0] != code
    for _ in range(2):
        message = health_pb2.HealthCheckRequest().SerializeToString()
        assert methods.call("/grpc.health.v1.Health/Check", message)[0] == "OK"


def test_without_tokens_only_local_callers_reload(start_grpc: Callable[..., GrpcMethods]) -> None:
    reload = "/tensorflow.serving.ModelService/HandleReloadConfigRequest"
    local = start_grpc(forwarded_allow_ips="127.0.0.1")
    assert local.call(reload)[0] == "INVALID_ARGUMENT"  # an empty configuration
    for header in (("x-forwarded-for", "127.0.0.1"), ("forwarded", "for=127.0.0.1"), ("via", "2 proxy")):
        code, error = local.call(reload, header=header)
        assert code == "PERMISSION_DENIED"
        assert "--auth-token-file or --allow-remote-reload" in error.details()
        code, error = local.call("/inference.GRPCInferenceService/RepositoryModelUnload", header=header)
        assert (code, "--allow-remote-reload" in error.details()) == ("PERMISSION_DENIED", True)
    anyone = start_grpc(allow_remote_reload=True)
    assert anyone.call(reload, header=("x-forwarded-for", "203.0.113.7"))[0] == "INVALID_ARGUMENT"

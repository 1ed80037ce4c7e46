"""deploy/proxies: nginx's configuration before a running service; the others' paths, ports and limits."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

import serving
from client import Client, GrpcClient
from serving.api.flask_app import ServingApp
from serving.grpc.open_inference import LONG_METHODS
from serving.server_process import free_ports
from serving.settings import Settings
from tests.serving.certificates import Authority
from tests.serving.conftest import picture
from tests.serving.http.conftest import Client as RawClient
from tests.serving.http.conftest import head, noisy_png

PROXIES = Path(__file__).parents[2] / "deploy" / "proxies"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
ENVOY = yaml.safe_load((PROXIES / "envoy.yaml").read_text())
TRAEFIK = yaml.safe_load((PROXIES / "traefik.yaml").read_text())
TRAEFIK_ROUTES = yaml.safe_load((PROXIES / "traefik-routes.yaml").read_text())
CLOSED = {
    "/metrics",
    "/monitoring/prometheus/metrics",
    "/v2/repository",
    "/tensorflow.serving.ModelService/HandleReloadConfigRequest",
    *(f"/inference.GRPCInferenceService/{method}" for method in LONG_METHODS),
}


class Proxy:
    """nginx before a service."""

    def __init__(self, port: int, authority: Authority, service: serving.Server) -> None:
        self.authority, self.service = authority, service
        self.url, self.address = f"https://127.0.0.1:{port}", f"127.0.0.1:{port}"

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.authority.client_context(), timeout=60)


@contextmanager
def run_nginx(folder: Path, *, rest: str, grpc_port: str) -> Iterator[tuple[int, Authority]]:
    """Run nginx with its configuration in front of these ports; yield its port and the authority of its certificate."""
    if not NGINX:
        pytest.skip("nginx is not installed")
    authority = Authority(folder / "certs")
    authority.issue()
    (port,) = free_ports(1)
    text = (PROXIES / "nginx.conf").read_text()
    for ours, theirs in (("8443", str(port)), ("8501", rest), ("8500", grpc_port), ("/tmp/", f"{folder}/")):
        assert ours in text
        text = text.replace(ours, theirs)
    (folder / "nginx.conf").write_text(text)
    user = "user root;" if os.geteuid() == 0 else ""
    command = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", f"daemon off; {user}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not is_open(port):
            if process.poll() is not None:
                pytest.fail(process.stderr.read() if process.stderr else "")
            time.sleep(0.02)
        try:
            yield port, authority
        finally:
            process.terminate()
            _, errors = process.communicate(timeout=20)
    assert all("too large body" in line for line in errors.splitlines()), errors


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("nginx")
    if not NGINX:
        pytest.skip("nginx is not installed")
    shutil.copytree(colours, folder / "models" / "colours" / "7")
    with serving.Server(folder / "models") as service:
        rest, grpc_port = (address.rpartition(":")[2] for address in (service.url, service.grpc_address))
        with run_nginx(folder, rest=rest, grpc_port=grpc_port) as (port, authority):
            yield Proxy(port, authority, service)


class Echo(BaseHTTPRequestHandler):
    """Responds with the headers of the request."""

    def do_GET(self) -> None:
        body = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_what_clients_claim_of_their_address_is_replaced(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), Echo) as echo:
        threading.Thread(target=echo.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        with run_nginx(tmp_path, rest=str(echo.server_port), grpc_port="1") as (port, authority):
            claimed = {"X-Forwarded-For": "9.9.9.9", "X-Forwarded-Proto": "http", "Host": "models.example.org"}
            context = authority.client_context()
            got = httpx.get(f"https://127.0.0.1:{port}/", headers=claimed, verify=context).json()
        echo.shutdown()
    assert (got["x-forwarded-for"], got["x-forwarded-proto"], got["host"]) == (
        "127.0.0.1",
        "https",
        "models.example.org",
    )


def test_predictions_over_http_and_grpc_through_one_port(proxy: Proxy) -> None:
    with Client(proxy.url, verify=proxy.authority.client_context()) as client:
        assert [each.label for each in client.predict([picture("blue"), picture("red")])] == ["blue", "red"]
    credentials = grpc.ssl_channel_credentials(proxy.authority.file.read_bytes())
    with GrpcClient(proxy.address, model="colours", credentials=credentials) as grpc_client:
        assert grpc_client.predict(picture("green"))[0].label == "green"
        assert grpc_client.status().ready
    with grpc.secure_channel(proxy.address, credentials) as channel:
        answer = channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10)
        assert answer == b"\x08\x01"  # SERVING
        assert channel.unary_unary("/inference.GRPCInferenceService/ServerReady")(b"", timeout=10) == b"\x08\x01"


def test_connections_to_the_service_are_kept_and_large_uploads_pass(proxy: Proxy) -> None:
    with proxy.http() as http:
        for _ in range(3):
            response = http.post("/predict", content=noisy_png(), headers={"Content-Type": "image/png"})
            assert response.status_code == 200
        assert http.get("/readyz").json()["ready"]
        assert http.get("/").headers["content-type"].startswith("text/html")


def test_a_body_over_the_limit_is_refused_by_the_proxy(proxy: Proxy) -> None:
    with RawClient(int(proxy.address.rpartition(":")[2])) as client:
        client.socket = proxy.authority.client_context().wrap_socket(client.socket, server_hostname="localhost")
        client.send(head("/predict", b"Content-Length: %d" % (Settings.max_request_bytes + 1)))
        assert client.read().status == 413


@pytest.mark.parametrize("path", sorted(CLOSED))
def test_what_is_for_operators_is_closed(proxy: Proxy, path: str) -> None:
    with proxy.http() as http:
        served_elsewhere = "/" if path.count(".") == 0 else ""  # the service ignores a slash at the end
        for each in (path, path + served_elsewhere, path.replace("e", "%65")):
            assert http.get(each).status_code == 404
            assert "nginx" in http.get(each).text
    credentials = grpc.ssl_channel_credentials(proxy.authority.file.read_bytes())
    with grpc.secure_channel(proxy.address, credentials) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(path if path.count("/") == 2 else "/x" + path)(b"", timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def envoy_routes() -> list[dict[str, Any]]:
    manager = ENVOY["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    (host,) = manager["route_config"]["virtual_hosts"]
    routes: list[dict[str, Any]] = host["routes"]
    return routes


def test_every_proxy_closes_the_same_paths() -> None:
    closed = [route["match"] for route in envoy_routes() if route.get("direct_response") == {"status": 404}]
    assert {path for match in closed for path in match.values()} == CLOSED
    assert set(re.findall("`([^`]+)`", TRAEFIK_ROUTES["http"]["routers"]["operators"]["rule"])) == CLOSED
    nginx = (PROXIES / "nginx.conf").read_text()
    assert set(re.findall(r"location =? ?(\S+) \{ return 404; \}", nginx)) == CLOSED


def test_the_paths_exist_in_the_service(app: ServingApp) -> None:
    """Those of health checks and of operators, so that a renamed one is noticed."""
    rules = {rule.rule for rule in app.url_map.iter_rules()}
    assert {"/metrics", "/monitoring/prometheus/metrics", "/readyz"} <= rules
    assert any(rule.startswith("/v2/repository/") for rule in rules)
    checks = [cluster["health_checks"][0] for cluster in ENVOY["static_resources"]["clusters"]]
    assert checks[0]["http_health_check"] == {"path": "/readyz"}
    assert TRAEFIK_ROUTES["http"]["services"]["rest"]["loadBalancer"]["healthCheck"]["path"] == "/readyz"


def test_ports_and_limits_are_those_of_the_service() -> None:
    ports = {"rest": Settings.rest_port, "grpc": Settings.grpc_port}
    text = (PROXIES / "envoy.yaml").read_text()
    for cluster in ENVOY["static_resources"]["clusters"]:
        endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
        assert endpoint["address"]["socket_address"]["port_value"] == ports[cluster["name"]]
    for name, service in TRAEFIK_ROUTES["http"]["services"].items():
        assert service["loadBalancer"]["servers"][0]["url"].endswith(f":{ports[name]}")
    nginx = (PROXIES / "nginx.conf").read_text()
    assert f"client_max_body_size {Settings.max_request_bytes // 2**20}m;" in nginx
    assert f"max_request_bytes: {Settings.max_request_bytes} " in text
    limit = TRAEFIK_ROUTES["http"]["middlewares"]["body-limit"]["buffering"]["maxRequestBodyBytes"]
    assert limit == Settings.max_request_bytes
    timeouts = [route["route"]["timeout"] for route in envoy_routes() if "route" in route]
    timeouts += re.findall(r"_read_timeout (\S+);", nginx)
    timeouts += [TRAEFIK["serversTransport"]["forwardingTimeouts"]["responseHeaderTimeout"]]
    assert len(timeouts) == 5
    assert all(int(timeout.removesuffix("s")) > Settings.request_timeout_s for timeout in timeouts)

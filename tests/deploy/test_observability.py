"""deploy/observability/: the rules and the dashboard, with promtool and a stock Prometheus."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from scripts.prometheus import OBSERVABILITY, Prometheus, fill_in, find_missing, read_panels
from tests.serving.conftest import Server, picture
from tests.serving.saved_models import save_colour_classifier

needs_prometheus = pytest.mark.skipif(find_missing() is not None, reason=f"{find_missing()}")

# These have no data before something happens, or for a model without a reference of its validation images.
DRIFT = {"Drift", "Predicted classes", "Mean confidence"}
RULES: list[dict[str, Any]] = yaml.safe_load((OBSERVABILITY / "alerts.yml").read_text())["groups"][0]["rules"]
ADAPTER: list[dict[str, Any]] = yaml.safe_load((OBSERVABILITY / "prometheus-adapter.yaml").read_text())["rules"][
    "custom"
]
PANELS = [panel for panel in read_panels() if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
METRIC = re.compile(r"\b((?:serving|process|python)_[a-z_]+)\b(?=[{\[ )]|$)")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service that has responded to a few requests."""
    folder = tmp_path_factory.mktemp("observed")
    save_colour_classifier(folder / "models" / "colours" / "1")
    server = Server(folder / "models", folder / "log")
    try:
        server.wait_for("/readyz")
        predict(server)
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def predict(server: Server) -> None:
    for data, status in ((picture("red"), 200), (picture("red", (40, 30)), 200), (b"no picture", 400)):
        response = httpx.post(server.url + "/predict", content=data, headers={"Content-Type": "image/png"})
        assert response.status_code == status


@needs_prometheus
def test_promtool_accepts_the_configuration_and_the_tests_of_the_rules_pass() -> None:
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(["promtool", *command], cwd=OBSERVABILITY, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    cases: dict[str, list[bool]] = {}
    for test in yaml.safe_load((OBSERVABILITY / "alerts_test.yml").read_text())["tests"]:
        for each in test["alert_rule_test"]:
            cases.setdefault(each["alertname"], []).append(bool(each["exp_alerts"]))
    assert {name: sorted(fires) for name, fires in cases.items()} == {rule["alert"]: [False, True] for rule in RULES}


def test_each_alert_is_documented() -> None:
    page = (OBSERVABILITY.parents[1] / "docs" / "observability.md").read_text()
    documented = dict(re.findall(r"^\| (Serving\w+) \| .* \| (\w+) \|$", page, re.MULTILINE))
    assert documented == {rule["alert"]: rule["labels"]["severity"] for rule in RULES}


def test_rules_and_dashboard_use_only_metrics_that_exist(server: Server) -> None:
    page = httpx.get(server.url + "/metrics").text
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE))
    existing = {"up", *types}
    for name, kind in types.items():
        existing |= {name + suffix for suffix in ("_bucket", "_sum", "_count") if kind == "histogram"}
    adapted = [rule[key] for rule in ADAPTER for key in ("seriesQuery", "metricsQuery")]
    queries = [*QUERIES, *adapted, *(rule["expr"] for rule in RULES)]
    used = {name for query in queries for name in METRIC.findall(query)}
    assert len(used) > 25
    assert used <= existing


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    cells = [
        (x, y)
        for panel in read_panels()
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert {x for x, _ in cells} == {*range(24)}


@needs_prometheus
def test_a_stock_prometheus_scrapes_the_service_and_evaluates_every_rule_and_panel(
    server: Server, tmp_path: Path
) -> None:
    with Prometheus(f"127.0.0.1:{server.port}", tmp_path, interval="200ms") as prometheus:
        prometheus.wait_until_scraped()
        (target,) = prometheus.get("targets")["activeTargets"]
        assert (target["health"], target["lastError"]) == ("up", "")
        (group,) = prometheus.get("rules")["groups"]
        health = {rule["name"]: (rule["health"], rule.get("lastError", "")) for rule in group["rules"]}
        assert health == {rule["alert"]: ("ok", "") for rule in RULES}
        assert {alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"]} <= {"ServingErrors"}
        for rule in ADAPTER:  # also before anything has waited
            (result,) = prometheus.get("query", query=fill_in_adapter(rule["metricsQuery"]))["result"]
            assert (list(result["metric"]), float(result["value"][1]) >= 0) == (["job"], True), rule["name"]
        predict(server)  # rates need a change between two scrapes
        server.wait_until(lambda: find_empty_panels(prometheus) <= {"Shed requests", "Problems of versions", *DRIFT})


def test_the_rules_of_the_adapter_have_the_fields_that_it_knows() -> None:
    """Those of `DiscoveryRule` in prometheus-adapter's configuration."""
    for rule in ADAPTER:
        assert rule.keys() == {"seriesQuery", "resources", "name", "metricsQuery"}
        assert rule["resources"] == {"overrides": {kind: {"resource": kind} for kind in ("namespace", "pod")}}
        assert {'namespace!=""', 'pod!=""'} <= set(re.split("[{},]", rule["seriesQuery"]))
        assert set(re.findall("<<[^>]*>>", rule["metricsQuery"])) == {"<<.GroupBy>>", "<<.LabelMatchers>>"}


@needs_prometheus
def test_the_metric_of_the_queue_wait_is_the_mean_of_all_requests(tmp_path: Path) -> None:
    """Requests at 4/s, half of which wait for 50 ms: 25 ms. Without requests it is 0."""
    (rule,) = [rule for rule in ADAPTER if rule["name"]["as"] == "serving_queue_wait_seconds"]
    expression = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'namespace="a"')
    samples = {
        'serving_queue_seconds_sum{namespace="a",pod="busy"}': "0+6x10",  # in a minute
        'serving_request_rows_count{namespace="a",pod="busy"}': "0+240x10",
        'serving_requests_in_flight{namespace="a",pod="busy"}': "1x10",
        'serving_requests_in_flight{namespace="a",pod="idle"}': "1x10",
    }
    case = {
        "interval": "1m",
        "input_series": [{"series": series, "values": values} for series, values in samples.items()],
        "promql_expr_test": [
            {
                "expr": expression,
                "eval_time": "8m",
                "exp_samples": [
                    {"labels": '{pod="busy"}', "value": 0.025},
                    {"labels": '{pod="idle"}', "value": 0},
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"tests": [case]}))
    done = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def fill_in_adapter(query: str) -> str:
    """Replace the adapter's variables; the Prometheus of the test has no pods, so that a job stands for one."""
    return query.replace("<<.GroupBy>>", "job").replace("<<.LabelMatchers>>", 'job="serving"')


def find_empty_panels(prometheus: Prometheus) -> set[str]:
    """Run all queries of the dashboard; returns the titles of the panels without a result."""
    return {
        panel["title"]
        for panel in PANELS
        if not any(
            prometheus.get("query", query=fill_in(each["expr"], rate_interval="1m"))["result"]
            for each in panel["targets"]
        )
    }

"""Rules and dashboard against real servers: every name exists, and a real Prometheus has an answer to every query."""

import math
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from queries import Scrape, metric_names
from shipped import CONFIG, RULES, Query, Rule, Variable, queries, rules, variables

from server.admin_schema import ProfileSpec
from server.errors import ErrorCode
from server.metrics.operation_counters import INTERNAL

pytestmark = pytest.mark.engine

ONE, TWO = "scraped-one", "scraped-two"
START_TIMEOUT_S, SCRAPE_TIMEOUT_S, REQUEST_TIMEOUT_S = 60, 60, 30
NUM_ROUNDS = 4
# Labels whose values have no series before they occur.
LATER_VALUES = {"reason": [*(code.value for code in ErrorCode), INTERNAL]}


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self._client = httpx.Client(base_url=f"{url}/api/v1", timeout=REQUEST_TIMEOUT_S, trust_env=False)
        self._process, self._log = process, log

    def get(self, path: str, **parameters: str) -> Any:
        """Data of an answer, which must be a success without warnings."""
        answer = self._client.get(path, params=parameters).json()
        assert answer["status"] == "success", answer
        assert not answer.get("warnings"), answer
        return answer["data"]

    def values(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of an expression now."""
        result = self.get("/query", query=expression)["result"]
        return [(sample["metric"], float(sample["value"][1])) for sample in result]

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = SCRAPE_TIMEOUT_S) -> None:
        """Wait for something that the next scrapes bring."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, f"{what}\n{self._log.read_text()}"
            time.sleep(0.2)

    def answers(self) -> bool:
        """Whether it takes queries."""
        try:
            return bool(self._client.get("/status/runtimeinfo").status_code == httpx.codes.OK)
        except httpx.TransportError:
            return False

    def close(self) -> None:
        """Close the client."""
        self._client.close()


def start(path: str, target: str, folder: Path) -> tuple[subprocess.Popen[bytes], str, Path]:
    """Start it with the shipped configuration, but for the target and how often it looks."""
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "1s"}
    assert config["rule_files"] == [RULES.name]
    config["rule_files"] = [str(RULES)]
    [job] = config["scrape_configs"]
    [group] = job["static_configs"]
    group["targets"] = [target]
    changed, log = folder / "prometheus.yml", folder / "log"
    changed.write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [path, f"--config.file={changed}", f"--storage.tsdb.path={folder / 'data'}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}", "--log.level=warn"], stdout=output, stderr=output
        )
    return process, f"http://{address}", log


def make_traffic(operated: Any, bundle_files: dict[str, Path], prompt: list[int]) -> None:
    """Something of everything: steered and other requests, refusals, changes that succeed and that do not."""
    server, admin = operated.server, operated.admin
    digests = [admin.upload(bundle_files[name]).digest for name in ("careful", "late")]
    for name, digest in zip((ONE, TWO), digests, strict=True):
        admin.put_profile(name, ProfileSpec(bundle=digest))
    admin.put_profile(ONE, ProfileSpec(bundle=digests[0], strength=0.25))
    admin.rollback(ONE)
    for _ in range(NUM_ROUNDS):
        server.complete(prompt, max_tokens=4)
        for name in (ONE, TWO):
            server.complete(prompt, max_tokens=4, steering_profile=name)
    refused = server.post("/v1/completions", {"model": "lab", "prompt": "x", "steering_profile": "scraped-none"})
    assert refused.json()["error"]["code"] == ErrorCode.PROFILE_NOT_FOUND.value
    headers = {"content-type": "application/octet-stream", "x-steering-digest": f"sha256:{'0' * 64}"}
    damaged = server.client.post("/v1/steering/bundles", content=bundle_files["careful"].read_bytes(), headers=headers)
    assert damaged.json()["error"]["code"] == ErrorCode.DIGEST_MISMATCH.value


@pytest.fixture(scope="module")
def served(operated: Any, bundle_files: dict[str, Path], text_tokens: list[int]) -> Iterator[Callable[[], None]]:
    """Make traffic; afterwards the server is as it was."""
    yield lambda: make_traffic(operated, bundle_files, text_tokens[:100])
    for profile in operated.admin.profiles():
        operated.admin.delete_profile(profile.name)
    for bundle in operated.admin.bundles():
        operated.admin.delete_bundle(bundle.digest, drain=True)


@pytest.fixture(scope="module")
def target(operated: Any) -> str:
    """Address of the server, as a target of Prometheus."""
    return str(operated.server.url.removeprefix("http://"))


@pytest.fixture(scope="module")
def prometheus(
    program: Callable[[str], str],
    operated: Any,
    target: str,
    served: Callable[[], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Prometheus]:
    """Prometheus that watched the traffic from its beginning."""
    process, url, log = start(program("prometheus"), target, tmp_path_factory.mktemp("prometheus"))
    running = Prometheus(url, process, log)
    try:
        running.wait_for(running.answers, "Prometheus does not answer", START_TIMEOUT_S)
        running.wait_for(lambda: bool(running.values("steering_ready")), "nothing was scraped")
        # Twice, for a rate is what a series grows by after it was first seen.
        for _ in range(2):
            served()
            ended = f"sum(steering_requests_total) >= {operated.server.metric('steering_requests_total')}"
            running.wait_for(lambda ended=ended: bool(running.values(ended)), "the traffic was not scraped")
        # For one bundle of the traffic was damaged.
        firing = 'ALERTS{alertname="ExpertsteerBundleNotTrusted", alertstate="firing"}'
        running.wait_for(lambda: bool(running.values(firing)), "the rules were not evaluated")
        yield running
    finally:
        running.close()
        process.terminate()
        process.wait(START_TIMEOUT_S)


@pytest.fixture(scope="module")
def scrape(operated: Any, served: Callable[[], None]) -> Scrape:
    """Metrics of a server that has seen a failure, with the series of the recording rules."""
    served()
    scraped = Scrape(operated.server.client.get("/metrics").text, LATER_VALUES)
    for rule in rules():
        if not rule.is_alert:
            scraped.record(rule.name, rule.expression)
    return scraped


@pytest.mark.parametrize("query", queries(), ids=lambda query: f"{query.panel}: {query.written}")
def test_query_is_answered(prometheus: Prometheus, query: Query) -> None:
    found = prometheus.values(query.expression)
    # A quantile of what did not happen is no number; the traffic made something happen in each panel.
    assert any(math.isfinite(value) for _, value in found), found
    for labels, _ in found:
        assert query.legend_labels <= labels.keys()


@pytest.mark.parametrize("query", queries(), ids=lambda query: f"{query.panel}: {query.written}")
def test_query_names_what_exists(scrape: Scrape, query: Query) -> None:
    assert query.legend_labels <= scrape.labels_of(query.expression)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.name)
def test_rule_names_what_exists(scrape: Scrape, rule: Rule) -> None:
    assert rule.template_labels <= scrape.labels_of(rule.expression)


@pytest.mark.parametrize("variable", variables(), ids=lambda variable: variable.name)
def test_variable_lists_something(prometheus: Prometheus, target: str, variable: Variable) -> None:
    values = prometheus.get(f"/label/{variable.label}/values", **{"match[]": variable.selector})
    expected = {"job": {"expertsteer"}, "model": {"lab"}, "instance": {target}, "profile": {ONE, TWO, "other"}}
    assert set(values) == expected[variable.name]


def test_values(prometheus: Prometheus) -> None:
    """What the panels show is what was done."""
    shown = {query.panel: prometheus.values(query.expression) for query in queries()}

    def by(panel: str, label: str) -> dict[str, float]:
        return {labels[label]: value for labels, value in shown[panel]}

    requests = by("Steered requests by profile", "profile")
    assert requests[ONE] > 0 and requests[TWO] > 0
    outcomes = by("Steered requests by outcome", "outcome")
    assert outcomes["ok"] > 0 and outcomes["refused"] > 0 and outcomes["failed"] == 0
    phases = {
        (labels["profile"], labels["phase"]): value for labels, value in shown["Steered tokens by profile and phase"]
    }
    assert phases[ONE, "prompt"] > phases[ONE, "generation"] > 0
    assert by("Refusals by code", "code").keys() == {ErrorCode.PROFILE_NOT_FOUND.value}
    assert ("bundle.add", ErrorCode.DIGEST_MISMATCH.value) in {
        (labels["operation"], labels["reason"]) for labels, _ in shown["Refused and failed operations by reason"]
    }
    # The same prompt was asked again and again.
    hits = by("Hit rate, steered and not", "steered")
    assert 0 < hits["true"] <= 1 and 0 < hits["false"] <= 1
    for panel in ("Generation lag", "Receipt mismatches"):
        assert [value for _, value in shown[panel]] == [0]
    for panel in ("Ready", "Self-test", "Declaration"):
        assert [value for _, value in shown[panel]] == [1]


def test_rules_are_evaluated(prometheus: Prometheus) -> None:
    evaluated = [rule for group in prometheus.get("/rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in evaluated} == {rule.name for rule in rules()}
    assert {rule["health"] for rule in evaluated} == {"ok"}


def test_alerts_of_a_healthy_server(prometheus: Prometheus, target: str) -> None:
    """Only what the traffic did is said."""
    alerts = prometheus.get("/alerts")["alerts"]
    firing = {alert["labels"]["alertname"]: alert for alert in alerts if alert["state"] == "firing"}
    # Other tests had this server refuse bundles before, and on a busy machine a scrape may run into its time limit.
    assert firing.keys() - {"ExpertsteerLoadFailed", "ExpertsteerRestarting"} == {"ExpertsteerBundleNotTrusted"}
    alert = firing["ExpertsteerBundleNotTrusted"]
    assert alert["labels"]["severity"] == "critical"
    assert f"ended with {ErrorCode.DIGEST_MISMATCH.value} on {target}" in alert["annotations"]["description"]


def test_names_on_a_server_without_a_registry(eager: Any) -> None:
    text = eager.client.get("/metrics").text
    exposed = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    expressions = [query.expression for query in queries()] + [rule.expression for rule in rules()]
    asked = {name for expression in expressions for name in metric_names(expression)}
    made = {"up", "ALERTS"} | {rule.name for rule in rules()}
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in asked - made} <= exposed

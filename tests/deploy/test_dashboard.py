"""The dashboard's form: everything in its place, described, and bound to the variables."""

import re
from itertools import combinations
from typing import Any

import promql_parser
import pytest
import yaml
from promql_parser import MatrixSelector, VectorSelector
from queries import metric_names
from shipped import CONFIG, PROVISIONING, Query, dashboard, panels, queries, rules, variables

from server.metrics.series import SERIES

NUM_COLUMNS, MAX_UID = 24, 40
# Series that no panel shows, and why.
NOT_SHOWN: dict[str, str] = {}


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    place = panel["gridPos"]
    columns = range(place["x"], place["x"] + place["w"])
    return {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}


def base_name(name: str) -> str:
    return re.sub(r"_(bucket|count|sum)$", "", name)


def test_panels_do_not_overlap() -> None:
    placed = dashboard()["panels"]
    for left, right in combinations(placed, 2):
        assert not cells(left) & cells(right), (left["title"], right["title"])
    assert all(0 <= x < NUM_COLUMNS for panel in placed for x, _ in cells(panel))
    lines = {y for panel in placed for _, y in cells(panel)}
    assert lines == set(range(len(lines))), "there are empty lines"


def test_identity() -> None:
    board = dashboard()
    assert 0 < len(board["uid"]) <= MAX_UID
    assert "id" not in board, "a number of one Grafana would make the import fail elsewhere"
    # Of the Grafana in deploy/compose; newer ones migrate it by themselves, older ones are not sure to read it.
    assert board["schemaVersion"] == 41
    for key in ("id", "title"):
        values = [panel[key] for panel in board["panels"]]
        assert len(set(values)) == len(values), key


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_panel(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    references = [target["refId"] for target in panel["targets"]]
    assert references
    assert len(set(references)) == len(references)
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
        assert target["legendFormat"] or panel["type"] == "table"


@pytest.mark.parametrize("query", queries(), ids=lambda query: f"{query.panel}: {query.written}")
def test_query_follows_the_variables(query: Query) -> None:
    wanted = {"job": "$job", "instance": "$instance"}

    def visit(node: Any) -> None:
        selector = node.vector_selector if isinstance(node, MatrixSelector) else node
        if isinstance(selector, VectorSelector):
            found = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
            assert wanted.items() <= {**found, "instance": found["instance"].removesuffix("|")}.items()
            assert ("model_name" in found) == str(selector.name).startswith("vllm:")
            assert found.get("model_name", "$model") == "$model"
            assert found.get("profile", "$profile") == "$profile"

    # The parser takes a variable for text between quotes, but not as a range.
    promql_parser.walk(promql_parser.parse(query.written.replace("$__rate_interval", "5m")), visit)
    assert set(re.findall(r"\[(.+?)\]", query.written)) <= {"$__rate_interval"}


def test_variables() -> None:
    listed = dashboard()["templating"]["list"]
    assert [each["name"] for each in listed] == ["datasource", "job", "model", "instance", "profile"]
    assert listed[0]["type"] == "datasource"
    assert all(each["datasource"]["uid"] == "${datasource}" for each in listed[1:])
    assert len(variables()) == 4


def test_every_series_is_shown() -> None:
    shown = {base_name(name) for query in queries() for name in metric_names(query.expression)}
    missing = {series.name for series in SERIES} - shown
    assert missing == NOT_SHOWN.keys()


def test_dashboard_works_without_the_rules() -> None:
    recorded = {rule.name for rule in rules() if not rule.is_alert}
    assert not recorded & {name for query in queries() for name in metric_names(query.expression)}


def test_provisioning() -> None:
    [source] = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    interval = yaml.safe_load(CONFIG.read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval
    [provider] = yaml.safe_load((PROVISIONING / "dashboards" / "expertsteer.yaml").read_text())["providers"]
    assert provider["options"]["path"].startswith("/")
    assert not provider["allowUiUpdates"], "a change in the browser would be lost with the container"

"""Alert rules and dashboard that deploy/ ships, read from their files."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
RULES, RULE_TESTS, CONFIG = PROMETHEUS / "alerts.yaml", PROMETHEUS / "alerts_test.yaml", PROMETHEUS / "prometheus.yml"
DASHBOARD = DEPLOY / "grafana" / "expertsteer.json"
PROVISIONING = DEPLOY / "grafana" / "provisioning"

# What Grafana puts for its variables when everything is chosen and a scrape comes every second.
_VARIABLES = {"job": ".*", "instance": ".*", "model": ".*", "profile": ".*", "__rate_interval": "5m"}
_LABEL_VALUES = re.compile(r"label_values\((?P<selector>.+), (?P<label>\w+)\)")


@dataclass(frozen=True)
class Rule:
    """A recording rule or an alert."""

    name: str
    expression: str
    is_alert: bool
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def template_labels(self) -> set[str]:
        """Labels that its texts name."""
        return set(re.findall(r"\$labels\.(\w+)", " ".join(self.annotations.values())))


@dataclass(frozen=True)
class Query:
    """An expression of the dashboard.

    Attributes:
        panel: title of the panel or name of the annotation.
        written: the expression as it stands in the file.
        legend: of its lines.
    """

    panel: str
    written: str
    legend: str

    @property
    def expression(self) -> str:
        """PromQL, with Grafana's variables replaced."""
        return fill(self.written)

    @property
    def legend_labels(self) -> set[str]:
        """Labels that the legend names."""
        return set(re.findall(r"{{(\w+)}}", self.legend))


@dataclass(frozen=True)
class Variable:
    """A variable of the dashboard that lists the values of a label."""

    name: str
    selector: str
    label: str


def fill(expression: str) -> str:
    """Replace Grafana's variables.

    Raises:
        KeyError: there is no such variable.
    """
    return re.sub(r"\$(\w+)", lambda found: _VARIABLES[found[1]], expression)


def rules() -> list[Rule]:
    """Rules in the order of the file."""
    return [
        Rule(
            each.get("alert") or each["record"],
            each["expr"],
            "alert" in each,
            each.get("labels", {}),
            each.get("annotations", {}),
        )
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for each in group["rules"]
    ]


def alerts() -> list[Rule]:
    """The alerts among the rules."""
    return [rule for rule in rules() if rule.is_alert]


def dashboard() -> dict[str, Any]:
    """The dashboard."""
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


def panels() -> list[dict[str, Any]]:
    """Panels that show something, so without the rows' headings."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[Query]:
    """Expressions of panels and annotations."""
    return list(_queries())


def _queries() -> Iterator[Query]:
    for panel in panels():
        for target in panel["targets"]:
            yield Query(panel["title"], target["expr"], target["legendFormat"])
    for annotation in dashboard()["annotations"]["list"]:
        if "expr" in annotation:
            yield Query(annotation["name"], annotation["expr"], annotation["titleFormat"] + annotation["textFormat"])


def variables() -> list[Variable]:
    """Variables that ask Prometheus, with other variables in their selectors replaced."""
    found = []
    for each in dashboard()["templating"]["list"]:
        if each["type"] == "query":
            match = _LABEL_VALUES.fullmatch(each["query"]["query"])
            assert match is not None, each["query"]
            found.append(Variable(each["name"], fill(match["selector"]), match["label"]))
    return found

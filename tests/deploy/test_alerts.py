"""Alert rules: valid, complete, and each seen firing and not firing by Prometheus' own tool."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from shipped import CONFIG, RULE_TESTS, RULES, Rule, alerts, rules

OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"


def promtool(path: str, *arguments: str | Path) -> None:
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def headings(text: str) -> set[str]:
    """Anchors of a Markdown page."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_rules_and_configuration_are_valid(program: Callable[[str], str]) -> None:
    promtool(program("promtool"), "check", "config", CONFIG)
    promtool(program("promtool"), "check", "rules", RULES)


def test_alerts_fire_when_they_should(program: Callable[[str], str]) -> None:
    promtool(program("promtool"), "test", "rules", RULE_TESTS)


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert.name)
def test_each_alert_is_tested_both_ways(alert: Rule) -> None:
    checks = [
        check
        for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]
        for check in test["alert_rule_test"]
        if check["alertname"] == alert.name
    ]
    assert {bool(check["exp_alerts"]) for check in checks} == {True, False}


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert.name)
def test_each_alert_says_what_to_do(alert: Rule) -> None:
    assert alert.labels["severity"] in ("critical", "warning")
    assert alert.annotations.keys() == {"summary", "description", "runbook"}
    assert "$value" in alert.annotations["description"]
    assert "$value" not in alert.annotations["summary"]
    page, _, anchor = alert.annotations["runbook"].partition("#")
    assert page == "docs/operating.md"
    assert anchor == alert.name.lower()


def test_each_alert_is_an_incident_of_the_operating_guide() -> None:
    anchors = headings(OPERATING.read_text())
    assert [alert.name for alert in alerts() if alert.name.lower() not in anchors] == []


def test_names() -> None:
    names = [rule.name for rule in rules()]
    assert len(set(names)) == len(names)
    # Colons mark recording rules: level, metric, operation.
    assert all((rule.name.count(":") == 2) == (not rule.is_alert) for rule in rules())
    assert all(rule.name.startswith("Expertsteer") for rule in alerts())

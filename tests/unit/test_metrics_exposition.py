"""The text of a scrape: sums over members, names and types as Prometheus wants them, documents that agree."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from artifacts.manifest import Scope
from server.engine.counters import CacheTokens, EngineCounters, HostTime, RankCounters, ReplicaCounters
from server.engine.ended import Ended
from server.engine.steering import Steering
from server.metrics.exposition import render
from server.metrics.figures import NO_ENGINE, StateFigures
from server.metrics.metrics import SteeringMetrics
from server.metrics.series import SERIES, SeriesKind
from server.profiles import Profile, Resolved, ResolvedTerm
from server.registry.records import ProfileSettings

ROOT = Path(__file__).parents[2]
PROMTOOL = shutil.which("promtool")
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
# What promtool knows as units, and what it wants instead.
NOT_BASE_UNITS = {"minutes", "hours", "days", "weeks", "bits", "fahrenheit", "inches", "miles", "pounds", "calories"}
PREFIXED_UNIT = re.compile(
    "(pico|nano|micro|milli|centi|deci|deca|hecto|kilo|kibi|mega|mibi|giga|gibi|tera|tebi|peta|pebi)"
    "(amperes|bytes|bits|grams|joules|meters|metres|seconds|volts)"
)
ABBREVIATED_UNITS = {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d"}
TYPES = {"counter", "gauge", "summary", "histogram"}

ENGINE = EngineCounters(
    tuple(
        RankCounters(replica, rank, 3, 7, 64, 2, 128, HostTime((1e-5, 1e-3, 0.1), (5, 4, 0, 1), 0.25))
        for replica in (0, 1)
        for rank in (0, 1)
    ),
    tuple(ReplicaCounters(replica, 4, CacheTokens(100, 60), CacheTokens(200, 150)) for replica in (0, 1)),
)
BUILD = {"version": "0.1.0", "vllm": "0.32.0", "torch": "2.9", "backend": "cpu", "registry_schema": 1}
STATE = StateFigures(
    generation_desired=12,
    generation_observed=11,
    num_members=2,
    num_profiles=5,
    num_bundles=6,
    has_passed_self_test=True,
    is_ready=False,
    is_declaration_applied=True,
    last_change_at_s=1.75e9,
    bytes_per_row=1024,
    build=BUILD,
)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def resolve(name: str) -> Resolved:
    settings = ProfileSettings(f"sha256:{name}", 1.0, 2.0, Scope.ALL, None, (), None, "")
    term = ResolvedTerm(Profile(name, cast(Any, None), settings), 1.0, Scope.ALL)
    return Resolved((term,), Steering("id", ()))


def serve(metrics: SteeringMetrics, name: str, *counts: int) -> None:
    request = resolve(name)
    metrics.admitted(request, {})
    metrics.ended(request, "ok", {"x": list(counts)})


def scrape(metrics: SteeringMetrics, *others: SteeringMetrics, engine: EngineCounters = ENGINE) -> str:
    """What a scrape of the first member shows; snapshots travel as JSON."""
    members = [json.loads(json.dumps(member.snapshot())) for member in (metrics, *others)]
    return render(metrics.families(members, engine, STATE))[0].decode()


def samples(text: str) -> Samples:
    found: Samples = {}
    for family in parse(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def value(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((name, tuple(sorted(labels.items()))))


@pytest.fixture
def busy() -> SteeringMetrics:
    """A member that has seen something of everything."""
    metrics = SteeringMetrics()
    metrics.register(["a", 'we"ird\\ \n'])
    serve(metrics, "a", 10, 20)
    metrics.refused("steering_profile_not_found", ["nobody"])
    with metrics.operation("upload"):
        pass
    with pytest.raises(OSError, match="full"), metrics.operation("upload"):
        raise OSError("full")
    return metrics


def promtool(text: str) -> str:
    """What the real one reports."""
    assert PROMTOOL is not None
    checked = subprocess.run([PROMTOOL, "check", "metrics"], input=text, text=True, capture_output=True)
    assert (checked.returncode == 0) == (not checked.stdout + checked.stderr)
    return checked.stdout + checked.stderr


def lint(text: str) -> list[str]:
    """Problems that `promtool check metrics` reports, after Prometheus' promlint."""
    # The parser puts `_total` where it lacks.
    counters = re.findall(r"^# TYPE (\S+) counter$", text, re.MULTILINE)
    problems = [f"{name}: counter without _total" for name in counters if not name.endswith("_total")]
    return problems + [problem for family in parse(text) for problem in _lint_family(family)]


def _lint_family(family: Metric) -> Iterator[str]:
    is_counter = family.type == "counter"
    # The parser takes `_total` off the name.
    name = f"{family.name}_total" if is_counter else family.name
    parts = name.split("_")
    labels = {label for sample in family.samples for label in sample.labels}
    is_histogram = family.type == "histogram"
    checks = {
        "no help text": bool(family.documentation),
        "no type": family.type != "unknown",
        "_total and no counter": is_counter or not name.endswith("_total"),
        "_timestamp_seconds and no gauge": family.type == "gauge" or not name.endswith("_timestamp_seconds"),
        "suffix of a histogram": is_histogram or not name.endswith(("_bucket", "_count", "_sum")),
        "reserved label": labels.isdisjoint({"quantile"} if is_histogram else {"le", "quantile"}),
        "type in the name": TYPES.isdisjoint(parts),
        "colon": ":" not in name,
        "camel case": not any(re.search("[a-z][A-Z]", word) for word in (name, *labels)),
        "no base unit": NOT_BASE_UNITS.isdisjoint(parts) and not any(PREFIXED_UNIT.fullmatch(part) for part in parts),
        "abbreviated unit": ABBREVIATED_UNITS.isdisjoint(parts[1:]),
    }
    return (f"{name}: {problem}" for problem, is_fine in checks.items() if not is_fine)


def test_every_series_of_the_table_is_in_the_text_and_no_other(busy: SteeringMetrics) -> None:
    families = busy.families([busy.snapshot()], ENGINE, STATE)
    suffixes = {SeriesKind.COUNTER: "_total", SeriesKind.INFO: "_info"}
    found = {(family.name + suffixes.get(SeriesKind(family.type), ""), family.type) for family in families}
    assert found == {(series.name, series.kind.value) for series in SERIES}
    text = render(families)[0].decode()
    assert {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")} == {
        series.name for series in SERIES
    }
    labels = {series.name: set(series.labels) for series in SERIES}
    for family, series in zip(parse(text), SERIES, strict=True):
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == labels[series.name]
        assert family.samples, f"{series.name} has no sample"


def test_the_text_is_clean(busy: SteeringMetrics) -> None:
    assert lint(scrape(busy)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# TYPE steering_x gauge\nsteering_x 1\n", "no help text"),
        ("# HELP steering_x x\nsteering_x 1\n", "no type"),
        ("# HELP steering_x x\n# TYPE steering_x counter\nsteering_x 1\n", "counter without _total"),
        ("# HELP steering_rows_total x\n# TYPE steering_rows_total gauge\nsteering_rows_total 1\n", "_total and no"),
        ("# HELP steering_x_count x\n# TYPE steering_x_count gauge\nsteering_x_count 1\n", "suffix of a histogram"),
        ('# HELP steering_x x\n# TYPE steering_x gauge\nsteering_x{le="1"} 1\n', "reserved label"),
        ('# HELP steering_x x\n# TYPE steering_x gauge\nsteering_x{aB="1"} 1\n', "camel case"),
        ("# HELP steering_gauge x\n# TYPE steering_gauge gauge\nsteering_gauge 1\n", "type in the name"),
        ("# HELP steering:x x\n# TYPE steering:x gauge\nsteering:x 1\n", "colon"),
        ("# HELP steering_milliseconds x\n# TYPE steering_milliseconds gauge\nsteering_milliseconds 1\n", "base unit"),
        ("# HELP steering_x_ms x\n# TYPE steering_x_ms gauge\nsteering_x_ms 1\n", "abbreviated unit"),
    ],
)
def test_the_linter_finds_what_promtool_finds(text: str, problem: str) -> None:
    assert any(problem in found for found in lint(text))
    if PROMTOOL is not None and problem != "no type":
        assert promtool(text)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_finds_nothing(busy: SteeringMetrics) -> None:
    assert promtool(scrape(busy)) == ""


def test_members_add_up(busy: SteeringMetrics) -> None:
    other = SteeringMetrics()
    other.register(["a"])
    serve(other, "a", 1, 2)
    running = resolve("a")
    other.admitted(running, {"y": [100, 200]})
    other.refused("steering_profile_not_found", [])
    with other.operation("upload"):
        pass
    for text in (scrape(busy, other), scrape(other, busy)):
        found = samples(text)
        assert value(found, "steering_requests_total", profile="a", outcome="ok") == 2
        assert value(found, "steering_tokens_total", profile="a", phase="prompt") == 111
        assert value(found, "steering_tokens_total", profile="a", phase="generation") == 222
        assert value(found, "steering_active_requests", profile="a") == 1
        assert value(found, "steering_requests_total", profile="other", outcome="refused") == 2
        assert value(found, "steering_refusals_total", code="steering_profile_not_found") == 2
        assert value(found, "steering_operations_total", operation="upload", outcome="ok") == 2
        assert value(found, "steering_operation_failures_total", operation="upload", reason="internal") == 1
        assert value(found, "steering_operation_duration_seconds_count", operation="upload") == 3


def test_a_name_that_is_gone_here_is_gone_though_another_member_still_has_it(busy: SteeringMetrics) -> None:
    late = SteeringMetrics()
    late.register(["a", "gone"])
    serve(late, "gone", 1, 1)
    found = samples(scrape(busy, late))
    assert value(found, "steering_tokens_total", profile="gone", phase="prompt") is None
    assert value(samples(scrape(late, busy)), "steering_tokens_total", profile="gone", phase="prompt") == 1


def test_a_name_with_series_at_another_member_only_is_shown_if_it_exists() -> None:
    full, roomy = SteeringMetrics(max_labels=1), SteeringMetrics(max_labels=1)
    full.register(["a", "b"])
    roomy.register(["b", "a"])
    serve(roomy, "b", 1, 2)
    serve(full, "b", 10, 20)
    found = samples(scrape(full, roomy))
    assert value(found, "steering_tokens_total", profile="b", phase="generation") == 2
    assert value(found, "steering_tokens_total", profile="other", phase="generation") == 20


def test_operations_are_at_zero_before_the_first() -> None:
    found = samples(scrape(SteeringMetrics()))
    assert value(found, "steering_operations_total", operation="profile.put", outcome="failed") == 0
    assert value(found, "steering_operation_duration_seconds_count", operation="profile.put") == 0


def test_series_go_with_the_name(busy: SteeringMetrics) -> None:
    assert 'profile="a"' in scrape(busy)
    busy.register([])
    text = scrape(busy)
    assert 'profile="a"' not in text
    assert 'profile="other"' in text


def test_engine_and_state(busy: SteeringMetrics) -> None:
    found = samples(scrape(busy))
    assert value(found, "steering_rows_used", replica="1", rank="0") == 7
    assert value(found, "steering_rows_capacity", replica="1", rank="0") == 64
    assert value(found, "steering_resident_bytes", replica="0", rank="1") == 7 * 1024
    buckets = [
        value(found, "steering_step_host_seconds_bucket", replica="0", rank="0", le=bound)
        for bound in ("1e-05", "0.001", "0.1", "+Inf")
    ]
    assert buckets == [5, 9, 9, 10]
    assert value(found, "steering_step_host_seconds_sum", replica="0", rank="0") == 0.25
    assert value(found, "steering_step_host_seconds_count", replica="0", rank="0") == 10
    assert value(found, "steering_prefix_cache_hit_tokens_total", replica="0", steered="true") == 60
    assert value(found, "steering_prefix_cache_query_tokens_total", replica="1", steered="false") == 200
    assert value(found, "steering_generation_desired") == 12
    assert value(found, "steering_generation_observed") == 11
    assert value(found, "steering_ready") == 0
    assert value(found, "steering_self_test_passed") == 1
    assert value(found, "steering_last_change_timestamp_seconds") == 1.75e9
    assert value(found, "steering_build_info", **{name: str(each) for name, each in BUILD.items()}) == 1


async def test_receipts_are_in_the_text(busy: SteeringMetrics) -> None:
    async def ended(ids: Sequence[str]) -> dict[str, Ended]:
        return {steering_id: Ended(1, (3, 5), 0) for steering_id in ids}

    busy.receipts.claim("one", 1, [3, 4])
    await busy.receipts.reconcile(ended)
    found = samples(scrape(busy))
    assert value(found, "steering_receipt_tokens_checked_total") == 7
    assert value(found, "steering_receipt_discrepancy_tokens") == -1
    assert value(found, "steering_receipt_mismatches_total") == 1


def test_an_engine_that_does_not_answer_leaves_the_rest(busy: SteeringMetrics) -> None:
    text = scrape(busy, engine=NO_ENGINE)
    assert "steering_rows_used{" not in text
    assert lint(text) == []
    assert value(samples(text), "steering_tokens_total", profile="a", phase="prompt") == 10


def test_openmetrics_on_request_with_vllm_beside(busy: SteeringMetrics) -> None:
    registry = CollectorRegistry()
    Counter("vllm:requests", "Requests.", registry=registry).inc()
    families = busy.families([busy.snapshot()], ENGINE, STATE)
    text, content_type = render(families, OPENMETRICS, registry)
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n") and text.count(b"# EOF") == 1
    names = [family.name for family in parse_openmetrics(text.decode())]
    assert names[0] == "vllm:requests"
    # The client library alone would write `vllm_requests_total`, though not in the line above it.
    assert "\nvllm:requests_total 1.0\n" in text.decode()
    assert "steering_build" in names and "steering_tokens" in names
    plain, content_type = render(families, "text/html, */*", registry)
    assert content_type.startswith("text/plain")
    assert b"# EOF" not in plain
    assert b"vllm:requests_total 1.0" in plain and b"steering_ready 0.0" in plain


def test_names_of_profiles_are_escaped(busy: SteeringMetrics) -> None:
    found = samples(scrape(busy))
    assert value(found, "steering_active_requests", profile='we"ird\\ \n') == 0


def test_operating_guide_names_every_series_and_no_other() -> None:
    guide = (ROOT / "docs" / "operating.md").read_text()
    section = re.search(r"^(#+) Metrics\n(.*?)(?=^\1 |\Z)", guide, re.MULTILINE | re.DOTALL)
    assert section is not None, "docs/operating.md has no section Metrics"
    assert set(re.findall(r"steering_\w+", section[2])) == {series.name for series in SERIES}


def test_documents_name_no_series_that_does_not_exist() -> None:
    histograms = [series.name for series in SERIES if series.kind is SeriesKind.HISTOGRAM]
    known = {series.name for series in SERIES} | {
        name + suffix for name in histograms for suffix in ("_bucket", "_count", "_sum")
    }
    named = {
        name
        for document in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *(ROOT / "deploy").rglob("*"))
        if document.is_file() and document.suffix in {".md", ".json", ".yaml", ".yml"}
        for name in re.findall(r"\bsteering_\w+_(?:total|seconds|bytes|info|bucket|count|sum)\b", document.read_text())
    }
    assert named <= known

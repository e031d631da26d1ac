"""Metric families of a scrape, from the snapshots of all members and the figures of engine and registry."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from server.engine.counters import EngineCounters
from server.metrics import series
from server.metrics.figures import Histogram, StateFigures
from server.metrics.operation_counters import BOUNDS_S
from server.metrics.profile_counters import OTHER
from server.metrics.series import Series, SeriesKind

Labels = tuple[str, ...]


def all_families(
    members: Sequence[Mapping[str, Any]], registered: Collection[str], engine: EngineCounters, state: StateFigures
) -> list[Metric]:
    """Every family of `series.SERIES`, in that order.

    Args:
        members: snapshots.
        registered: names of the profiles that exist, as the scraped member knows them.
        engine: the engine's counters.
        state: registry and readiness.
    """
    values: dict[Series, Mapping[Labels, float | Histogram | Mapping[str, str]]] = {
        **_of_profiles(members, registered),
        **_of_operations(members),
        **_of_receipts(members),
        **_of_engine(engine, state.bytes_per_row),
        **_of_state(state),
    }
    return [_family(each, values[each]) for each in series.SERIES]


def _of_profiles(
    members: Sequence[Mapping[str, Any]], registered: Collection[str]
) -> dict[Series, Mapping[Labels, float]]:
    requests: Counter[Labels] = Counter()
    tokens: Counter[Labels] = Counter()
    active: Counter[Labels] = Counter()
    for member in members:
        for name, counts in member["profiles"].items():
            # Another member may not have noticed yet that a name went.
            if name == OTHER or name in registered:
                requests.update({(name, outcome): number for outcome, number in counts["requests"].items()})
                tokens.update({(name, phase): number for phase, number in counts["tokens"].items()})
                active[name,] += counts["active"]
    return {series.REQUESTS: requests, series.TOKENS: tokens, series.ACTIVE_REQUESTS: active}


def _of_operations(members: Sequence[Mapping[str, Any]]) -> dict[Series, Mapping[Labels, float | Histogram]]:
    refusals: Counter[Labels] = Counter()
    outcomes: Counter[Labels] = Counter()
    reasons: Counter[Labels] = Counter()
    durations: dict[Labels, list[Histogram]] = {}
    for member in members:
        refusals.update({(code,): number for code, number in member["refusals"].items()})
        for name, counts in member["operations"].items():
            outcomes.update({(name, outcome): number for outcome, number in counts["outcomes"].items()})
            reasons.update({(name, reason): number for reason, number in counts["reasons"].items()})
            durations.setdefault((name,), []).append(Histogram(BOUNDS_S, counts["buckets"], counts["sum_s"]))
    return {
        series.REFUSALS: refusals,
        series.OPERATIONS: outcomes,
        series.OPERATION_FAILURES: reasons,
        series.OPERATION_DURATION: {labels: _sum(histograms) for labels, histograms in durations.items()},
    }


def _of_receipts(members: Sequence[Mapping[str, Any]]) -> dict[Series, Mapping[Labels, float]]:
    totals: Counter[str] = Counter()
    for member in members:
        totals.update(member["receipts"])
    return {
        series.RECEIPT_TOKENS_CHECKED: {(): totals["checked_tokens"]},
        series.RECEIPT_DISCREPANCY_TOKENS: {(): totals["discrepancy_tokens"]},
        series.RECEIPT_MISMATCHES: {(): totals["mismatches"]},
        series.RECEIPT_UNCHECKED: {(): totals["unchecked"]},
    }


def _of_engine(engine: EngineCounters, bytes_per_row: int) -> dict[Series, Mapping[Labels, float | Histogram]]:
    ranks = {(str(each.replica), str(each.rank)): each for each in engine.ranks}
    replicas = {(str(each.replica),): each for each in engine.replicas}
    caches = {
        (*replica, "true" if is_steered else "false"): each.steered if is_steered else each.unsteered
        for replica, each in replicas.items()
        for is_steered in (True, False)
    }
    return {
        series.RESIDENT_BUNDLES: {labels: rank.num_bundles for labels, rank in ranks.items()},
        series.RESIDENT_BYTES: {labels: rank.rows_used * bytes_per_row for labels, rank in ranks.items()},
        series.ROWS_USED: {labels: rank.rows_used for labels, rank in ranks.items()},
        series.ROWS_CAPACITY: {labels: rank.rows_total for labels, rank in ranks.items()},
        series.SLOTS_USED: {labels: rank.slots_used for labels, rank in ranks.items()},
        series.SLOTS_CAPACITY: {labels: rank.slots_total for labels, rank in ranks.items()},
        series.STEP_HOST: {labels: Histogram(*rank.host_time) for labels, rank in ranks.items()},
        series.ENGINE_REQUESTS: {labels: replica.requests for labels, replica in replicas.items()},
        series.CACHE_QUERY_TOKENS: {labels: cache.queries for labels, cache in caches.items()},
        series.CACHE_HIT_TOKENS: {labels: cache.hits for labels, cache in caches.items()},
    }


def _of_state(state: StateFigures) -> dict[Series, Mapping[Labels, float | Mapping[str, str]]]:
    build = {name: str(state.build[name]) for name in series.BUILD.labels}
    return {
        series.GENERATION_DESIRED: {(): state.generation_desired},
        series.GENERATION_OBSERVED: {(): state.generation_observed},
        series.MEMBERS: {(): state.num_members},
        series.SELF_TEST_PASSED: {(): state.has_passed_self_test},
        series.READY: {(): state.is_ready},
        series.DECLARATION_APPLIED: {(): state.is_declaration_applied},
        series.BUILD: {(): build},
        series.PROFILES: {(): state.num_profiles},
        series.BUNDLES: {(): state.num_bundles},
        series.LAST_CHANGE: {(): state.last_change_at_s or 0.0},
    }


def _sum(histograms: Iterable[Histogram]) -> Histogram:
    listed = list(histograms)
    counts = [sum(column) for column in zip(*(each.counts for each in listed), strict=True)]
    return Histogram(listed[0].bounds, counts, sum(each.sum for each in listed))


def _family(each: Series, values: Mapping[Labels, Any]) -> Metric:
    match each.kind:
        case SeriesKind.COUNTER:
            counter = CounterMetricFamily(each.name, each.help, labels=each.labels)
            for labels, value in values.items():
                counter.add_metric(labels, value)
            return counter
        case SeriesKind.GAUGE:
            gauge = GaugeMetricFamily(each.name, each.help, labels=each.labels)
            for labels, value in values.items():
                gauge.add_metric(labels, value)
            return gauge
        case SeriesKind.HISTOGRAM:
            histogram = HistogramMetricFamily(each.name, each.help, labels=each.labels)
            for labels, value in values.items():
                histogram.add_metric(labels, _buckets(value), value.sum)
            return histogram
        case SeriesKind.INFO:
            info = InfoMetricFamily(each.name.removesuffix("_info"), each.help)
            for value in values.values():
                info.add_metric((), value)
            return info


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*histogram.bounds, float("inf")]
    return [(floatToGoString(bound), count) for bound, count in zip(bounds, accumulate(histogram.counts), strict=True)]

"""PromQL held against a scrape: whether each metric, label and label value of an expression exists."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import promql_parser
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import (
    AggModifierType,
    AggregateExpr,
    BinaryExpr,
    Call,
    LabelModifierType,
    Matcher,
    MatchOp,
    MatrixSelector,
    NumberLiteral,
    ParenExpr,
    UnaryExpr,
    VectorMatchCardinality,
    VectorSelector,
)

Labels = frozenset[str]

# What Prometheus itself puts on every series of a target, and series that it makes.
TARGET_LABELS: Labels = frozenset({"job", "instance"})
_OF_PROMETHEUS = {"up": TARGET_LABELS, "ALERTS": TARGET_LABELS | {"alertname", "alertstate", "severity"}}
_OF_COUNTERS = frozenset({"rate", "increase", "irate", "resets"})
_KEEPING_LABELS = frozenset(
    {"changes", "max_over_time", "min_over_time", "avg_over_time", "count_over_time", "clamp_min", "round"}
)
_OF_NO_SERIES = frozenset({"time", "vector"})


class QueryError(ValueError):
    """An expression that Prometheus would take, and that gives nothing or something else than was meant."""


@dataclass
class Metric:
    """One series name.

    Attributes:
        labels: names of its labels, with those that Prometheus adds.
        values: values that were seen, by label; Prometheus' own labels are not among them.
        only_grows: whether a rate of it means something.
    """

    labels: Labels
    values: dict[str, set[str]] = field(default_factory=dict)
    only_grows: bool = False


class Scrape:
    """Metrics of a server by series name, such as `x_bucket`."""

    def __init__(self, text: str, known_values: Mapping[str, Collection[str]] | None = None) -> None:
        """Read the text of /metrics.

        Args:
            text: in Prometheus' format.
            known_values: further values of a label, which appear when they occur.
        """
        self.metrics = {name: Metric(labels) for name, labels in _OF_PROMETHEUS.items()}
        self._known_values = known_values or {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                only_grows = family.type in ("counter", "histogram", "summary")
                metric = self.metrics.setdefault(sample.name, Metric(TARGET_LABELS, only_grows=only_grows))
                metric.labels |= sample.labels.keys()
                for label, value in sample.labels.items():
                    metric.values.setdefault(label, set()).add(value)

    def record(self, name: str, expression: str) -> None:
        """Add the series that a recording rule makes."""
        labels = self.labels_of(expression)
        self.metrics[name] = Metric(
            labels, {each: set(self._known_values[each]) for each in labels & self._known_values.keys()}
        )

    def labels_of(self, expression: str) -> Labels:
        """Labels of the result of an expression.

        Args:
            expression: PromQL, with variables of Grafana replaced.

        Raises:
            QueryError: a name in it does not exist, or two sides of an operator can never match.
            ValueError: it is no PromQL.
        """
        return self._vector(promql_parser.parse(expression)) or frozenset()

    def _vector(self, node: Any) -> Labels | None:
        """Labels of a node's result; None of a number."""
        match node:
            case NumberLiteral():
                return None
            case ParenExpr() | UnaryExpr():
                return self._vector(node.expr)
            case VectorSelector():
                return self._selector(node)
            case MatrixSelector():
                return self._selector(node.vector_selector)
            case AggregateExpr():
                return self._aggregate(node)
            case Call():
                return self._call(node)
            case BinaryExpr():
                return self._binary(node)
        raise QueryError(f"{node.prettify()}: these checks do not know a {type(node).__name__}")

    def _selector(self, node: VectorSelector) -> Labels:
        metric = self.metrics.get(node.name or "")
        if metric is None:
            raise QueryError(f"there is no metric {node.name}")
        for matcher in node.matchers.matchers:
            _require({matcher.name}, metric.labels, str(node.name))
            if matcher.name in metric.values:
                values = metric.values[matcher.name] | set(self._known_values.get(matcher.name, ()))
                for text in _alternatives(matcher):
                    if not any(re.fullmatch(text, value) for value in values):
                        raise QueryError(f"{node.name}: {matcher.name} is never {text}, but one of {sorted(values)}")
        return metric.labels

    def _aggregate(self, node: AggregateExpr) -> Labels:
        inner = self._vector(node.expr) or frozenset()
        if node.modifier is None:
            return frozenset()
        named = frozenset(node.modifier.labels)
        _require(named, inner, node.prettify())
        return named if node.modifier.type == AggModifierType.By else inner - named

    def _call(self, node: Call) -> Labels | None:
        name = node.func.name
        if name in _OF_NO_SERIES:
            return None if name == "time" else frozenset()
        vectors = [labels for labels in map(self._vector, node.args) if labels is not None]
        [labels] = vectors
        if name in _OF_COUNTERS:
            selector = node.args[0].vector_selector
            if not self.metrics[selector.name].only_grows:
                raise QueryError(f"{name} of {selector.name}, which is no counter")
            return labels
        if name == "histogram_quantile":
            _require({"le"}, labels, node.prettify())
            return labels - {"le"}
        if name == "absent":
            matchers = node.args[0].matchers.matchers
            return frozenset(each.name for each in matchers if each.op == MatchOp.Equal)
        if name in _KEEPING_LABELS:
            return labels
        raise QueryError(f"these checks do not know the function {name}")

    def _binary(self, node: BinaryExpr) -> Labels | None:
        left, right = self._vector(node.lhs), self._vector(node.rhs)
        if left is None or right is None:
            return right if left is None else left
        modifier, text = node.modifier, node.prettify()
        is_set_operator = modifier is not None and modifier.card == VectorMatchCardinality.ManyToMany
        extra = frozenset(modifier.group_labels or ()) if modifier is not None else frozenset()
        matching = modifier.matching if modifier is not None else None
        if matching is not None and matching.type == LabelModifierType.Include:
            on = frozenset(matching.labels)
            _require(on, left, text)
            _require(on, right, text)
        else:
            ignored = frozenset(matching.labels) if matching is not None else frozenset()
            _require(ignored, left | right, text)
            if left - ignored != right - ignored:
                raise QueryError(f"{text}: the sides have {sorted(left)} and {sorted(right)}, so that nothing matches")
            on = left - ignored
        if is_set_operator:
            return left
        if modifier is not None and modifier.card == VectorMatchCardinality.ManyToOne:
            _require(extra, right, text)
            return left | extra
        if modifier is not None and modifier.card == VectorMatchCardinality.OneToMany:
            _require(extra, left, text)
            return right | extra
        return on


def metric_names(expression: str) -> set[str]:
    """Series names that an expression asks for."""
    names: set[str] = set()

    def visit(node: Any) -> None:
        selector = node.vector_selector if isinstance(node, MatrixSelector) else node
        if isinstance(selector, VectorSelector):
            names.add(str(selector.name))

    promql_parser.walk(promql_parser.parse(expression), visit)
    return names


def _alternatives(matcher: Matcher) -> list[str]:
    """Regular expressions that must each match something."""
    if matcher.op in (MatchOp.Equal, MatchOp.NotEqual):
        return [re.escape(matcher.value)]
    return matcher.value.split("|")


def _require(named: Collection[str], existing: Labels, where: str) -> None:
    missing = set(named) - existing
    if missing:
        raise QueryError(f"{where}: there is no label {sorted(missing)}, only {sorted(existing)}")

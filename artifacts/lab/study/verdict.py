"""The answer in a sentence, from the comparisons alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from artifacts.lab.study.comparison import SIGNIFICANCE, Comparison, compare
from artifacts.lab.study.efficiency import TargetRecord
from artifacts.lab.study.regime import REGIMES
from artifacts.lab.study.source import CONTROLS, Source


@dataclass(frozen=True)
class Point:
    """One way to use the expert in one regime with one number of labels, against all its rivals."""

    regime: str
    labels: int
    route: Source
    comparisons: tuple[Comparison, ...]

    @property
    def against_own(self) -> Comparison:
        return next(each for each in self.comparisons if each.rival == Source.OWN)

    @property
    def pays(self) -> bool:
        """Better than the target's own vector, than every control and than random directions, all after Holm."""
        return all(each.better for each in self.comparisons)

    @property
    def not_the_expert(self) -> bool:
        """Better than the target's own vector, but some control does as well."""
        return self.against_own.better and not self.pays


def points(comparisons: Sequence[Comparison]) -> list[Point]:
    """Comparisons grouped by what they judge."""
    keys = dict.fromkeys((each.regime, each.labels, each.route) for each in comparisons)
    return [
        Point(*key, tuple(each for each in comparisons if (each.regime, each.labels, each.route) == key))
        for key in keys
    ]


def verdict(records: Sequence[TargetRecord], comparisons: Sequence[Comparison]) -> str:
    """When an expert pays on these targets, as text."""
    judged = points(comparisons)
    paying = [point for point in judged if point.pays]
    unearned = [point for point in judged if point.not_the_expert]
    losing = [point for point in judged if point.against_own.worse]
    names = ", ".join(record.target for record in records)
    draws = len(records[0].conditions[0].accuracies)
    sentences = [
        f"An expert pays in {len(paying)} of {len(judged)} points ({names}; {draws} draws each; {len(comparisons)} "
        f"comparisons, Holm at {SIGNIFICANCE})."
    ]
    for title, chosen in (
        ("It beats the target's own vector and every control", paying),
        ("It beats the target's own vector but not every control", unearned),
        ("It is worse than the target's own vector", losing),
    ):
        sentences.append(f"{title}: {_listed(chosen)}.")
    for route in CONTROLS:
        gains = [point.against_own.difference.value for point in judged if point.route is route]
        sentences.append(f"Mean difference to the target's own vector over all points, {route}: {fmean(gains):+.3f}.")
    sentences += [_alone(record) for record in records if len(records) > 1]
    sentences.append(
        "Intervals and tests are over draws of labelled examples, for these models and the strengths that the tuning "
        "facts gave; they say nothing about other targets or experts."
    )
    return "\n".join(sentences)


def _alone(record: TargetRecord) -> str:
    """How often the expert pays for one target by itself."""
    judged = points(compare([record]))
    paying = [point for point in judged if point.pays]
    return f"{record.target} alone: the expert pays in {len(paying)} of {len(judged)} points: {_listed(paying)}."


def _listed(chosen: Sequence[Point]) -> str:
    """Points by regime and route, with their numbers of labels and their gains over the target's own vector."""
    parts = []
    for regime in REGIMES:
        for route in CONTROLS:
            found = [point for point in chosen if (point.regime, point.route) == (regime.name, route)]
            if found:
                gains = ", ".join(f"{point.labels} labels {point.against_own.difference.value:+.2f}" for point in found)
                parts.append(f"{regime.title}, {route} ({gains})")
    return "; ".join(parts) or "nowhere"

"""Does the expert count for anything? Expert against untrained expert, both mapped by other texts (B)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from artifacts.evaluation.statistics import Interval, McNemar, mcnemar
from artifacts.lab.table.row import Kind, Row


@dataclass(frozen=True)
class Comparison:
    """An expert's vector against untrained experts' on one target, over the same test facts.

    Attributes:
        difference: accuracy minus the mean of the untrained draws; pairs of facts and draws are resampled.
        against_best: exact McNemar test against the untrained draw that answers most test facts, the hardest one.
    """

    target: str
    expert: str
    difference: Interval
    against_best: McNemar

    @property
    def beats(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.difference.low > 0

    def record(self) -> dict[str, object]:
        """Everything as JSON values."""
        return {
            "target": self.target,
            "expert": self.expert,
            "difference": {name: round(value, 4) for name, value in self.difference._asdict().items()},
            "against_best_untrained": self.against_best._asdict(),
            "beats": self.beats,
        }


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """One comparison per target and expert, in the order of the rows."""
    untrained = {(row.target, row.expert): row for row in rows if row.kind is Kind.UNTRAINED_B}
    return [_compared(row, untrained[row.target, row.expert]) for row in rows if row.kind is Kind.EXPERT_B]


def verdict(comparisons: Sequence[Comparison]) -> list[str]:
    """One plain sentence per expert: on how many targets it beats untrained ones, and whether those are two thirds."""
    sentences = []
    for expert in dict.fromkeys(each.expert for each in comparisons):
        own = [each for each in comparisons if each.expert == expert]
        won, needed = sum(each.beats for each in own), math.ceil(len(own) * 2 / 3)
        sentences.append(
            f"{expert} (B) {'beats' if won >= needed else 'DOES NOT beat'} untrained experts (B) on at least {needed} "
            f"of {len(own)} targets: on {won} the 95 % interval of the difference lies above 0."
        )
    return sentences


def _compared(steered: Row, untrained: Row) -> Comparison:
    best = untrained.answers[int(untrained.answers.mean(1).argmax())]
    test = mcnemar((steered.answers[0] == 1).tolist(), (best == 1).tolist())
    return Comparison(steered.target, str(steered.expert), steered.minus(untrained), test)

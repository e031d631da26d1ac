"""One row of the lab's table: a way of steering one target, with every draw's answers to the test facts."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from artifacts.evaluation.statistics import Interval, draws_interval
from artifacts.lab.choice import Bench, Choice
from artifacts.lab.corpus import Split, facts

_BOOTSTRAP_SEED: Final = 0


class Kind(StrEnum):
    """What a row steers with, in the order of the table."""

    OFF = "no steering"
    PROMPT = "clerk system prompt (ceiling)"
    OWN = "target's own difference of means"
    EXPERT_A = "expert -> ridge, map and direction from the same texts (A)"
    UNTRAINED_A = "untrained expert -> ridge (A)"
    EXPERT_B = "expert -> ridge, map from other prompts than the direction (B)"
    UNTRAINED_B = "untrained expert -> ridge (B)"
    AUTOENCODER = "reconstruction-only auto-encoder"
    RANDOM = "random direction, layer and norm of (B)"
    RANDOM_CHOSEN = "random directions, chosen like an expert's"


# How many of these kinds a target has by itself, and how many it has with each expert.
ROWS_PER_TARGET: Final = 4
ROWS_PER_EXPERT: Final = 6


@dataclass(frozen=True)
class Row:
    """Answers under one way of steering.

    Attributes:
        kind: the way, a `Kind` in the first world's table.
        target: name of the steered model.
        expert: name of the expert that the direction comes from or is compared with; None where there is none.
        answers: [num_draws, num_facts] float64, 1 where a test fact is answered exactly. One draw for a single vector,
            several where the way has chance in it.
        choices: per draw the layers and the strength that the tune facts gave it; None where nothing kept within the
            perplexity budget, which leaves the target unsteered. Empty without steering.
        perplexity: per draw of `choices` the perplexity of neutral text over the unsteered one.
    """

    kind: StrEnum
    target: str
    expert: str | None
    answers: NDArray[np.float64]
    choices: tuple[Choice | None, ...] = ()
    perplexity: tuple[float, ...] = ()

    @property
    def num_draws(self) -> int:
        return len(self.answers)

    @property
    def interval(self) -> Interval:
        """Accuracy with its 95 % bootstrap interval over pairs of facts, and over the draws where there are several."""
        return draws_interval(self.answers, fact_groups(), _BOOTSTRAP_SEED)

    def minus(self, other: "Row") -> Interval:
        """Accuracy of this row, which has one draw, minus the mean of another's draws on the same facts."""
        return draws_interval(other.answers, fact_groups(), _BOOTSTRAP_SEED, self.answers[0].tolist())

    def record(self) -> dict[str, object]:
        """Everything as JSON values."""
        return {
            "kind": self.kind.name.lower(),
            "name": self.kind.value,
            "target": self.target,
            "expert": self.expert,
            "draws": self.num_draws,
            "accuracy": _rounded(self.interval),
            "accuracy_by_draw": [round(float(value), 4) for value in self.answers.mean(1)],
            "chosen": [None if choice is None else _chosen(choice) for choice in self.choices],
            "perplexity_ratio": [round(value, 4) for value in self.perplexity],
        }


def judged_row(
    bench: Bench,
    kind: StrEnum,
    target: str,
    expert: str | None,
    choices: Sequence[Choice | None],
    unsteered: Tensor,
) -> Row:
    """The row of one choice per draw, by the test facts; `unsteered` [num_facts] bool stands in for no choice."""
    return Row(
        kind,
        target,
        expert,
        answer_matrix([unsteered if choice is None else bench.answers_truly(choice) for choice in choices]),
        tuple(choices),
        tuple(1.0 if choice is None else bench.perplexity_ratio(choice) for choice in choices),
    )


def answer_matrix(answers: Sequence[Tensor]) -> NDArray[np.float64]:
    """Answers [num_facts] bool of every draw as the matrix of a row."""
    return torch.stack([each.double() for each in answers]).numpy()


def fact_groups() -> list[str]:
    """Pair of summands of every test fact: both facts of a pair are resampled together."""
    return [fact.group for fact in facts(Split.TEST)]


def _chosen(choice: Choice) -> dict[str, object]:
    return {
        "layer": choice.candidate.layer,
        "expert_layer": choice.candidate.expert_layer,
        "strength": choice.strength,
        "tune_accuracy": round(choice.accuracy, 4),
    }


def _rounded(interval: Interval) -> dict[str, float]:
    return {name: round(value, 4) for name, value in interval._asdict().items()}

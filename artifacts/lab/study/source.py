"""Where a direction comes from: the target alone, the expert mapped or as labeller, and the controls of both."""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Final, NamedTuple

import torch
from torch import Tensor

from artifacts.aligner.affine import AffineMap
from artifacts.aligner.axes import principal_axes
from artifacts.aligner.ridge import fit_ridge
from artifacts.lab.study.estimator import Estimator, fit_direction
from artifacts.lab.study.reading import Reading
from artifacts.lab.study.regime import CONTENTS, Draw
from artifacts.vectors.difference import unit
from artifacts.vectors.labeller import LEAST_GROUPS, Labelling, labelled_direction, unchecked_labels

_REGULARISATION: Final = 1e-2


class Source(StrEnum):
    """Who finds the direction. `SELF_LABELS` is the labeller without an expert: the target labels the texts itself."""

    OWN = "target's own"
    MAPPED = "expert, mapped"
    UNTRAINED = "untrained, mapped"
    LABELS = "expert's labels"
    SELF_LABELS = "target's own labels"
    UNTRAINED_LABELS = "untrained's labels"


LABEL_SOURCES: Final = (Source.LABELS, Source.SELF_LABELS, Source.UNTRAINED_LABELS)
# The expert's two ways, and what each has to beat besides the target's own vector.
CONTROLS: Final = {
    Source.MAPPED: (Source.UNTRAINED, Source.SELF_LABELS),
    Source.LABELS: (Source.UNTRAINED_LABELS, Source.SELF_LABELS),
}


def least_labels() -> int:
    """Labelled examples that a labeller needs to cross-validate."""
    return 2 * LEAST_GROUPS


def estimators(source: Source) -> tuple[Estimator, ...]:
    """Estimators that are tried for a source."""
    if source in LABEL_SOURCES:
        return (Estimator.MATCHED,)
    return (Estimator.DIFFERENCE, Estimator.LOGISTIC, Estimator.RFM)


class Found(NamedTuple):
    """A direction [hidden_size], unit, float32, of the target's block; None where the draw allows none."""

    direction: Tensor | None
    refused: bool = False  # the labeller's guard rails would have refused these labels


@dataclass(frozen=True)
class Labeller:
    """Labels of one model at one layer; results are kept, because an expert labels the same for every target."""

    reading: Reading
    layer: int
    known: dict[tuple[str, int, int], Labelling | None]

    def labelling(self, key: tuple[str, int, int], draw: Draw, wording: str) -> Labelling | None:
        """Labels of the mapping texts after `draw`; None where it cannot be cross-validated."""
        if key not in self.known:
            states = {self.layer: self.reading.labelled[wording][draw.rows, self.layer]}
            unlabelled = {self.layer: self.reading.mapping[:, self.layer]}
            try:
                self.known[key] = unchecked_labels(states, draw.labels, draw.groups, unlabelled, seed=0)
            except ValueError:
                self.known[key] = None
        return self.known[key]


@dataclass(frozen=True)
class Mapper:
    """Directions of one model at one layer, mapped to the target's block by ridge regression on the mapping texts."""

    reading: Reading
    layer: int
    target_mapping: Tensor

    @cached_property
    def aligner(self) -> AffineMap:
        """Fitted on other texts than the direction is read from."""
        inputs = self.reading.mapping[:, self.layer]
        return fit_ridge(principal_axes(inputs, inputs.shape[1]), self.target_mapping, _REGULARISATION)

    def direction(self, estimator: Estimator, draw: Draw, wording: str) -> Tensor:
        """The direction of a draw in the target's space."""
        states = self.reading.labelled[wording][draw.rows, self.layer]
        fitted = fit_direction(estimator, states, draw.labels, self.reading.mapping[:, self.layer])
        return unit(self.aligner.direction(fitted))


@dataclass(frozen=True)
class Sources:
    """All sources for one target and one expert at fixed layers.

    Attributes:
        target: states of the target.
        layer: block of the target that is steered.
        mappers: by mapped source.
        labellers: by labelling source.
    """

    target: Reading
    layer: int
    mappers: dict[Source, Mapper]
    labellers: dict[Source, Labeller]

    def find(self, source: Source, estimator: Estimator, key: tuple[str, int, int], draw: Draw, wording: str) -> Found:
        """The direction that `source` finds from the labelled examples of `draw`."""
        try:
            if source in self.labellers:
                return self._labelled(source, key, draw, wording)
            if source in self.mappers:
                return Found(self.mappers[source].direction(estimator, draw, wording))
            states = self.target.labelled[wording][draw.rows, self.layer]
            return Found(fit_direction(estimator, states, draw.labels, self.target.mapping[:, self.layer]))
        except ValueError:
            return Found(None, refused=True)

    def _labelled(self, source: Source, key: tuple[str, int, int], draw: Draw, wording: str) -> Found:
        labelling = self.labellers[source].labelling(key, draw, wording)
        if labelling is None:
            return Found(None, refused=True)
        try:
            labelling.require_usable()
            refused = False
        except ValueError:
            refused = True
        return Found(labelled_direction(self.target.mapping[:, self.layer], labelling.probabilities), refused)


def all_labels() -> Draw:
    """Every labelled text of a wording."""
    rows = torch.arange(2 * len(CONTENTS))
    return Draw(rows, 1 - rows % 2, [CONTENTS[row // 2].fact.group for row in rows.tolist()])

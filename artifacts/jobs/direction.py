"""Every steering direction of a build, and the same with one ingredient replaced by chance."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import torch
from torch import Tensor

from artifacts.aligner.affine import AffineMap
from artifacts.aligner.axes import PrincipalAxes
from artifacts.jobs.align import aligner_of, known_axes
from artifacts.jobs.build import Build
from artifacts.jobs.capture import store
from artifacts.jobs.estimate import Examples, estimate
from artifacts.jobs.label import label_mapping
from artifacts.vectors.difference import difference_of_means, unit
from artifacts.vectors.labeller import LabelledMethod, labelled_direction


class Kind(NamedTuple):
    """One way to a direction.

    Attributes:
        method: estimator.
        order: `fit-then-map` (in the expert's space) or `align-then-fit` (on mapped states); None where both are one.
        part: of the estimator's result.
    """

    method: str
    order: str | None
    part: str = ""

    @property
    def name(self) -> str:
        """`method[-aligned][-part]`."""
        return "-".join(each for each in (self.method, "aligned" * (self.order == ALIGNED), self.part) if each)


ALIGNED: Final = "align-then-fit"
MAPPED: Final = "fit-then-map"
RFM_PARTS: Final = ("covector", "displacement")
KINDS: Final = (
    # Means are linear: the mapped difference is the difference of mapped states.
    Kind("diffmean", None),
    *(Kind("rfm", order, part) for order in (MAPPED, ALIGNED) for part in RFM_PARTS),
    *(Kind(method, order) for method in ("logistic", "pca", "lda") for order in (MAPPED, ALIGNED)),
)
LABELLER_KINDS: Final = tuple(Kind("labeller", None, part) for part in ("matched", "weighted", "logistic"))
# A map of wide models takes tens of megabytes.
_KEPT_ALIGNERS: Final = 8
BY_NAME: Final[Mapping[str, Kind]] = {kind.name: kind for kind in (*KINDS, *LABELLER_KINDS)}


def kinds(build: Build) -> tuple[Kind, ...]:
    """The ways that compete in a build."""
    config = build.config
    if config.align.method == "labeller":
        return LABELLER_KINDS
    methods, order = config.vectors.methods, config.vectors.order
    return tuple(
        kind
        for kind in KINDS
        if (methods == "auto" or kind.method in methods) and (order == "both" or kind.order in (None, order))
    )


@dataclass(frozen=True)
class Chance:
    """Which ingredient is replaced by chance; the plain build has none.

    Attributes:
        role: whose states teach: `expert` or `untrained`.
        labels: seed of a permutation of the contrast labels.
        pairs: seed of a permutation of the aligner's pairs.
        aligner: seed of the aligner's initialisation instead of the build's.
    """

    role: str = "expert"
    labels: int | None = None
    pairs: int | None = None
    aligner: int | None = None


NO_CHANCE: Final = Chance()


class DirectionFitter:
    """Fits directions, each intermediate result once."""

    def __init__(self, build: Build, chance: Chance = NO_CHANCE) -> None:
        self._build = build
        self._chance = chance
        self._fitted: dict[tuple[str, int, int | None], Mapping[str, Tensor]] = {}
        self._aligners: dict[tuple[int, int], AffineMap] = {}
        self._axes: dict[int, PrincipalAxes] = {}

    @cached_property
    def examples(self) -> Examples:
        """The contrast rows, their labels permuted where the chance says so."""
        split = self._build.contrast_split
        labels, seed = split.labels, self._chance.labels
        if seed is not None:
            labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
        return Examples(labels, self._build.contrast_groups, split.fit, split.choose)

    def direction(self, kind: Kind, expert: int, target: int) -> Tensor:
        """Unit direction [target hidden_size], float32, of one kind for one layer pair.

        Raises:
            SignError: the direction has no sign.
            ValueError: the labeller's probe cannot label.
        """
        if kind.method == "labeller":
            states = store(self._build, "target", "mapping").layer(target)
            method: LabelledMethod = kind.part  # type: ignore[assignment]  # of LABELLER_KINDS
            return labelled_direction(states, self._probabilities, method)
        if kind.order == ALIGNED:
            return self.fitted(kind.method, expert, target)[kind.part]
        return unit(self.aligner(expert, target).direction(self.fitted(kind.method, expert)[kind.part]))

    def fitted(self, method: str, expert: int, target: int | None = None) -> Mapping[str, Tensor]:
        """An estimator's result by part, on an expert layer's states, mapped to a target layer where one is given."""
        key = (method, expert, target)
        if key not in self._fitted:
            states = self.states(expert) if target is None else self.mapped_states(expert, target)
            config = self._build.config
            self._fitted[key] = estimate(method, states, self.examples, config.vectors, config.seed, self._sign)
        return self._fitted[key]

    def states(self, layer: int) -> Tensor:
        """Contrast states of the teaching model, [num_rows, hidden_size], float32."""
        return store(self._build, self._chance.role, "contrast").layer(layer)

    def mapped_states(self, expert: int, target: int) -> Tensor:
        """The same in the target's space."""
        return self.aligner(expert, target).states(self.states(expert)).float()

    def aligner(self, expert: int, target: int) -> AffineMap:
        """The map of a pair."""
        key = (expert, target)
        if key not in self._aligners:
            chance = self._chance
            while len(self._aligners) >= _KEPT_ALIGNERS:
                self._aligners.pop(next(iter(self._aligners)))
            self._aligners[key] = aligner_of(
                self._build, expert, target, chance.role, chance.pairs, chance.aligner, self._axes_of(expert)
            )
        return self._aligners[key]

    def _axes_of(self, expert: int) -> PrincipalAxes:
        """Axes of the layer asked for last are kept: pairs come layer by layer."""
        if expert not in self._axes:
            self._axes = {expert: known_axes(self._build, self._chance.role, expert)}
        return self._axes[expert]

    def own(self, target: int) -> Tensor:
        """The target's own difference of means: what could be had without an expert."""
        states = store(self._build, "target", "contrast").layer(target)
        known = self.examples.known
        return difference_of_means(states[known], self.examples.labels[known])

    @cached_property
    def _probabilities(self) -> Tensor:
        """Labels of the mapping texts by the teaching model, [num_mapping_rows]; shuffled where pairs are chance."""
        probabilities = label_mapping(self._build, self._chance.role, self.examples.labels).probabilities
        if self._chance.pairs is None:
            return probabilities
        generator = torch.Generator().manual_seed(self._chance.pairs)
        return probabilities[torch.randperm(len(probabilities), generator=generator)]

    @property
    def _sign(self) -> int | None:
        # Chance has no sign of its own; refusing it would leave the control unmeasured.
        return self._build.config.vectors.sign or (None if self._chance == NO_CHANCE else 1)

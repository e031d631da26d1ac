"""The expert as labeller: a probe on its states says of every mapping text how much of the concept it holds."""

from torch import Tensor

from artifacts.jobs.build import Build
from artifacts.jobs.capture import store
from artifacts.jobs.errors import BuildError
from artifacts.vectors.labeller import Labelling, label_texts, unchecked_labels

States = dict[int, Tensor]


def label_mapping(build: Build, role: str, labels: Tensor) -> Labelling:
    """Label the mapping texts with a probe on the contrast rows that are not held out, however good it is.

    Args:
        build: whose states are read.
        role: whose states teach: `expert` or `untrained`.
        labels: [num_contrast_rows], 0 or 1.
    """
    return unchecked_labels(*_inputs(build, role, labels))


def label_or_refuse(build: Build) -> Labelling:
    """The expert's own labelling.

    Raises:
        BuildError: the expert cannot label the mapping texts.
    """
    try:
        return label_texts(*_inputs(build, "expert", build.contrast_split.labels))
    except ValueError as error:
        raise BuildError(f"align.method labeller: {error}") from error


def _inputs(build: Build, role: str, labels: Tensor) -> tuple[States, Tensor, list[str], States, int]:
    known = build.contrast_split.known
    contrast, mapping = store(build, role, "contrast"), store(build, role, "mapping")
    return (
        {layer: contrast.layer(layer)[known] for layer in build.expert_layers},
        labels[known],
        [str(group) for group in build.contrast_groups[known].tolist()],
        {layer: mapping.layer(layer) for layer in build.expert_layers},
        build.config.seed,
    )

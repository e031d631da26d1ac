"""The expert as labeller: a probe on its states says of every mapping text how much of the concept it holds."""

from torch import Tensor

from artifacts.jobs.build import Build
from artifacts.jobs.capture import store
from artifacts.jobs.errors import BuildError
from artifacts.vectors.labeller import Labelling, unchecked_labels


def label_mapping(build: Build, role: str, labels: Tensor) -> Labelling:
    """Label the mapping texts with a probe on the contrast rows that are not held out, however good it is.

    Args:
        build: whose states are read.
        role: whose states teach: `expert` or `untrained`.
        labels: [num_contrast_rows], 0 or 1.
    """
    known = build.contrast_split.known
    groups = build.contrast_groups[known]
    contrast, mapping = store(build, role, "contrast"), store(build, role, "mapping")
    return unchecked_labels(
        {layer: contrast.layer(layer)[known] for layer in build.expert_layers},
        labels[known],
        [str(group) for group in groups.tolist()],
        {layer: mapping.layer(layer) for layer in build.expert_layers},
        build.config.seed,
    )


def label_or_refuse(build: Build) -> Labelling:
    """The expert's own labelling.

    Raises:
        BuildError: the expert cannot label the mapping texts.
    """
    try:
        labelling = label_mapping(build, "expert", build.contrast_split.labels)
        labelling.require_usable()
        return labelling
    except ValueError as error:
        raise BuildError(f"align.method labeller: {error}") from error

"""Control: the expert's architecture with random weights, sent through the same capture and alignment.

Where it steers as well as the expert, the mapping texts carry the concept and the expert adds nothing.
"""

from collections.abc import Iterator

from torch import Tensor

from artifacts.jobs.align import align_layer
from artifacts.jobs.build import Build
from artifacts.jobs.capture import capture_model, store
from artifacts.vectors.difference import difference_of_means, unit

ROLE = "untrained"


def untrained_direction(build: Build, target: int) -> Iterator[Tensor]:
    """Unit directions [target hidden_size] at a target layer, one from each layer of an untrained expert."""
    seed = build.config.seed
    model = build.load_expert(random_seed=seed)
    capture_model(build, model, build.expert_source, build.expert_layers, ROLE, seed)
    del model
    contrast = build.contrast_split
    split = build.mapping_split
    inputs, outputs = store(build, ROLE, "mapping"), store(build, "target", "mapping")
    for layer in build.expert_layers:
        states = store(build, ROLE, "contrast").layer(layer)
        direction = difference_of_means(states[contrast.known], contrast.labels[contrast.known])
        aligner, _ = align_layer(build, inputs, outputs, layer, (target,), split)[target]
        yield unit(aligner.direction(direction))

"""Bundles of random vectors for the lab's model."""

from collections.abc import Sequence
from pathlib import Path

import torch

from artifacts.bundle import write_bundle
from artifacts.manifest import Intervention, Manifest, ModelIdentity, Scope

_HIDDEN_SIZE, _NUM_LAYERS = 128, 6
# About a third of the lab model's residual norm: changes every distribution, and leaves text a text.
_WRITE_NORM = 150.0


def random_bundle(path: Path, layers: Sequence[int], seed: int) -> Path:
    """Write a bundle that adds a random vector at each layer."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(len(layers), _HIDDEN_SIZE, generator=generator)) * _WRITE_NORM
    names = [f"runtime.{layer}.0.write" for layer in layers]
    manifest = Manifest(
        name=path.stem,
        target=ModelIdentity(
            id="lab-target", architecture="LlamaForCausalLM", hidden_size=_HIDDEN_SIZE, num_layers=_NUM_LAYERS
        ),
        interventions=tuple(
            Intervention(layer=layer, kind="add", write=name) for layer, name in zip(layers, names, strict=True)
        ),
        recommended_strength=1.0,
        maximum_strength=4.0,
        scope=Scope.ALL,
    )
    write_bundle(path, manifest, dict(zip(names, rows, strict=True)))
    return path

"""A bundle's vectors with the strength multiplied in, for programs that know no strength."""

import math

import torch
from torch import Tensor

from artifacts.bundle import Bundle
from artifacts.jobs.errors import BuildError
from artifacts.rows import MAX_NORM, MIN_NORM


def baked_vectors(bundle: Bundle, strength: float | None = None) -> dict[int, Tensor]:
    """Return what the bundle adds at each layer: strength * (sum of the layer's rows), by 0-based decoder block.

    Args:
        bundle: whose interventions are plain additions.
        strength: in the bundle's unit; None takes the recommended one.

    Returns:
        [hidden_size] per steered layer, fp32; product and sum in fp64, rounded once, so that strength 1 gives the
        bundle's own fp32 rows.

    Raises:
        BundleError: an intervention is no plain addition.
        BuildError: strength not finite, over the bundle's maximum, or one that leaves a layer without a vector.
    """
    manifest = bundle.manifest
    chosen = manifest.recommended_strength if strength is None else strength
    if not math.isfinite(chosen) or abs(chosen) > manifest.maximum_strength:
        raise BuildError(
            f"strength {chosen:g} is outside [-{manifest.maximum_strength:g}, {manifest.maximum_strength:g}], "
            "the range of the bundle; choose one inside"
        )
    sums: dict[int, Tensor] = {}
    for layer, row in bundle.additions():
        sums[layer] = sums.get(layer, torch.zeros_like(row, dtype=torch.float64)) + row.double()
    vectors = {layer: (chosen * total).float() for layer, total in sorted(sums.items())}
    for layer, vector in vectors.items():
        norm = float(vector.double().norm())
        if not MIN_NORM <= norm <= MAX_NORM:
            raise BuildError(
                f"at strength {chosen:g} the vector of layer {layer} has norm {norm:.3g}, outside [{MIN_NORM:g}, "
                f"{MAX_NORM:g}]; choose another strength"
            )
    return vectors


def lost_in_export(bundle: Bundle) -> list[str]:
    """Return what a file of vectors cannot say and the bundle does, one sentence each."""
    scope = bundle.manifest.scope.value
    lost = [] if scope == "all" else [f"the bundle steers scope '{scope}'; llama.cpp steers every token"]
    if bundle.manifest.exclude:
        lost.append(f"the bundle leaves {', '.join(bundle.manifest.exclude)} unsteered; llama.cpp steers every token")
    return [*lost, "identity of the target, maximum strength and evaluation stay in the bundle"]

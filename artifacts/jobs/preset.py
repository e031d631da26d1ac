"""Named sets of choices: what we recommend, and what the paper does."""

from collections.abc import Mapping
from typing import Any, Final

# The defaults of the configuration, spelt out so that choosing the preset on the command line undoes a file's choices.
RECOMMENDED: Final[Mapping[str, Any]] = {
    "preset": "recommended",
    "align": {"method": "ridge", "prompts": "other"},
    "pairing": {"method": "held-out"},
    "vectors": {"methods": "auto", "order": "both"},
}
# arXiv 2505.12313: auto-encoder aligner, pairs of low mutual information, RFM on the aligned states. The paper does not
# say which prompts the auto-encoder sees; its own texts are taken.
PAPER: Final[Mapping[str, Any]] = {
    "preset": "paper",
    "align": {"method": "autoencoder", "prompts": "same"},
    "pairing": {"method": "low-mi"},
    "vectors": {"methods": ["rfm"], "order": "align-then-fit"},
}
PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {"recommended": RECOMMENDED, "paper": PAPER}


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over each other; a later value wins, and a mapping over a mapping is merged."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = result.get(key)
            if isinstance(below, Mapping) and isinstance(value, Mapping):
                result[key] = merged(below, value)
            else:
                result[key] = value
    return result

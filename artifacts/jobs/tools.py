"""Versions of the packages whose numbers end up in a bundle."""

from importlib.metadata import version
from typing import Final

TOOLS: Final = ("expertsteer", "torch", "transformers", "safetensors", "xrfm", "scikit-learn", "scipy")


def tool_versions() -> dict[str, str]:
    """Installed version by package."""
    return {name: version(name) for name in TOOLS}

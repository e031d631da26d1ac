"""Prefix-cache lookups of steered and of other requests."""

from typing import Any


class CacheCounts:
    """Tokens that requests looked up in the prefix cache when they were first scheduled, and found there."""

    def __init__(self) -> None:
        self._tokens = {"steered": [0, 0], "unsteered": [0, 0]}

    def add(self, is_steered: bool, num_queried: int, num_found: int) -> None:
        """Count one request's lookup, in tokens."""
        tokens = self._tokens["steered" if is_steered else "unsteered"]
        tokens[0] += num_queried
        tokens[1] += num_found

    def to_wire(self) -> dict[str, Any]:
        """{"steered" | "unsteered": [tokens looked up, tokens found]}."""
        return {kind: list(tokens) for kind, tokens in self._tokens.items()}

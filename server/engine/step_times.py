"""How long the host spends on steering, step by step."""

from bisect import bisect_left
from typing import Any

# Upper bounds in seconds: from less than anybody notices to a tenth of a second.
BOUNDS_S = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 1e-1)
_BOUNDS_NS = tuple(round(bound * 1e9) for bound in BOUNDS_S)


class StepTimes:
    """Histogram over the steps that held a steered request."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_ns = 0

    def add(self, duration_ns: int) -> None:
        """Count one step."""
        self._counts[bisect_left(_BOUNDS_NS, duration_ns)] += 1
        self._sum_ns += duration_ns

    def to_wire(self) -> dict[str, Any]:
        """Bounds, counts by bucket (the last one has no bound; not cumulative) and sum."""
        return {"bounds_s": list(BOUNDS_S), "counts": list(self._counts), "sum_s": self._sum_ns / 1e9}

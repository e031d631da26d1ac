"""Counters of operations: how many, how they ended, how long they took."""

import asyncio
from bisect import bisect_left
from http import HTTPStatus
from typing import Any

# From an alias flip of some milliseconds to a download that runs into its time limit.
BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
# Their series exist from the start.
OPERATIONS = ("bundle.add", "bundle.delete", "profile.put", "profile.rollback", "profile.delete")
OUTCOMES = ("ok", "refused", "failed", "aborted")
INTERNAL = "internal"
# Codes are enumerated; should one ever hold a client's text, it must not make series without end.
_MAX_REASONS = 64
OTHER_REASON = "other"


def outcome_of(error: BaseException | None) -> str:
    """Outcome of an operation that ended with this error."""
    if error is None:
        return "ok"
    if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt, SystemExit)):
        return "aborted"
    status = getattr(error, "status", None)
    is_refusal = isinstance(status, int) and status < HTTPStatus.INTERNAL_SERVER_ERROR
    return "refused" if is_refusal else "failed"


def reason_of(error: BaseException) -> str:
    """Stable code of an error."""
    code = getattr(error, "code", None)
    return str(code) if isinstance(code, str) and code else INTERNAL


def count_capped(counts: dict[str, int], key: str) -> None:
    """Count under a key, or under `OTHER_REASON` once there are too many."""
    known = key in counts or len(counts) < _MAX_REASONS
    key = key if known else OTHER_REASON
    counts[key] = counts.get(key, 0) + 1


class OperationCounter:
    """Counts of one operation. Not thread-safe: `SteeringMetrics` locks."""

    def __init__(self) -> None:
        self._outcomes = dict.fromkeys(OUTCOMES, 0)
        self._reasons: dict[str, int] = {}
        self._buckets = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0

    def note(self, duration_s: float, error: BaseException | None) -> None:
        """Count one operation.

        Args:
            duration_s: how long it took.
            error: what ended it, if it did not succeed.
        """
        outcome = outcome_of(error)
        self._outcomes[outcome] += 1
        if error is not None and outcome != "aborted":
            count_capped(self._reasons, reason_of(error))
        self._buckets[bisect_left(BOUNDS_S, duration_s)] += 1
        self._sum_s += duration_s

    def to_json(self) -> dict[str, Any]:
        """Counts."""
        return {
            "outcomes": dict(self._outcomes),
            "reasons": dict(self._reasons),
            "buckets": list(self._buckets),
            "sum_s": self._sum_s,
        }

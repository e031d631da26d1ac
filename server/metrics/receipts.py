"""Check of receipts against the counts that the workers kept for themselves."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from server.engine.ended import Ended

_MAX_PENDING = 16384
_KEEP_S = 60.0
_IDS_PER_CALL = 2048

AskEnded = Callable[[Sequence[str]], Awaitable[Mapping[str, Ended]]]


class _Claim:
    """What a receipt said, and what the workers have told so far about its requests."""

    def __init__(self, num_requests: int, counts: Sequence[int], at_s: float) -> None:
        self.num_requests = num_requests
        self.counts = counts
        self.at_s = at_s
        self.ended: Ended | None = None

    def note(self, ended: Ended) -> Ended:
        """Add what the workers told: the choices of one answer end at different steps, and in different replicas."""
        self.ended = ended if self.ended is None else self.ended + ended
        return self.ended


class ReceiptCheck:
    """Holds what receipts claim until the workers tell what they counted.

    Two paths that share nothing after the step that counts: a receipt is made of the counts that came with the outputs
    of the requests, the workers' own counts are kept until somebody asks.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        """Start without claims.

        Args:
            now_s: clock.
        """
        self._now_s = now_s
        self._pending: dict[str, _Claim] = {}
        self._checked_tokens = 0
        self._discrepancy_tokens = 0
        self._num_mismatches = 0
        self._num_unchecked = 0

    def claim(self, steering_id: str, num_requests: int, counts: Sequence[int]) -> None:
        """Remember a receipt whose answer the engine itself ended (not an abort, nor a stop string).

        Args:
            steering_id: of the request.
            num_requests: engine requests (choices) that the receipt covers.
            counts: prompt and generation tokens of each term in turn, summed over them.
        """
        self._pending[steering_id] = _Claim(num_requests, counts, self._now_s())
        if len(self._pending) > _MAX_PENDING:
            del self._pending[next(iter(self._pending))]
            self._num_unchecked += 1

    async def reconcile(self, ask: AskEnded) -> None:
        """Ask the workers about every receipt that waits, and give up on those that wait too long.

        Args:
            ask: `SteeringEngine.ended`.
        """
        waiting = list(self._pending)
        for start in range(0, len(waiting), _IDS_PER_CALL):
            for steering_id, told in (await ask(waiting[start : start + _IDS_PER_CALL])).items():
                claim = self._pending.get(steering_id)
                if claim is not None and (ended := claim.note(told)).num_requests == claim.num_requests:
                    del self._pending[steering_id]
                    self._compare(claim.counts, ended)
        self._give_up()

    def to_json(self) -> dict[str, Any]:
        """Counts."""
        return {
            "checked_tokens": self._checked_tokens,
            "discrepancy_tokens": self._discrepancy_tokens,
            "mismatches": self._num_mismatches,
            "unchecked": self._num_unchecked,
        }

    def _compare(self, claimed: Sequence[int], ended: Ended) -> None:
        if ended.num_aborted:
            # The workers computed tokens that the answer does not hold.
            self._num_unchecked += 1
            return
        self._checked_tokens += sum(claimed)
        self._discrepancy_tokens += sum(claimed) - sum(ended.counts)
        # Differences of two receipts may cancel out in the sum.
        self._num_mismatches += tuple(claimed) != tuple(ended.counts)

    def _give_up(self) -> None:
        oldest_s = self._now_s() - _KEEP_S
        for steering_id in [key for key, claim in self._pending.items() if claim.at_s < oldest_s]:
            del self._pending[steering_id]
            self._num_unchecked += 1

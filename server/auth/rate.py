"""Rate limit: a token bucket for each name."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

DEFAULT_RATE_PER_S = 20.0
DEFAULT_BURST = 100
MAX_NAMES = 4096


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class RateLimit:
    """Admits `burst` at once and then `rate_per_s` of each name. For one thread, as the event loop's.

    Of more names than it may remember, the one that has been quiet for longest is forgotten.
    """

    def __init__(
        self,
        rate_per_s: float = DEFAULT_RATE_PER_S,
        burst: int = DEFAULT_BURST,
        *,
        max_names: int = MAX_NAMES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with full buckets.

        Raises:
            ValueError: a bound that admits nothing.
        """
        if not rate_per_s > 0 or burst < 1 or max_names < 1:
            raise ValueError(
                f"A rate of {rate_per_s} per second, a burst of {burst} and {max_names} names must all be positive."
            )
        self._rate_per_s, self._burst, self._max_names, self._clock = rate_per_s, burst, max_names, clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, name: str) -> float:
        """Admit one, or say how long to wait.

        Returns:
            0 when it is admitted, otherwise the seconds until one will be.
        """
        now = self._clock()
        bucket = self._buckets.setdefault(name, _Bucket(self._burst, now))
        self._buckets.move_to_end(name)
        if len(self._buckets) > self._max_names:
            self._buckets.popitem(last=False)
        bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.filled_at) * self._rate_per_s)
        bucket.filled_at = now
        if bucket.tokens >= 1:
            bucket.tokens -= 1
            return 0.0
        return (1 - bucket.tokens) / self._rate_per_s

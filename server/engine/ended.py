"""Final counts of the requests that have ended, kept by the workers until somebody asks."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

# Attribute under which a SchedulerOutput carries {request id: End} of its finished requests.
ENDS_ATTRIBUTE = "steering_ends"
_MAX_KEPT = 65536


class End(NamedTuple):
    """Where a request ended.

    Attributes:
        stop: position after the last one that its answer depends on.
        is_aborted: whether it was ended from outside: the client went away, or the API process found a stop string.
    """

    stop: int
    is_aborted: bool


class Ended(NamedTuple):
    """Requests of one steering id that have ended.

    Attributes:
        num_requests: how many, all of them.
        counts: their counts added up, in the order of `RequestPlan.tokens_steered`.
        num_aborted: how many of them were aborted; the answers of those may hold fewer tokens than were computed.
    """

    num_requests: int
    counts: tuple[int, ...]
    num_aborted: int

    def __add__(self, other: object) -> "Ended":
        """Both together; all requests of one steering id have the same terms."""
        assert isinstance(other, Ended)
        counts = tuple(map(sum, zip(self.counts, other.counts, strict=True)))
        return Ended(self.num_requests + other.num_requests, counts, self.num_aborted + other.num_aborted)


class EndedRequests:
    """The latest steering ids whose requests have ended. The oldest are dropped: nobody may ever ask for them."""

    def __init__(self, capacity: int = _MAX_KEPT) -> None:
        self._capacity = capacity
        self._ended: OrderedDict[str, Ended] = OrderedDict()

    def add(self, steering_id: str, counts: Sequence[int], is_aborted: bool) -> None:
        """Keep the counts of one request."""
        ended = Ended(1, tuple(counts), int(is_aborted))
        earlier = self._ended.get(steering_id)
        # Two steerings of one id can only come from an offline user; a step must not fail over them.
        if earlier is not None and len(earlier.counts) == len(counts):
            ended = earlier + ended
        self._ended[steering_id] = ended
        if len(self._ended) > self._capacity:
            self._ended.popitem(last=False)

    def take(self, steering_ids: Iterable[str]) -> dict[str, Any]:
        """Hand over what is known of these ids, and forget it."""
        return {key: list(self._ended.pop(key)) for key in steering_ids if key in self._ended}

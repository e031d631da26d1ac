"""Which programs running requests rely on."""

import weakref
from collections import Counter
from collections.abc import Sequence


class Pin:
    """A request's hold on the programs that it was admitted with."""

    def __init__(self, counts: Counter[str], keys: Sequence[str]) -> None:
        self._counts = counts
        self._keys = tuple(keys)
        self._counts.update(self._keys)

    def release(self) -> None:
        """Let go. A second call does nothing."""
        for key in self._keys:
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]
        self._keys = ()

    def release_with(self, owner: object) -> None:
        """Let go when an object is gone, for owners that may end without a word."""
        weakref.finalize(owner, self.release)


class Pins:
    """Reference counts of program keys in this process. For the event loop's thread only."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def hold(self, keys: Sequence[str]) -> Pin:
        """Count a request in."""
        return Pin(self._counts, keys)

    @property
    def keys(self) -> frozenset[str]:
        """Keys that some request holds."""
        return frozenset(self._counts)

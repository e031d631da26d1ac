"""Counters of requests and tokens by profile, for as long as the profile's name exists."""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from server.metrics.counts import PhaseTokens, sum_choices
from server.profiles import Resolved

# Label of names that are not registered, or beyond the cap. A profile of this name shares it.
OTHER = "other"


class Outcome(StrEnum):
    """How a request ended."""

    OK = "ok"
    REFUSED = "refused"
    ABORTED = "aborted"
    FAILED = "failed"


class _Counter:
    """Counts under one label."""

    def __init__(self) -> None:
        self.requests = dict.fromkeys(Outcome, 0)
        self.num_active = 0
        self._ended = PhaseTokens()
        self._shown = PhaseTokens()

    def end(self, tokens: PhaseTokens) -> None:
        self._ended = self._ended.plus(tokens)

    def tokens(self, live: PhaseTokens) -> PhaseTokens:
        """Tokens of ended requests and of live ones; never less than before.

        The last step of a request may take drafts off its count that were accepted behind its end.
        """
        self._shown = self._shown.at_least(self._ended.plus(live))
        return self._shown

    def to_json(self, live: PhaseTokens) -> dict[str, Any]:
        return {
            "requests": {outcome.value: number for outcome, number in self.requests.items()},
            "tokens": self.tokens(live)._asdict(),
            "active": self.num_active,
        }


class _Live:
    """An admitted request: under which counters its terms count, and which of its tokens count elsewhere."""

    def __init__(self, resolved: Resolved, counts: Mapping[str, Sequence[int]], counters: Sequence[_Counter]) -> None:
        # Held, so that no other request gets its identity meanwhile.
        self.resolved = resolved
        self.counts = counts
        # By term; of terms with strength 0, which steer no token, only the request counts.
        self._terms = [counter for term, counter in zip(resolved.terms, counters, strict=True) if term.strength]
        self._elsewhere = [PhaseTokens()] * len(self._terms)
        self.counters = set(counters)

    def tokens(self, counts: Mapping[str, Sequence[int]]) -> Iterable[tuple[_Counter, PhaseTokens]]:
        by_term = sum_choices(counts, len(self._terms))
        for counter, tokens, elsewhere in zip(self._terms, by_term, self._elsewhere, strict=True):
            yield counter, tokens.minus(elsewhere)

    def move(self, gone: _Counter, other: _Counter) -> None:
        """Count under `other` from now on; what there is went with the name."""
        by_term = sum_choices(self.counts, len(self._terms))
        self._elsewhere = [
            tokens if counter is gone else elsewhere
            for counter, tokens, elsewhere in zip(self._terms, by_term, self._elsewhere, strict=True)
        ]
        self._terms = [other if counter is gone else counter for counter in self._terms]
        self.counters.remove(gone)
        if other not in self.counters:
            self.counters.add(other)
            other.num_active += 1


class ProfileCounters:
    """Counts by profile. Not thread-safe: `SteeringMetrics` locks."""

    def __init__(self, max_labels: int) -> None:
        """Start without profiles.

        Args:
            max_labels: profiles with series of their own; the others count under `OTHER`.
        """
        self._max_labels = max_labels
        self._counters: dict[str, _Counter] = {}
        self._other = _Counter()
        self._live: dict[int, _Live] = {}
        self.registered: frozenset[str] = frozenset()

    def register(self, names: Sequence[str]) -> None:
        """Give series to names that are new, in order, and drop those of names that are gone."""
        self.registered = frozenset(names)
        for name in [name for name in self._counters if name not in self.registered]:
            gone = self._counters.pop(name)
            for live in self._live.values():
                if gone in live.counters:
                    live.move(gone, self._other)
        for name in names:
            if name != OTHER and len(self._counters) < self._max_labels:
                self._counters.setdefault(name, _Counter())

    def admit(self, resolved: Resolved, counts: Mapping[str, Sequence[int]]) -> None:
        """Count a request as active."""
        live = _Live(resolved, counts, [self._of(term.profile.name) for term in resolved.terms])
        self._live[id(resolved)] = live
        for counter in live.counters:
            counter.num_active += 1

    def end(self, resolved: Resolved, outcome: Outcome, counts: Mapping[str, Sequence[int]]) -> None:
        """Count an admitted request as ended; nothing when it already is."""
        live = self._live.pop(id(resolved), None)
        if live is None:
            return
        for counter in live.counters:
            counter.num_active -= 1
            counter.requests[outcome] += 1
        for counter, tokens in live.tokens(counts):
            counter.end(tokens)

    def refuse(self, profiles: Sequence[str]) -> None:
        """Count a request that was not admitted."""
        for counter in {self._of(name.partition("@")[0]) for name in profiles} or {self._other}:
            counter.requests[Outcome.REFUSED] += 1

    def to_json(self) -> dict[str, Any]:
        """Counts by label."""
        live: dict[_Counter, PhaseTokens] = {}
        for request in self._live.values():
            for counter, tokens in request.tokens(request.counts):
                live[counter] = live.get(counter, PhaseTokens()).plus(tokens)
        counters = {**self._counters, OTHER: self._other}
        return {name: counter.to_json(live.get(counter, PhaseTokens())) for name, counter in counters.items()}

    def _of(self, name: str) -> _Counter:
        return self._counters.get(name, self._other)

"""Counters of one API process, and the series of the whole instance made from those of all its processes."""

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prometheus_client.metrics_core import Metric

from server.engine.counters import EngineCounters
from server.errors import ErrorCode
from server.metrics.families import all_families
from server.metrics.figures import StateFigures
from server.metrics.operation_counters import OPERATIONS, OperationCounter, count_capped
from server.metrics.profile_counters import Outcome, ProfileCounters
from server.metrics.receipts import ReceiptCheck
from server.profiles import Resolved


class SteeringMetrics:
    """Counts what happens in this process; safe to call from any thread.

    Several processes serve one instance and a scrape reaches one of them. So every process publishes its `snapshot`,
    and the one that is scraped adds them all up: whichever it is, a sum never shrinks.

    Attributes:
        receipts: the check of receipts.
    """

    def __init__(self, max_labels: int = 200, operations: Iterable[str] = OPERATIONS) -> None:
        """Start at zero.

        Args:
            max_labels: profiles with series of their own; the others count under the label `other`.
            operations: names whose series exist from the start.
        """
        self._mutex = threading.Lock()
        self._ended: queue.SimpleQueue[tuple[Resolved, Outcome, Mapping[str, Sequence[int]]]] = queue.SimpleQueue()
        self._profiles = ProfileCounters(max_labels)
        self._refusals = dict.fromkeys((code.value for code in ErrorCode), 0)
        self._operations = {name: OperationCounter() for name in operations}
        self.receipts = ReceiptCheck()

    def register(self, names: Sequence[str]) -> None:
        """Make the series of these profiles exist, at zero where they are new, and those of all others go.

        Requests that run on under a name that went count under `other` from then on.

        Args:
            names: the current profiles. Beyond the cap, earlier ones come first; who has series keeps them.
        """
        with self._lock():
            self._profiles.register(names)

    def admitted(self, resolved: Resolved, counts: Mapping[str, Sequence[int]]) -> None:
        """Count a request as active.

        Args:
            resolved: its steering.
            counts: prompt and generation tokens of each term with a strength other than 0 in turn, by engine request
                id. Read at every snapshot until `ended`.
        """
        with self._lock():
            self._profiles.admit(resolved, counts)

    def ended(self, resolved: Resolved, outcome: str, counts: Mapping[str, Sequence[int]]) -> None:
        """Count an admitted request as ended. A second call for the same request does nothing.

        Args:
            resolved: the object given to `admitted`.
            outcome: ok, refused, aborted or failed.
            counts: final counts, as for `admitted`.

        Raises:
            ValueError: there is no such outcome.
        """
        # A finalizer may call this at any point of this process's code, with the lock held by its own thread.
        self._ended.put((resolved, Outcome(outcome), counts))
        if self._mutex.acquire(blocking=False):
            try:
                self._count_ended()
            finally:
                self._mutex.release()

    def refused(self, code: str, profiles: Sequence[str]) -> None:
        """Count a request that was not admitted.

        Args:
            code: error code of the answer.
            profiles: names that it gave, whether they exist or not.
        """
        with self._lock():
            count_capped(self._refusals, str(code))
            self._profiles.refuse(profiles)

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Time and count what happens inside, by how it ends.

        Args:
            name: of the operation; one of a fixed set.
        """
        start_s = time.perf_counter()
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            with self._lock():
                self._operations.setdefault(name, OperationCounter()).note(time.perf_counter() - start_s, error)

    def snapshot(self) -> dict[str, Any]:
        """This process's counters, for JSON; `families` reads them."""
        with self._lock():
            return {
                "profiles": self._profiles.to_json(),
                "refusals": dict(self._refusals),
                "operations": {name: counter.to_json() for name, counter in self._operations.items()},
                "receipts": self.receipts.to_json(),
            }

    def families(
        self, members: Sequence[Mapping[str, Any]], engine: EngineCounters, state: StateFigures
    ) -> list[Metric]:
        """Every series of the instance.

        Args:
            members: latest snapshot of every live member, this one's too.
            engine: the engine's counters; `NO_ENGINE` when it does not answer, so that a scrape still does.
            state: registry and readiness.
        """
        with self._lock():
            registered = self._profiles.registered
        return all_families(members, registered, engine, state)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with self._mutex:
            self._count_ended()
            yield

    def _count_ended(self) -> None:
        while not self._ended.empty():
            self._profiles.end(*self._ended.get())

"""Timing of variants that take turns, and ratios paired by round."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_RESAMPLES = 2000
_WARM_UP_ROUNDS = 2
# Reading the clock twice takes about a tenth of a microsecond.
_BATCH_S = 30e-6
_BATCHES_MIN = 3


class Work(NamedTuple):
    """Something to time.

    Attributes:
        calls: the same call on one or more sets of buffers.
        reset: puts the contents of the buffers back.
        moved_bytes: what one call must read and write at least.
    """

    calls: Sequence[Callable[[], object]]
    reset: Callable[[], object]
    moved_bytes: int


class Interval(NamedTuple):
    """An estimate and its 95 % percentile-bootstrap interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.3f} ({self.low:.3f}, {self.high:.3f})"

    def times(self, factor: float) -> "Interval":
        return Interval(*(factor * value for value in self))

    def at_most(self, goal: float) -> str:
        """Whether the interval is below or above the goal, or holds it."""
        if self.high <= goal:
            return f"<= {goal:g} met"
        return f"<= {goal:g} {'missed' if self.low > goal else 'open'}"

    def at_least(self, goal: float) -> str:
        """Whether the interval is above or below the goal, or holds it."""
        if self.low >= goal:
            return f">= {goal:g} met"
        return f">= {goal:g} {'missed' if self.high < goal else 'open'}"


@dataclass(frozen=True)
class Samples:
    """Times of one variant, [num_rounds], seconds per call; samples of two variants are paired by round."""

    seconds: Tensor

    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile, in seconds."""
        low, median, high = self.seconds.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        return low, median, high

    def over(self, other: "Samples") -> Interval:
        """Median over rounds of this one's seconds / the other's.

        Resamples rounds. (Percentile interval: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.)
        """
        ratios = self.seconds / other.seconds
        generator = torch.Generator().manual_seed(0)
        draws = torch.randint(len(ratios), (_RESAMPLES, len(ratios)), generator=generator)
        # quantile, unlike median, takes the middle of two.
        medians = ratios[draws].quantile(0.5, dim=1)
        low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return Interval(ratios.quantile(0.5).item(), low, high)


class Stopwatch(Protocol):
    """Times one turn of a variant."""

    def turn(self) -> float:
        """Seconds per call."""


class HostStopwatch:
    """Median over batches of calls just long enough for the clock: an interruption spoils a batch, not the turn."""

    def __init__(self, work: Work, turn_s: float) -> None:
        self._work, self._repeats, self._batches = work, 1, _BATCHES_MIN
        call_s = min(self.turn() for _ in range(3))
        self._repeats = max(1, round(_BATCH_S / (call_s * len(work.calls))))
        self._batches = max(_BATCHES_MIN, round(turn_s / (call_s * len(work.calls) * self._repeats)))

    def turn(self) -> float:
        self._work.reset()
        return statistics.median(self._batch() for _ in range(self._batches))

    def _batch(self) -> float:
        calls, repeats = self._work.calls, range(self._repeats)
        start = time.perf_counter()
        for _ in repeats:
            for call in calls:
                call()
        return (time.perf_counter() - start) / (self._repeats * len(calls))


class CudaStopwatch:
    """Replays the calls from a CUDA graph between two events, so that no launch from the host is in the time.

    The calls go round several sets of buffers, which together exceed the L2 cache where one set is large: each call
    then finds its rows in memory. Sets of small batches stay in the cache, as they do while serving.
    """

    def __init__(self, work: Work, turn_s: float) -> None:
        self._work, self._repeats = work, 1
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is set up at a first call may not be captured
            work.calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for call in work.calls:
                call()
        self.turn()
        self._repeats = max(1, round(turn_s / (self.turn() * len(work.calls))))

    def turn(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._work.reset()
        start.record()
        for _ in range(self._repeats):
            self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (self._repeats * len(self._work.calls))


def interleaved(
    works: Mapping[str, Work], device_type: str, rounds: int, turn_s: float, advance: Callable[[], object]
) -> dict[str, Samples]:
    """Samples of every variant: each gets one turn a round, in random order, so that a machine which slows down or
    speeds up favours none.

    Args:
        device_type: "cpu" or "cuda", where the calls run.
        turn_s: seconds that one turn takes at least about.
        advance: called after every turn.
    """
    make = CudaStopwatch if device_type == "cuda" else HostStopwatch
    watches: dict[str, Stopwatch] = {name: make(work, turn_s) for name, work in works.items()}
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(_WARM_UP_ROUNDS + rounds):
        for name in order.sample(list(watches), len(watches)):
            seconds[name].append(watches[name].turn())
            advance()
    return {
        name: Samples(torch.tensor(times[_WARM_UP_ROUNDS:], dtype=torch.float64)) for name, times in seconds.items()
    }


def num_turns(num_works: int, rounds: int) -> int:
    """How often `interleaved` calls `advance`."""
    return num_works * (_WARM_UP_ROUNDS + rounds)

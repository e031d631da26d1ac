"""What takes turns with what: the variants of one workload, and which of them are compared."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from turn import Batch, Workload


@dataclass(frozen=True)
class Variant:
    """One way to run a workload.

    Attributes:
        name: unique in its block.
        package: whether the engine with the package runs it, or plain vLLM.
        resident: bundles that the engine holds.
        distinct: bundles that the requests of a batch have in turn; 0 steers nobody.
        drawn: each request draws one of the residents instead.
    """

    name: str
    package: bool = True
    resident: int = 0
    distinct: int = 0
    drawn: bool = False

    def batch(self, workload: Workload, seed: int) -> Batch:
        """The batch of a seed. Variants of one workload get the same prompts from the same seed."""
        draws = random.Random(seed)
        indices = range(workload.batch)
        bundles: tuple[int, ...] = ()
        if self.drawn:
            bundles = tuple(draws.randrange(self.resident) for _ in indices)
        elif self.distinct:
            bundles = tuple(index % self.distinct for index in indices)
        return Batch(workload, seed, self.resident, bundles)


class Pair(NamedTuple):
    """A variant, what it is compared with, and the goal for the throughput; None where it shall be equal."""

    ours: str
    theirs: str
    goal: float | None


@dataclass(frozen=True)
class Block:
    """Variants of one workload that take turns, and their comparisons."""

    workload: Workload
    variants: tuple[Variant, ...]
    pairs: tuple[Pair, ...]


def overhead_block(workload: Workload, resident: int, goals: tuple[float, float]) -> Block:
    """Plain vLLM, the idle package, and a batch in which every request has a bundle of its own.

    Args:
        workload: what all of them run.
        resident: bundles that the package holds, at least as many as a batch has requests.
        goals: throughput over plain vLLM's, idle and steered.
    """
    variants = (
        Variant("plain", package=False),
        Variant("idle", resident=resident),
        Variant("steered", resident=resident, distinct=workload.batch),
    )
    pairs = (Pair("idle", "plain", goals[0]), Pair("steered", "plain", goals[1]), Pair("steered", "idle", None))
    return Block(workload, variants, pairs)


def resident_block(workload: Workload, counts: Sequence[int]) -> Block:
    """Batches in which every request draws one of more and more resident bundles."""
    variants = tuple(Variant(f"{count} resident", resident=count, drawn=True) for count in counts)
    return _flat(workload, variants)


def distinct_block(workload: Workload, counts: Sequence[int], resident: int) -> Block:
    """Batches that hold more and more different bundles."""
    variants = tuple(Variant(f"{count} distinct", resident=resident, distinct=count) for count in counts)
    return _flat(workload, variants)


def _flat(workload: Workload, variants: tuple[Variant, ...]) -> Block:
    return Block(workload, variants, tuple(Pair(variant.name, variants[0].name, None) for variant in variants[1:]))

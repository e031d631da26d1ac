"""What became of the answers of `swaps.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Change(NamedTuple):
    """A change of the profile: from `begin_s` on requests may get `bundle`, from `end_s` on they must."""

    begin_s: float
    end_s: float
    bundle: str


@dataclass
class Answer:
    """One streamed answer as it was received."""

    prompt: str
    begin_s: float
    first_s: float = 0.0
    end_s: float = 0.0
    text: str = ""
    bundle: str = ""
    header: str = ""
    num_steered: int = 0
    num_scoped: int = 0
    failure: str | None = None


@dataclass
class Figures:
    """What came of a run."""

    swaps: int
    streams: int
    answers: int
    answers_across_a_swap: int
    answers_by_bundle: list[int]
    failed: int
    mixed: int
    miscounted: int
    stale: int
    failures: list[str] = field(default_factory=list)
    activate_p50_ms: float = 0.0
    activate_p99_ms: float = 0.0
    activate_max_ms: float = 0.0
    duration_s: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether nobody noticed."""
        return not (self.failed or self.mixed or self.miscounted or self.stale)


def judge(
    answers: Sequence[Answer],
    changes: Sequence[Change],
    bundles: Sequence[str],
    texts: Mapping[str, Mapping[str, str]],
    num_streams: int,
) -> Figures:
    """Hold every answer against its receipt.

    Args:
        answers: all of them.
        changes: of the profile in order, the first one from before all answers.
        bundles: A and B.
        texts: what each bundle alone says, by prompt and digest.
        num_streams: for the record.
    """
    whole = [answer for answer in answers if answer.failure is None]
    times_ms = [(change.end_s - change.begin_s) * 1000 for change in changes[1:]]
    figures = Figures(
        swaps=len(changes) - 1,
        streams=num_streams,
        answers=len(answers),
        answers_across_a_swap=sum(_is_across(answer, changes) for answer in whole),
        answers_by_bundle=[sum(answer.bundle == digest for answer in whole) for digest in bundles],
        failed=len(answers) - len(whole),
        mixed=0,
        miscounted=0,
        stale=0,
        failures=[answer.failure for answer in answers if answer.failure is not None][:5],
        activate_p50_ms=float(np.percentile(times_ms, 50)),
        activate_p99_ms=float(np.percentile(times_ms, 99)),
        activate_max_ms=max(times_ms),
        duration_s=changes[-1].end_s - changes[1].begin_s,
    )
    for answer in whole:
        is_pure = answer.text == texts[answer.prompt].get(answer.bundle)
        figures.mixed += not is_pure or answer.header != answer.bundle
        figures.miscounted += answer.num_steered != answer.num_scoped
        figures.stale += answer.bundle not in _possible(answer, changes)
    return figures


def _possible(answer: Answer, changes: Sequence[Change]) -> set[str]:
    """Bundles that the profile may have had when the answer was admitted."""
    settled = [change.bundle for change in changes if change.end_s <= answer.begin_s]
    under_way = {
        change.bundle for change in changes if change.end_s > answer.begin_s and change.begin_s < answer.first_s
    }
    return {settled[-1]} | under_way


def _is_across(answer: Answer, changes: Sequence[Change]) -> bool:
    return any(answer.first_s < change.begin_s and change.end_s < answer.end_s for change in changes)

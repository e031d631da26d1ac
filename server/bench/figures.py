"""Figures of a benchmark: of each arm at each rate, and ratios to the unsteered arm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from server.bench.measured import Array, Measured
from server.bench.plan import UNSTEERED, Plan
from server.bench.ratios import Interval, ratio_of_percentiles, ratio_of_sums

PERCENTILES = (50, 99)
# Times of requests: those that ratios are taken of.
TIMES = ("ttft", "tpot", "e2e")
# Below this share of the offered rate, requests queue up, and times say how long the run was.
_KEPT_UP = 0.9


@dataclass(frozen=True)
class ArmFigures:
    """One arm at one rate, over all complete rounds.

    Attributes:
        rate: requests offered a second.
        arm: `unsteered`, or a profile.
        times_s: by name (`ttft`, `tpot`, `e2e`), [num_rounds, num_prompts]; NaN where a request has none.
        itl_s: times between tokens of all requests.
        num_completed, num_failed: requests.
        output_tokens_per_s, requests_per_s: while the turns ran.
        tokens_steered: by the server's own count; None where it cannot be read.
        errors: how often each message came.
    """

    rate: float
    arm: str
    times_s: Mapping[str, Array]
    itl_s: Array
    num_completed: int
    num_failed: int
    output_tokens_per_s: float
    requests_per_s: float
    tokens_steered: int | None
    errors: Mapping[str, int]

    @property
    def has_kept_up(self) -> bool:
        """Whether the server answered about as fast as requests came."""
        if not np.isfinite(self.rate) or not self.num_completed:
            return True
        # A turn ends with the answer to the last request, about one answer later than its last arrival.
        num_rounds = len(self.times_s["e2e"])
        last_answers_s = num_rounds * float(np.nanmedian(self.times_s["e2e"]))
        busy_s = self.num_completed / self.requests_per_s - last_answers_s
        return busy_s * self.rate * _KEPT_UP <= self.num_completed

    def percentile_ms(self, name: str, percentile: float) -> float | None:
        """A percentile of `ttft`, `tpot`, `itl` or `e2e`; None without a value."""
        values = self.itl_s if name == "itl" else self.times_s[name]
        values = values[~np.isnan(values)]
        return float(1e3 * np.percentile(values, percentile)) if len(values) else None


@dataclass(frozen=True)
class Ratio:
    """A figure of a profile / that of the unsteered arm.

    Attributes:
        rate: requests offered a second.
        arm: the profile.
        name: `throughput`, or a time with its percentile as `ttft_p50`.
        interval: None where there is too little for one.
    """

    rate: float
    arm: str
    name: str
    interval: Interval | None


@dataclass(frozen=True)
class Figures:
    """All figures, by rate and arm in the order of the plan.

    Attributes:
        arms: see there.
        ratios: see there.
        num_rounds: complete ones at each rate.
    """

    arms: tuple[ArmFigures, ...]
    ratios: tuple[Ratio, ...]
    num_rounds: Mapping[float, int]

    def ratio(self, rate: float, arm: str, name: str) -> Interval | None:
        """One ratio."""
        return next(each.interval for each in self.ratios if (each.rate, each.arm, each.name) == (rate, arm, name))

    def at(self, rate: float) -> list[ArmFigures]:
        """The arms at one rate."""
        return [each for each in self.arms if each.rate == rate]


def figures(plan: Plan, turns: Sequence[Measured]) -> Figures:
    """Figures of the rounds in which every arm has run; a rate without one is left out."""
    arms: list[ArmFigures] = []
    ratios: list[Ratio] = []
    num_rounds = {}
    for rate in plan.rates:
        ran = {(each.turn.round, each.turn.arm): each for each in turns if each.turn.rate == rate}
        rounds = [number for number in range(plan.num_rounds) if all((number, arm) in ran for arm in plan.arms)]
        if not rounds:
            continue
        num_rounds[rate] = len(rounds)
        by_arm = {arm: [ran[number, arm] for number in rounds] for arm in plan.arms}
        arms += [_of_arm(rate, arm, by_arm[arm]) for arm in plan.arms]
        for arm in plan.profiles:
            ratios += _ratios(rate, arm, by_arm[arm], by_arm[UNSTEERED])
    return Figures(tuple(arms), tuple(ratios), num_rounds)


def _of_arm(rate: float, arm: str, turns: Sequence[Measured]) -> ArmFigures:
    duration_s = sum(turn.duration_s for turn in turns)
    errors = [error for turn in turns for error in turn.errors]
    counts = [turn.tokens_steered for turn in turns if turn.tokens_steered is not None]
    num_completed = sum(turn.num_completed for turn in turns)
    return ArmFigures(
        rate,
        arm,
        times_s={name: _times(turns, name) for name in TIMES},
        itl_s=np.concatenate([turn.itl_s for turn in turns]),
        num_completed=num_completed,
        num_failed=len(errors),
        output_tokens_per_s=sum(turn.num_output_tokens for turn in turns) / duration_s,
        requests_per_s=num_completed / duration_s,
        tokens_steered=sum(counts) if len(counts) == len(turns) else None,
        errors={error: errors.count(error) for error in dict.fromkeys(errors)},
    )


def _ratios(rate: float, arm: str, ours: Sequence[Measured], theirs: Sequence[Measured]) -> list[Ratio]:
    found = [Ratio(rate, arm, "throughput", ratio_of_sums(_throughput(ours), _throughput(theirs)))]
    for name in TIMES:
        pair = _times(ours, name), _times(theirs, name)
        found += [Ratio(rate, arm, f"{name}_p{each}", ratio_of_percentiles(*pair, each)) for each in PERCENTILES]
    return found


def _times(turns: Sequence[Measured], name: str) -> Array:
    return np.stack([getattr(turn, f"{name}_s") for turn in turns])


def _throughput(turns: Sequence[Measured]) -> tuple[Array, Array]:
    tokens = np.array([turn.num_output_tokens for turn in turns], float)
    return tokens, np.array([turn.duration_s for turn in turns])

"""Which conditions an evaluation measures, and with which baselines."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from artifacts.evaluation.schema import About, ConditionKind, Settings
from artifacts.evaluation.subject import UNSTEERED, Condition

MIN_RANDOM: Final = 30
# A steering figure means nothing without these; each is measured, or the report says why not.
BASELINES: Final = ("random", "own", "untrained", "permuted-labels", "shuffled-pairs", "prompt")
_ABSENT: Final = "it was not given"
_DRAW: Final = re.compile(r"(.+)-\d+")


@dataclass(frozen=True)
class Baselines:
    """What the vector under test is compared with.

    Attributes:
        controls: by name (`own`, `untrained`, `permuted-labels-0`, ...): what the subject is told for it.
        random: directions of the same norm at the same layers, none or at least `MIN_RANDOM`.
        not_measured: reason for each baseline that is missing.
    """

    controls: Mapping[str, Condition] = field(default_factory=dict)
    random: Sequence[Condition] = ()
    not_measured: Mapping[str, str] = field(default_factory=dict)


class Measurement(NamedTuple):
    """One condition to measure. `prompt` is put before every question; `draw_of` names the chance it is a draw of."""

    kind: ConditionKind
    name: str
    steering: Condition = UNSTEERED
    prompt: str | None = None
    draw_of: str | None = None


def measurements(about: About, baselines: Baselines, settings: Settings) -> list[Measurement]:
    """Everything to measure; unsteered comes first, no strength of the vector twice.

    Raises:
        ValueError: too few random directions, or two conditions of one name.
    """
    if 0 < len(baselines.random) < MIN_RANDOM:
        raise ValueError(
            f"{len(baselines.random)} random directions say too little; at least {MIN_RANDOM} are needed, because "
            "single ones lift or lower accuracy by luck"
        )
    vector, strength = about.name, about.recommended
    plan = [
        Measurement("off", "off"),
        Measurement("on", "on", Condition(vector, strength)),
        Measurement("negated", "negated", Condition(vector, -strength)),
    ]
    if settings.prompt is not None:
        plan.append(Measurement("prompt", "prompt", prompt=settings.prompt))
    for name, condition in baselines.controls.items():
        draw = _DRAW.fullmatch(name)
        plan.append(Measurement("control", name, condition, draw_of=draw[1] if draw else None))
    for dose in doses(about, settings):
        if dose != 0 and not any(math.isclose(dose, known) for known in (strength, -strength)):
            plan.append(Measurement("dose", dose_name(dose), Condition(vector, dose)))
    plan += [
        Measurement("random", f"random-{index}", condition, draw_of="random")
        for index, condition in enumerate(baselines.random)
    ]
    names = [each.name for each in plan]
    if len(set(names)) < len(names):
        raise ValueError(f"two conditions are called {max(names, key=names.count)!r}; rename that control")
    return plan


def doses(about: About, settings: Settings) -> list[float]:
    """Ascending strengths of the dose-response: an even grid and the recommended strength."""
    sign = math.copysign(1.0, about.recommended)
    steps = settings.doses - 1
    found = {0.0, about.recommended} | {sign * about.maximum * step / steps for step in range(1, settings.doses)}
    if settings.negative_doses:
        found |= {-dose for dose in found}
    ascending: list[float] = []
    # The grid may hit the recommended strength but for rounding; the later of two such neighbours goes.
    for dose in sorted(found):
        if not ascending or not math.isclose(dose, ascending[-1], rel_tol=1e-5, abs_tol=1e-12):
            ascending.append(dose)
    return [0.0 if dose == 0 else dose for dose in ascending]


def dose_name(dose: float) -> str:
    """Name of the condition of a strength that is neither 0 nor the recommended one."""
    return f"dose {dose:g}"


def not_measured(baselines: Baselines, settings: Settings) -> dict[str, str]:
    """Why each baseline that ought to be there is missing."""
    present = {"random"} if baselines.random else set()
    present |= {"prompt"} if settings.prompt is not None else set()
    for name in baselines.controls:
        draw = _DRAW.fullmatch(name)
        present.add(draw[1] if draw else name)
    # The paper's auto-encoder sees no pairs; fresh initialisations are its chance instead.
    if "autoencoder" in present:
        present.add("shuffled-pairs")
    wanted = {name: _ABSENT for name in BASELINES} | dict(baselines.not_measured)
    return {name: reason for name, reason in wanted.items() if name not in present}

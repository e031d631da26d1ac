"""One step of a bundle: what it reads, computes and writes at one layer. `Manifest` has the formula of every kind."""

import math
from typing import Annotated, Literal, LiteralString, NamedTuple

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from artifacts.part import Name, Part, unsaid

MAX_PARAMETER = 1e6
# A smaller slope is no slope once it is rounded to fp32 and multiplied.
MIN_SLOPE = 1e-6
MAX_ANGLE = 2 * math.pi

KindName = Literal[
    "add", "add_relative", "project", "clamp", "gated_add", "feature", "rotate", "affine", "condition"
]  # fmt: skip
Number = Annotated[float, Field(ge=-MAX_PARAMETER, le=MAX_PARAMETER)]


class Parameters(Part):
    """Numbers and choices of an intervention; each kind takes some of them (`Intervention`).

    Attributes:
        minimum, maximum: bounds of read . x; a missing one is no bound.
        threshold: of read . x, or with `cosine` of read . x / |x|, in [-1, 1]; of a feature's jump ReLU.
        slope: of the sigmoid at the threshold; without it the gate is a step.
        below: the step is 1 under the threshold instead of over it.
        cosine: compare the cosine of read (a unit vector) and x.
        bias: of a feature's encoder.
        activation: of a feature: max(z, 0); z where z > threshold, else 0; z.
        edit: what becomes of a feature's activation v: value * v; value; v + value.
        value: see `edit`.
        angle: in radians, at strength 1.
        mode: turn by the angle, or to the angle, counted from the first row of the plane towards the second.
    """

    minimum: Number | None = Field(default=None, exclude_if=unsaid)
    maximum: Number | None = Field(default=None, exclude_if=unsaid)
    threshold: Number | None = Field(default=None, exclude_if=unsaid)
    slope: Number | None = Field(default=None, exclude_if=unsaid)
    below: bool = Field(default=False, exclude_if=unsaid)
    cosine: bool = Field(default=False, exclude_if=unsaid)
    bias: Number | None = Field(default=None, exclude_if=unsaid)
    activation: Literal["relu", "jump_relu", "identity"] | None = Field(default=None, exclude_if=unsaid)
    edit: Literal["scale", "set", "add"] | None = Field(default=None, exclude_if=unsaid)
    value: Number | None = Field(default=None, exclude_if=unsaid)
    angle: Number | None = Field(default=None, exclude_if=unsaid)
    mode: Literal["relative", "absolute"] | None = Field(default=None, exclude_if=unsaid)

    def said(self) -> dict[str, float | bool | str]:
        """Those that are given, by name, in the order of their declaration."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if not unsaid(value)}


class _Takes(NamedTuple):
    """Fields of a kind beside `layer` and `kind`."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


_COMMON = ("gate", "keep_norm")
_GATE = ("slope", "below", "cosine")
_TAKES: dict[KindName, _Takes] = {
    "add": _Takes(("write",), _COMMON),
    "add_relative": _Takes(("write",), _COMMON),
    "project": _Takes(("read",), _COMMON),
    "clamp": _Takes(("read",), (*_COMMON, "minimum", "maximum")),
    "gated_add": _Takes(("read", "write", "threshold"), (*_COMMON, *_GATE)),
    "feature": _Takes(("read", "write", "activation", "edit", "value"), (*_COMMON, "bias", "threshold")),
    "rotate": _Takes(("read", "angle", "mode"), _COMMON),
    "affine": _Takes((), (*_COMMON, "read", "write")),
    "condition": _Takes(("read", "threshold", "sets"), _GATE),
}


class Intervention(Part):
    """One step on the output of decoder block `layer` (0-based) of the target.

    Attributes:
        layer: decoder block.
        kind: which formula of `Manifest`.
        read, write: names of its tensors, `runtime.{layer}.{i}.read|write`.
        parameters: exactly those that the kind acts on.
        keep_norm: afterwards give x the 2-norm back that it had before this step.
        gate: multiply the strength by this gate, which a condition or a trigger sets.
        sets: the gate that a condition sets.
    """

    layer: int = Field(ge=0)
    kind: KindName
    read: str | None = None
    write: str | None = None
    parameters: Parameters = Parameters()
    keep_norm: bool = Field(default=False, exclude_if=unsaid)
    gate: Name | None = Field(default=None, exclude_if=unsaid)
    sets: Name | None = Field(default=None, exclude_if=unsaid)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of its tensors, read before write."""
        return tuple(name for name in (self.read, self.write) if name is not None)

    @property
    def is_plain_add(self) -> bool:
        """True when it adds strength * write to every token and does nothing else."""
        return self.kind == "add" and not self.keep_norm and self.gate is None

    @property
    def has_unit_read(self) -> bool:
        """True when its formula holds for a read row of norm 1 only."""
        return self.kind in ("project", "clamp", "rotate") or self.parameters.cosine

    @model_validator(mode="after")
    def _exactly_what_the_kind_takes(self) -> "Intervention":
        # Accepting a field that nothing acts on would steer otherwise than the manifest says.
        takes = _TAKES[self.kind]
        top = ("read", "write", "sets", "gate", "keep_norm")
        given = [*(name for name in top if not unsaid(getattr(self, name))), *self.parameters.said()]
        known = (*takes.required, *takes.optional)
        for name in given:
            if name not in known:
                raise _wrong(
                    "unused_field", f"kind '{self.kind}' takes no {name}, only {', '.join(known)}; leave it out"
                )
        for name in takes.required:
            if name not in given:
                raise _wrong("missing_field", f"kind '{self.kind}' needs {name} and none is given; add it")
        return self

    @model_validator(mode="after")
    def _parameters_agree(self) -> "Intervention":
        problem = _problem(self.parameters) or _PROBLEM_OF_KIND.get(self.kind, _none)(self)
        if problem is not None:
            raise _wrong("parameters_disagree", f"kind '{self.kind}': {problem}")
        return self


def _none(_step: Intervention) -> str | None:
    return None


def _wrong(code: LiteralString, message: str) -> PydanticCustomError:
    # The braces of a message must not be read as a template of pydantic's.
    return PydanticCustomError(code, "{reason}", {"reason": message})


def _problem(given: Parameters) -> str | None:
    """What is wrong with parameters that mean the same in every kind."""
    if given.slope is not None and abs(given.slope) < MIN_SLOPE:
        return f"slope {given.slope:g} is nearer to 0 than {MIN_SLOPE:g}; leave it out for a step, or make it steeper"
    if given.slope is not None and given.below:
        return f"below is for a step and slope {given.slope:g} makes a sigmoid; give a slope below 0 instead"
    if given.cosine and given.threshold is not None and abs(given.threshold) > 1:
        return (
            f"threshold {given.threshold:g} is outside [-1, 1], where every cosine lies; lower it, or leave cosine out"
        )
    return None


def _clamp_problem(step: Intervention) -> str | None:
    minimum, maximum = step.parameters.minimum, step.parameters.maximum
    if minimum is None and maximum is None:
        return "it needs minimum, maximum or both, and none is given; add one"
    if minimum is not None and maximum is not None and minimum > maximum:
        return f"minimum {minimum:g} is over maximum {maximum:g}; swap them, or give one value twice to set it"
    return None


def _feature_problem(step: Intervention) -> str | None:
    jumps = step.parameters.activation == "jump_relu"
    if jumps and step.parameters.threshold is None:
        return "activation 'jump_relu' needs threshold and none is given; add it"
    if not jumps and step.parameters.threshold is not None:
        return f"activation '{step.parameters.activation}' takes no threshold; leave it out, or take 'jump_relu'"
    return None


def _rotate_problem(step: Intervention) -> str | None:
    angle = step.parameters.angle
    if angle is not None and abs(angle) > MAX_ANGLE:
        return f"angle {angle:g} is outside [-2 pi, 2 pi]; give it in radians, less whole turns"
    return None


def _affine_problem(step: Intervention) -> str | None:
    return None if step.tensors else "it needs read (factors), write (offsets) or both, and none is given; add one"


_PROBLEM_OF_KIND = {
    "clamp": _clamp_problem,
    "feature": _feature_problem,
    "rotate": _rotate_problem,
    "affine": _affine_problem,
}

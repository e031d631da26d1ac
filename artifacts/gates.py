"""Gates of a bundle: what sets them and who uses them, checked so that none is read before it is set."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from artifacts.intervention import Intervention
from artifacts.part import Part, unsaid

MAX_GATES = 8
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Trigger(Part):
    """Tokens that set a gate to 1: those with one of these ids, or whose own text, decoded alone, contains this text.

    Exactly one of the two is given. Servers resolve a text to ids with the tokenizer of the served model.
    """

    token_ids: Annotated[tuple[TokenId, ...], Field(min_length=1)] | None = Field(default=None, exclude_if=unsaid)
    text_contains: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        default=None, exclude_if=unsaid
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> "Trigger":
        if (self.token_ids is None) == (self.text_contains is None):
            raise PydanticCustomError(
                "trigger_fields", "a trigger has either token_ids or text_contains; give exactly one of them"
            )
        return self


def check_gates(interventions: Sequence[Intervention], triggers: Mapping[str, Trigger]) -> None:
    """Refuse gates that are set twice, used before they are set, never used, or too many.

    Args:
        interventions: in listed order; those of a lower layer act first.
        triggers: by the gate that they set, before any layer.

    Raises:
        PydanticCustomError: of type "bad_gate".
    """
    ready = set(triggers)
    used: set[str] = set()
    for step in sorted(interventions, key=lambda step: step.layer):
        if step.gate is not None and step.gate not in ready:
            raise _bad(
                step.gate,
                f"used at layer {step.layer} and nothing sets it before; list a condition that sets it at a lower "
                "layer or earlier at this one, or a trigger of that name",
            )
        if step.gate is not None:
            used.add(step.gate)
        if step.sets in ready:
            raise _bad(step.sets, f"set again at layer {step.layer}; give each condition and trigger a gate of its own")
        if step.sets is not None:
            ready.add(step.sets)
    for gate in sorted(ready - used):
        raise _bad(gate, "set and no intervention uses it; name it as the gate of one, or leave it out")
    if len(ready) > MAX_GATES:
        raise PydanticCustomError(
            "bad_gate",
            "there are {count} gates and {most} fit; share some, or make two bundles",
            {"count": len(ready), "most": MAX_GATES},
        )


def _bad(gate: str | None, what: str) -> PydanticCustomError:
    return PydanticCustomError("bad_gate", "gate '{gate}' is {what}", {"gate": gate, "what": what})

"""What every part of a manifest has in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]


class Part(BaseModel):
    """Immutable, without unknown keys, without NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def unsaid(value: object) -> bool:
    """True for a field that says nothing; the fields that use it are left out of a file when they do."""
    return value is None or value is False or value in ((), {})

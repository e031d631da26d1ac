"""Request fields and receipt that this server adds to the OpenAI schema."""

import difflib
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from artifacts.errors import quoted
from artifacts.manifest import Scope
from server.errors import ErrorCode

FIELD = "steering_profile"
MAX_NAME_LENGTH = 256
_MAX_PROFILES = 32
# Objects in a request whose unknown keys vLLM passes on or drops in silence.
_SWALLOWED = ("vllm_xargs", "sampling_params", "extra_args", "extra_body")
# How alike an unknown key must be to `steering_profile` before it counts as a slip of the pen ("stearing_profile").
_SIMILARITY = 0.8
_MAX_COMPARED = 256


class ProfileRef(BaseModel):
    """A profile chosen by a request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[
        str,
        Field(
            description="Name of a served profile; `name@sha256:<hex prefix>` insists on one version of it.",
            examples=["medical"],
        ),
    ]
    strength: Annotated[
        float | None,
        Field(
            description="Multiplier of the profile's vectors, in place of its default. 0 is exactly off, a negative "
            "value reverses the behaviour; the absolute value may not exceed the profile's maximum.",
        ),
    ] = None
    scope: Annotated[
        Scope | None,
        Field(
            description="Which tokens are steered, in place of the profile's default: `all`, `prompt`, `response` "
            "(last prompt token and everything generated) or `generation` (generated tokens only).",
        ),
    ] = None


def _error(code: ErrorCode, message: str) -> PydanticCustomError:
    # The braces of a user's text must not be read as a template of pydantic's.
    return PydanticCustomError(code.value, "{reason}", {"reason": message})


def _parse_strength(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _error(ErrorCode.STRENGTH_INVALID, f"strength is {quoted(value)}, expected a number.")
    try:
        strength = float(value)
    except OverflowError:
        strength = math.inf
    if not math.isfinite(strength):
        raise _error(ErrorCode.STRENGTH_INVALID, f"strength is {strength}, expected a finite number.")
    return strength


def _parse_ref(value: Any) -> ProfileRef:
    if isinstance(value, ProfileRef):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise _error(
            ErrorCode.PROFILE_INVALID,
            f"{FIELD} is {quoted(value)}, expected a name, an object {{name, strength, scope}} or a list of those.",
        )
    unknown = sorted(str(key) for key in value.keys() - set(ProfileRef.model_fields))
    if unknown:
        raise _error(
            ErrorCode.FIELD_UNKNOWN, f"{FIELD} has unknown key {quoted(unknown[0])}; known: name, strength, scope."
        )
    name, strength, scope = value.get("name"), value.get("strength"), value.get("scope")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_LENGTH:
        raise _error(
            ErrorCode.PROFILE_INVALID, f"name is {quoted(name)}, expected 1 to {MAX_NAME_LENGTH} characters of text."
        )
    if scope is not None and (not isinstance(scope, str) or scope not in list(Scope)):
        raise _error(ErrorCode.SCOPE_INVALID, f"scope is {quoted(scope)}, expected one of: {', '.join(Scope)}.")
    return ProfileRef(
        name=name,
        strength=None if strength is None else _parse_strength(strength),
        scope=None if scope is None else Scope(scope),
    )


def _parse_profile(value: Any, _handler: Any) -> ProfileRef | list[ProfileRef] | None:
    if value is None:
        return None
    if isinstance(value, list):
        if not value:
            raise _error(ErrorCode.PROFILE_INVALID, f"{FIELD} is an empty list; leave it out for an unsteered answer.")
        if len(value) > _MAX_PROFILES:
            raise _error(
                ErrorCode.TOO_MANY, f"{FIELD} lists {len(value)} profiles; at most {_MAX_PROFILES} are allowed."
            )
        return [_parse_ref(item) for item in value]
    return _parse_ref(value)


class Unsteerable(NamedTuple):
    """Why a request cannot be steered.

    Attributes:
        field: of the request.
        what: that field, or what in it, in words.
    """

    field: str
    what: str


class SteeringFields(BaseModel):
    """Mixin for request models: the `steering_profile` field, and no field that looks like a misspelling of it."""

    steering_profile: Annotated[
        str | ProfileRef | list[str | ProfileRef] | None,
        WrapValidator(_parse_profile),
        Field(
            description="Steers this request: a profile's name, an object with name, strength and scope, or a list of "
            "those, applied in order. The answer carries a `steering` receipt. A request that cannot be steered "
            "exactly so is refused.",
            examples=["medical", {"name": "medical", "strength": -0.5, "scope": "response"}],
        ),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_near_misses(cls, data: Any) -> Any:
        """vLLM ignores fields it does not know, so a misspelt one would run unsteered."""
        if isinstance(data, Mapping):
            name = steering_key(data, cls.model_fields.keys())
            if name is not None:
                raise _error(ErrorCode.FIELD_UNKNOWN, f"Unknown field {quoted(name)}; did you mean '{FIELD}'?")
        return data

    @property
    def profile_refs(self) -> list[ProfileRef]:
        """The chosen profiles in order; empty for an unsteered request."""
        value = self.steering_profile
        refs = value if isinstance(value, list) else [] if value is None else [value]
        return [_parse_ref(ref) for ref in refs]

    def unsteerable(self) -> Unsteerable | None:
        """What else the request asks for that steering does not go together with; None if there is nothing."""
        return None


def steering_key(data: Mapping[Any, Any], known: Collection[str] = ()) -> str | None:
    """First key that means steering, rightly spelt or not, at the places where vLLM would swallow it.

    Args:
        data: JSON body of a request.
        known: names that the request model declares and therefore heeds.

    Returns:
        The key, with its parents joined by dots; None when there is none. After `_MAX_COMPARED` keys that might be
        misspelt, the next counts as one: comparing without end would hold up all other requests.
    """
    matcher = difflib.SequenceMatcher(None, b=FIELD)
    num_compared = 0
    for path, key in _swallowed(data, known):
        folded = key.strip().lower()
        if folded.startswith("steer"):
            return path
        matcher.set_seq1(folded)
        if matcher.real_quick_ratio() >= _SIMILARITY:
            num_compared += 1
            if num_compared > _MAX_COMPARED or matcher.ratio() >= _SIMILARITY:
                return path
    return None


def _swallowed(data: Mapping[Any, Any], known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Keys that vLLM would swallow, each with its path."""
    yield from ((key, key) for key in data if isinstance(key, str) and key not in known)
    # A loop, because a request may nest these as deep as the interpreter's stack.
    places = [(parent, data.get(parent)) for parent in _SWALLOWED]
    while places:
        path, nested = places.pop()
        if isinstance(nested, Mapping):
            yield from ((f"{path}.{key}", key) for key in nested if isinstance(key, str))
            places += [(f"{path}.{parent}", nested.get(parent)) for parent in _SWALLOWED]


class Receipt(BaseModel):
    """What steered an answer."""

    model_config = ConfigDict(frozen=True)

    profile: Annotated[str, Field(description="Name of the profile.")]
    bundle: Annotated[str, Field(description="Content digest of the bundle that ran.")]
    strength: Annotated[float, Field(description="Strength that was applied.")]
    scope: Annotated[Scope, Field(description="Tokens that were steered.")]
    layers: Annotated[list[int], Field(description="Decoder layers (0-based) whose output was steered.")]
    tokens_steered: Annotated[
        int, Field(description="Tokens steered, as counted by the workers; prompt tokens found in the cache included.")
    ]

    def to_json(self) -> dict[str, JsonValue]:
        """Plain JSON object."""
        return self.model_dump(mode="json")

"""Control vectors of a bundle: read from its evidence, or written as bundles of their own for a server."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from artifacts.bundle import Bundle, write_bundle
from artifacts.errors import quoted
from artifacts.evaluation.local import random_rows
from artifacts.evaluation.plan import BASELINES
from artifacts.jobs.errors import BuildError
from artifacts.manifest import Intervention, Manifest

PREFIX: Final = "control."
_ABSENT: Final = "the bundle holds no such control vector; build it anew with this version"
_MAX_NAME: Final = 64
_NAME: Final = re.compile(r"[a-z][a-z0-9-]*")
# Names of other conditions and figures: a control called so would take their place, and gates would read it.
_RESERVED: Final = re.compile(r"off|on|negated|prompt|expert|p|random(-\d+)?")


@dataclass(frozen=True)
class Vector:
    """Rows by layer, each what one unit of strength adds, [hidden_size] fp32, and the strength to use."""

    rows: Mapping[int, Tensor]
    strength: float


@dataclass(frozen=True)
class BundleVectors:
    """A bundle's own vector with its controls and random directions.

    Attributes:
        own: the vector under test at its recommended strength.
        controls: by name.
        random: of the same norm at the same layers, at the same strength.
        missing: reason for each baseline that the bundle does not hold.
    """

    own: Vector
    controls: Mapping[str, Vector]
    random: tuple[Vector, ...]
    missing: Mapping[str, str] = field(default_factory=dict)

    def named(self) -> dict[str, Vector]:
        """Controls and random directions by name."""
        return {**self.controls, **{f"random-{index}": each for index, each in enumerate(self.random)}}


def bundle_vectors(path: Path, bundle: Bundle, num_random: int, seed: int) -> BundleVectors:
    """Everything of a bundle that is measured.

    Args:
        path: of the bundle.
        bundle: loaded from it.
        num_random: random directions, at least `MIN_RANDOM`.
        seed: of their drawing.

    Raises:
        BundleError: an intervention is no plain addition.
        BuildError: a control vector has no strength in the manifest, or no layer or shape of the target's.
        ValueError: too few random directions.
    """
    manifest = bundle.manifest
    own: dict[int, Tensor] = {}
    for layer, row in bundle.additions():
        # Several additions at one layer are one addition of their sum.
        own[layer] = own[layer] + row if layer in own else row
    strength = manifest.recommended_strength
    random = tuple(Vector(rows, strength) for rows in random_rows(own, num_random, seed))
    controls = _controls(path, bundle)
    return BundleVectors(Vector(own, strength), controls, random, _missing(manifest, controls))


def write_controls(directory: Path, bundle: Bundle, vectors: BundleVectors) -> list[Path]:
    """Write every control and random direction as a bundle that a server takes, named as `profile_name` says.

    Raises:
        BuildError: a name is too long for a profile.
        BundleError: a vector is none that a server takes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, vector in vectors.named().items():
        manifest = bundle.manifest.model_copy(
            update={
                "name": profile_name(bundle.manifest.name, name),
                "description": control_description(name, bundle.digest),
                "interventions": tuple(
                    Intervention(layer=layer, kind="add", write=f"runtime.{layer}.0.write")
                    for layer in sorted(vector.rows)
                ),
                "recommended_strength": vector.strength,
                "maximum_strength": max(bundle.manifest.maximum_strength, abs(vector.strength)),
                "evaluation": {},
            }
        )
        path = directory / f"{manifest.name}.safetensors"
        rows = {f"runtime.{layer}.0.write": row.float() for layer, row in vector.rows.items()}
        try:
            checked = Manifest.model_validate(manifest.model_dump())
        except ValidationError as error:
            raise BuildError(f"control {quoted(name)} makes no bundle: {error.errors()[0]['msg']}") from error
        write_bundle(path, checked, rows)
        written.append(path)
    return written


def profile_name(bundle_name: str, control: str) -> str:
    """Name of the profile under which a server holds a control.

    Raises:
        BuildError: it is longer than a profile's name may be.
    """
    name = f"{bundle_name}.{PREFIX}{control}"
    if len(name) > _MAX_NAME:
        raise BuildError(
            f"the profile name {name!r} has {len(name)} characters and {_MAX_NAME} are allowed; give the bundle a "
            "shorter name"
        )
    return name


def control_description(name: str, digest: str) -> str:
    """What a control's profile says about itself; by it an evaluation knows to which bundle the control belongs."""
    return f"Control {name} of bundle {digest}."


def _controls(path: Path, bundle: Bundle) -> dict[str, Vector]:
    declared: Any = bundle.manifest.evaluation.get("controls", {})
    target = bundle.manifest.target
    found: dict[str, dict[int, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for entry in bundle.evidence:
            if not entry.name.startswith(PREFIX):
                continue
            name, _, layer = entry.name.removeprefix(PREFIX).rpartition(".")
            usable = (
                _NAME.fullmatch(name)
                and not _RESERVED.fullmatch(name)
                and layer.isdecimal()
                and int(layer) < target.num_layers
            )
            if not usable or entry.shape != (target.hidden_size,):
                raise BuildError(
                    f"{path}: {quoted(entry.name)} of shape {list(entry.shape)} is no control vector of "
                    f"{target.num_layers} layers of {target.hidden_size}; build the bundle again"
                )
            found.setdefault(name, {})[int(layer)] = file.get_tensor(entry.name).float()
    return {name: Vector(rows, _strength(path, declared, name)) for name, rows in sorted(found.items(), key=_order)}


def stem(name: str) -> str:
    """What a control is a draw of, or its own name."""
    head, _, number = name.rpartition("-")
    return head if number.isdecimal() else name


def _order(item: tuple[str, object]) -> tuple[str, int]:
    """Draws by number, so that 10 follows 9."""
    number = item[0].rpartition("-")[2]
    return stem(item[0]), int(number) if number.isdecimal() else -1


def _strength(path: Path, declared: Any, name: str) -> float:
    entry = declared.get(name) if isinstance(declared, dict) else None
    strength = entry.get("strength") if isinstance(entry, dict) else None
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise BuildError(
            f"{path}: control {quoted(name)} has strength {quoted(strength)} in the manifest's evaluation, which must "
            "be a number; build the bundle again"
        )
    return float(strength)


def _missing(manifest: Manifest, found: Mapping[str, Vector]) -> dict[str, str]:
    """The builder's own reasons, and for what it does not mention that it is not there."""
    reasons: Any = manifest.evaluation.get("controls_missing", {})
    known = {str(key): str(value) for key, value in reasons.items()} if isinstance(reasons, dict) else {}
    held = {"random", "prompt"} | {stem(name) for name in found}
    return {**{name: _ABSENT for name in BASELINES if name not in held}, **known}

"""What an operator asks of a profile, and what becomes of it and of a bundle."""

from collections.abc import Sequence
from dataclasses import dataclass

from artifacts.manifest import ExcludedSpan, Manifest, Scope
from server.registry.records import BundleRecord, ProfileVersion


@dataclass(frozen=True)
class ProfileSpec:
    """What an operator says about a profile; None stands for what the bundle recommends.

    Attributes:
        bundle: digest, or a prefix of at least 8 digits that one bundle has.
        strength: default strength.
        maximum_strength: bound of |strength| in a request; at most the bundle's.
        scope: default scope.
        layers: layers (0-based) whose interventions apply; all of them if None.
        exclude: spans that stay unsteered.
        allowed_keys: names of the keys that may use it; every key if None.
        description: for people.
    """

    bundle: str
    strength: float | None = None
    maximum_strength: float | None = None
    scope: Scope | None = None
    layers: tuple[int, ...] | None = None
    exclude: tuple[ExcludedSpan, ...] | None = None
    allowed_keys: tuple[str, ...] | None = None
    description: str | None = None


@dataclass(frozen=True)
class BundleOutcome:
    """What became of a bundle.

    Attributes:
        record: as the registry has it, or would have it.
        created: whether it was new.
        is_resident: whether every worker holds it.
        checks: the checks that it passed and what they found.
        dry_run: whether nothing was to be changed.
        duration_s: from the last byte received to the end.
    """

    record: BundleRecord
    created: bool
    is_resident: bool
    checks: Sequence[tuple[str, str]]
    dry_run: bool
    duration_s: float


@dataclass(frozen=True)
class ProfileOutcome:
    """What became of a profile.

    Attributes:
        version: the current version, or the one that there would be.
        manifest: of its bundle, which others may have removed since.
        previous: the version before.
        changed: whether it differs from the one before.
        observed: whether every API process shows it to requests already.
        dry_run: whether nothing was to be changed.
    """

    version: ProfileVersion
    manifest: Manifest
    previous: ProfileVersion | None
    changed: bool
    observed: bool
    dry_run: bool

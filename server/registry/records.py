"""What the registry remembers: bundles, versions of profiles, and the state that they add up to."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from artifacts.errors import quoted
from artifacts.manifest import ExcludedSpan, Manifest, Scope

_KEY = re.compile(r"(sha256:[0-9a-f]{64})(?:\+(\d+(?:,\d+)*))?", re.ASCII)
Action = Literal["put", "rollback", "delete", "seed"]


def program_key(digest: str, layers: Iterable[int] | None) -> str:
    """Name of what an engine holds: all interventions of a bundle, or those at some layers.

    Args:
        digest: of the bundle, "sha256:<64 hex>".
        layers: whose interventions to use, in any order; None for all of them.
    """
    return digest if layers is None else f"{digest}+{','.join(map(str, sorted(set(layers))))}"


def parse_key(key: str) -> tuple[str, tuple[int, ...] | None]:
    """Inverse of `program_key`: the digest and the layers.

    Raises:
        ValueError: it is no program key.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{quoted(key)} is no program key; expected sha256:<64 hex digits>, or that and +LAYER,LAYER.")
    digest, layers = match.groups()
    return digest, None if layers is None else tuple(map(int, layers.split(",")))


@dataclass(frozen=True)
class BundleRecord:
    """A bundle in the store.

    Attributes:
        digest: "sha256:<64 hex>" of its file.
        num_bytes: size of its file.
        manifest: what it says about itself.
        added_at: UTC.
        added_by: who added it.
        source: where it came from.
        is_draining: it is on its way out: requests that use it may end, no profile may name it.
        signer: whose signature it carries; None when nobody checked one.
    """

    digest: str
    num_bytes: int
    manifest: Manifest
    added_at: datetime
    added_by: str
    source: str
    is_draining: bool
    signer: str | None


@dataclass(frozen=True)
class ProfileSettings:
    """What a profile means. Settings that mean the same are equal: layers are sorted and named once.

    Attributes:
        bundle: digest.
        strength: of a request that names none.
        maximum_strength: bound of |strength| in a request.
        scope: of a request that names none.
        layers: whose interventions to use; None for all of them.
        exclude: spans that stay unsteered.
        allowed_keys: names of the inference keys that may use it; None for all of them.
        description: for people.
    """

    bundle: str
    strength: float
    maximum_strength: float
    scope: Scope
    layers: tuple[int, ...] | None = None
    exclude: tuple[ExcludedSpan, ...] = ()
    allowed_keys: tuple[str, ...] | None = None
    description: str = ""

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))

    @property
    def key(self) -> str:
        """Program that an engine must hold to serve the profile."""
        return program_key(self.bundle, self.layers)


@dataclass(frozen=True)
class ProfileVersion:
    """One change of a profile.

    Attributes:
        name: of the profile.
        generation: of the registry that the change made; it identifies the version.
        settings: what the profile meant from then on; None when it was deleted.
        action: kind of change.
        actor: who made it.
        at: UTC.
        restored_from: generation of the version that a rollback brought back.
    """

    name: str
    generation: int
    settings: ProfileSettings | None
    action: Action
    actor: str
    at: datetime
    restored_from: int | None = None


@dataclass(frozen=True)
class Snapshot:
    """The desired state at one generation.

    Attributes:
        generation: number of changes that the registry has seen.
        bundles: by digest.
        profiles: live ones by name; versions with settings, newest first, the first is the current one.
        intents: program keys that a change in progress is about to name.
        never_named: digests of bundles that no version of any profile has named since they were added.
        history: bound of the number of versions in `profiles`.
    """

    generation: int
    bundles: Mapping[str, BundleRecord]
    profiles: Mapping[str, tuple[ProfileVersion, ...]]
    intents: frozenset[str] = frozenset()
    never_named: frozenset[str] = frozenset()
    history: int = 8

    def current(self, name: str) -> ProfileVersion | None:
        """Version of a live profile that requests get; None for an unknown name."""
        versions = self.profiles.get(name)
        return versions[0] if versions else None

    def keys_needed(self) -> set[str]:
        """Program keys that requests may refer to now."""
        return _keys(versions[0] for versions in self.profiles.values())

    def keys_wanted(self, keep: int) -> set[str]:
        """Program keys that engines should hold: needed ones, those of a rollback or of a change to come.

        Of bundles that are absent or draining only those that a change is about to name: adding a bundle begins with
        that, and makes the record when all engines hold it.

        Args:
            keep: previous versions of each live profile that stay resident; fewer than `history`.
        """
        assert keep < self.history
        wanted = _keys(version for versions in self.profiles.values() for version in versions[: keep + 1])
        wanted |= self.never_named
        # These were made by `program_key`: to check their form would be most of the time for a thousand of them.
        return {key for key in wanted if self._is_usable(key.partition("+")[0])} | self.intents

    def _is_usable(self, digest: str) -> bool:
        record = self.bundles.get(digest)
        return record is not None and not record.is_draining


def _keys(versions: Iterable[ProfileVersion]) -> set[str]:
    return {version.settings.key for version in versions if version.settings is not None}

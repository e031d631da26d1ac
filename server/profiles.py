"""Profiles that requests may name, and their resolution to an immutable steering."""

import difflib
import uuid
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus

from artifacts.errors import quoted
from artifacts.manifest import Manifest, Scope
from server.auth.keys import Identity
from server.engine.steering import Steering, Term
from server.errors import ErrorCode, SteeringRequestError
from server.lowering import kept_interventions
from server.registry.records import ProfileSettings
from server.schema import MAX_NAME_LENGTH, ProfileRef, Receipt
from steering_kernels import MAX_OPS, NUM_GATES

# 0.1 + 0.2 is not over a maximum of 0.3.
_ROUNDING = 1e-9
_MIN_DIGEST_PREFIX = len("sha256:") + 8
# Names in a message.
_MAX_LISTED = 20
# Names that an unknown one is compared with.
_MAX_COMPARED = 200


@dataclass(frozen=True)
class Profile:
    """A version of a name that requests use, bound to one bundle.

    Attributes:
        name: what a request says.
        manifest: of its bundle.
        settings: bundle, defaults and bounds.
        generation: of the change that made it.
    """

    name: str
    manifest: Manifest
    settings: ProfileSettings
    generation: int = 0

    @property
    def layers(self) -> list[int]:
        """Layers it steers, one entry per intervention that changes the residual stream."""
        kept = kept_interventions(self.manifest, self.settings.layers)
        return sorted(step.layer for step in kept if step.kind != "condition")

    def within(self, current: "Profile") -> "Profile":
        """This older version under what the current one allows: a pinned version is no way around a new bound."""
        bound, now = self.settings, current.settings
        maximum = min(bound.maximum_strength, now.maximum_strength)
        limited = replace(
            bound,
            maximum_strength=maximum,
            strength=max(-maximum, min(maximum, bound.strength)),
            exclude=tuple(dict.fromkeys((*now.exclude, *bound.exclude))),
            allowed_keys=now.allowed_keys,
        )
        return replace(self, settings=limited)


def checked_layers(layers: Collection[int] | None, manifest: Manifest) -> tuple[int, ...] | None:
    """The layers that a profile uses, held against those where its bundle does something; None for all of them.

    Raises:
        ValueError: there are none, or the bundle does nothing at one of them.
    """
    if layers is None:
        return None
    steered = sorted({step.layer for step in manifest.interventions if step.kind != "condition"})
    unknown = [layer for layer in layers if layer not in steered]
    if unknown or not layers:
        what = f"name layer {unknown[0]}" if unknown else "are none"
        raise ValueError(f"The layers {what}; bundle {quoted(manifest.name)} steers layers {steered}.")
    kept = kept_interventions(manifest, layers)
    return None if len(kept) == len(manifest.interventions) else tuple(sorted(set(layers)))


def recommended_settings(digest: str, manifest: Manifest) -> ProfileSettings:
    """What a bundle recommends for a profile of it.

    Args:
        digest: of the bundle.
        manifest: of the bundle.
    """
    return ProfileSettings(
        bundle=digest,
        strength=manifest.recommended_strength,
        maximum_strength=manifest.maximum_strength,
        scope=manifest.scope,
        layers=None,
        exclude=manifest.exclude,
        allowed_keys=None,
        description=manifest.description,
    )


@dataclass(frozen=True)
class ResolvedTerm:
    """One profile of a request with everything that defaults left open filled in."""

    profile: Profile
    strength: float
    scope: Scope


@dataclass(frozen=True)
class Resolved:
    """Steering of one request, decided at admission: a later change of a profile does not touch it.

    Attributes:
        terms: the profiles in the order in which they apply.
        steering: what the engine gets; None when every strength is 0, which is exactly "off".
    """

    terms: tuple[ResolvedTerm, ...]
    steering: Steering | None

    @property
    def bundles(self) -> str:
        """Digests for the response header, separated by commas."""
        return ", ".join(term.profile.settings.bundle for term in self.terms)

    @property
    def keys(self) -> list[str]:
        """Program keys that the engine must hold as long as the request runs."""
        return [] if self.steering is None else [term.bundle for term in self.steering.terms]

    def receipts(self, tokens_steered: Sequence[int]) -> list[Receipt]:
        """Receipts in order.

        Args:
            tokens_steered: of each term with a strength other than 0, in order, the counts of prompt and of generated
                tokens.
        """
        counts = map(sum, zip(tokens_steered[::2], tokens_steered[1::2], strict=True))
        return [
            Receipt(
                profile=term.profile.name,
                bundle=term.profile.settings.bundle,
                strength=term.strength,
                scope=term.scope,
                layers=sorted(set(term.profile.layers)),
                tokens_steered=next(counts) if term.strength else 0,
            )
            for term in self.terms
        ]


class ProfileTable:
    """Profiles by name as they were at one generation. Immutable: a change makes another table.

    Attributes:
        generation: of the registry's state that it shows.
    """

    def __init__(self, versions: Mapping[str, Sequence[Profile]], generation: int = 0) -> None:
        """Build the table.

        Args:
            versions: of each name, those that the workers hold, the current one first.
            generation: see the class.
        """
        self._versions = {name: tuple(profiles) for name, profiles in sorted(versions.items())}
        self.generation = generation

    def __iter__(self) -> Iterator[Profile]:
        """The current versions by name."""
        return (profiles[0] for profiles in self._versions.values())

    def __len__(self) -> int:
        return len(self._versions)

    def versions(self, name: str) -> tuple[Profile, ...]:
        """Of a name that there is, the versions that requests may name, the current one first."""
        return self._versions[name]

    def get(self, name: str) -> Profile | None:
        """The current version of a name."""
        return self._versions[name][0] if name in self._versions else None

    def usable_by(self, identity: Identity) -> list[Profile]:
        """The profiles that a key may use."""
        return [profile for profile in self if may_use(identity, profile.name, profile.settings)]

    def resolve(self, refs: Sequence[ProfileRef], identity: Identity) -> Resolved:
        """Decide what a request's profiles mean now.

        Raises:
            SteeringRequestError: unknown profile (404, with near names), one that the key may not use (403), strength
                over the maximum, or more interventions at one layer or gates than a slot holds (400).
        """
        terms = tuple(self._resolve_one(ref, identity) for ref in refs)
        _check_total_strength(terms, identity)
        active = [term for term in terms if term.strength]
        _check_capacity([term.profile for term in active])
        if not active:
            return Resolved(terms, None)
        return Resolved(terms, Steering(uuid.uuid4().hex, tuple(_engine_term(term) for term in active)))

    def _resolve_one(self, ref: ProfileRef, identity: Identity) -> ResolvedTerm:
        name, versioned, digest = ref.name.partition("@")
        versions = self._versions.get(name)
        if versions is None:
            usable = [profile.name for profile in self.usable_by(identity)]
            # Of a thousand names, or of one without end, this would take longer than a step of the engine.
            near = difflib.get_close_matches(name[:MAX_NAME_LENGTH], usable[:_MAX_COMPARED], n=3, cutoff=0.4)
            shown = ", ".join(usable[:_MAX_LISTED]) + (", ..." if len(usable) > _MAX_LISTED else "")
            served = f"Near names: {', '.join(near)}." if near else f"Served: {shown or 'none'}."
            raise SteeringRequestError(
                ErrorCode.PROFILE_NOT_FOUND,
                f"Steering profile {quoted(name)} does not exist. {served}",
                HTTPStatus.NOT_FOUND,
            )
        if not may_use(identity, name, versions[0].settings):
            raise SteeringRequestError(
                ErrorCode.PROFILE_FORBIDDEN,
                f"The key {identity.name!r} may not use steering profile {name!r}.",
                HTTPStatus.FORBIDDEN,
            )
        profile = _version(name, versions, digest) if versioned else versions[0]
        settings = profile.settings
        strength = settings.strength if ref.strength is None else ref.strength
        return ResolvedTerm(profile, strength, settings.scope if ref.scope is None else ref.scope)


def may_use(identity: Identity, name: str, settings: ProfileSettings) -> bool:
    """Whether a key may use a profile with these settings."""
    return identity.may_use(name) and (settings.allowed_keys is None or identity.name in settings.allowed_keys)


def _version(name: str, versions: Sequence[Profile], digest: str) -> Profile:
    """The newest version of a name whose bundle's digest begins as asked, held within what the current one allows."""
    for profile in versions if len(digest) >= _MIN_DIGEST_PREFIX else ():
        if profile.settings.bundle.startswith(digest):
            return profile if profile is versions[0] else profile.within(versions[0])
    digests = ", ".join(dict.fromkeys(profile.settings.bundle for profile in versions))
    raise SteeringRequestError(
        ErrorCode.PROFILE_NOT_FOUND,
        f"Steering profile {name!r} has no version {quoted(digest)}; loaded: {digests}.",
        HTTPStatus.NOT_FOUND,
    )


def _check_total_strength(terms: Sequence[ResolvedTerm], identity: Identity) -> None:
    """Listing a profile twice must not get around its maximum, nor around the key's."""
    for name in dict.fromkeys(term.profile.name for term in terms):
        own = [term for term in terms if term.profile.name == name]
        total = sum(abs(term.strength) for term in own)
        maximum = min(term.profile.settings.maximum_strength for term in own)
        if total > maximum * (1 + _ROUNDING):
            raise SteeringRequestError(
                ErrorCode.STRENGTH_INVALID,
                f"Strength {total:g} of profile {name!r} is over its maximum of {maximum:g}.",
            )
    if (bound := identity.maximum_strength) is None:
        return
    # The key's counts for each bundle, under whatever names it comes.
    for digest in dict.fromkeys(term.profile.settings.bundle for term in terms):
        total = sum(abs(term.strength) for term in terms if term.profile.settings.bundle == digest)
        if total > bound * (1 + _ROUNDING):
            raise SteeringRequestError(
                ErrorCode.STRENGTH_INVALID,
                f"Strength {total:g} of bundle {digest} is over {bound:g}, the maximum of the key {identity.name!r}.",
                HTTPStatus.FORBIDDEN,
            )


def _engine_term(term: ResolvedTerm) -> Term:
    settings = term.profile.settings
    return Term(settings.key, term.strength, term.scope.value, settings.exclude)


def _check_capacity(profiles: Sequence[Profile]) -> None:
    """A bundle fits a slot by itself (`artifacts.manifest`); several together may not."""
    layers = Counter(
        step.layer for profile in profiles for step in kept_interventions(profile.manifest, profile.settings.layers)
    )
    for layer, count in layers.items():
        if count > MAX_OPS:
            raise SteeringRequestError(
                ErrorCode.TOO_MANY, f"There are {count} interventions at layer {layer}; at most {MAX_OPS} fit."
            )
    num_gates = sum(len(profile.manifest.gates) for profile in profiles)
    if num_gates > NUM_GATES:
        raise SteeringRequestError(
            ErrorCode.TOO_MANY, f"There are {num_gates} conditions and triggers; at most {NUM_GATES} fit."
        )

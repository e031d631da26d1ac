"""Profiles that requests may name, and their resolution to an immutable steering."""

import difflib
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from artifacts.bundle import Bundle
from artifacts.manifest import ExcludedSpan, Manifest, Scope
from server.engine.program import Program
from server.engine.steering import Steering, Term
from server.errors import ErrorCode, SteeringRequestError
from server.lowering import lower
from server.schema import ProfileRef, Receipt
from server.triggers import resolve_triggers
from steering_kernels import MAX_OPS, NUM_GATES

# 0.1 + 0.2 is not over a maximum of 0.3.
_ROUNDING = 1e-9
_MIN_DIGEST_PREFIX = len("sha256:") + 8
_NO_TOKENS: Mapping[int, str] = {}


@dataclass(frozen=True)
class Profile:
    """A name that requests use, bound to one bundle.

    Attributes:
        name: what a request says.
        bundle: what it means.
        strength: default strength.
        maximum_strength: bound of |strength| in a request.
        scope: default scope.
        exclude: spans that stay unsteered.
    """

    name: str
    bundle: Bundle
    strength: float
    maximum_strength: float
    scope: Scope
    exclude: tuple[ExcludedSpan, ...] = ()

    @staticmethod
    def from_bundle(bundle: Bundle, name: str | None = None) -> "Profile":
        """Profile with the defaults that the bundle's manifest recommends."""
        manifest = bundle.manifest
        return Profile(
            name=name or manifest.name,
            bundle=bundle,
            strength=manifest.recommended_strength,
            maximum_strength=manifest.maximum_strength,
            scope=manifest.scope,
            exclude=manifest.exclude,
        )

    def program(self, vocabulary: Mapping[int, str] = _NO_TOKENS) -> Program:
        """What its bundle makes the engine do.

        Args:
            vocabulary: text of every token of the served model by id; needed for triggers only.

        Raises:
            ValueError: a trigger fits no token.
        """
        return lower(self.bundle, resolve_triggers(self.bundle.manifest, vocabulary))

    @property
    def layers(self) -> list[int]:
        """Layers it steers, one entry per intervention that changes the residual stream."""
        return sorted(step.layer for step in self.bundle.manifest.interventions if step.kind != "condition")


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
        return ", ".join(term.profile.bundle.digest for term in self.terms)

    def receipts(self, tokens_steered: Sequence[int]) -> list[Receipt]:
        """Receipts in order.

        Args:
            tokens_steered: count of each term with a strength other than 0, in order.
        """
        counts = iter(tokens_steered)
        return [
            Receipt(
                profile=term.profile.name,
                bundle=term.profile.bundle.digest,
                strength=term.strength,
                scope=term.scope,
                layers=sorted(set(term.profile.layers)),
                tokens_steered=next(counts) if term.strength else 0,
            )
            for term in self.terms
        ]


class ProfileTable:
    """Profiles by name. Immutable: it is built once at the start of the server."""

    def __init__(self, profiles: Iterable[Profile]) -> None:
        """Build the table.

        Raises:
            ValueError: two profiles have one name.
        """
        self._profiles: dict[str, Profile] = {}
        for profile in profiles:
            if profile.name in self._profiles:
                raise ValueError(
                    f"Two bundles are named {profile.name!r}; rename one with --steering-bundle NAME=FILE."
                )
            self._profiles[profile.name] = profile

    def __iter__(self) -> Iterator[Profile]:
        return iter(self._profiles.values())

    def resolve(self, refs: Sequence[ProfileRef]) -> Resolved:
        """Decide what a request's profiles mean now.

        Raises:
            SteeringRequestError: unknown profile (404, with near names), strength over the maximum, or more
                interventions at one layer or gates than a slot holds (400).
        """
        terms = tuple(self._resolve_one(ref) for ref in refs)
        _check_total_strength(terms)
        active = [term for term in terms if term.strength]
        _check_capacity([term.profile.bundle.manifest for term in active])
        if not active:
            return Resolved(terms, None)
        return Resolved(terms, Steering(uuid.uuid4().hex, tuple(_engine_term(term) for term in active)))

    def _resolve_one(self, ref: ProfileRef) -> ResolvedTerm:
        name, versioned, digest = ref.name.partition("@")
        profile = self._profiles.get(name)
        if profile is None:
            near = difflib.get_close_matches(name, self._profiles, n=3, cutoff=0.4)
            served = f"Near names: {', '.join(near)}." if near else f"Served: {', '.join(self._profiles) or 'none'}."
            raise SteeringRequestError(
                ErrorCode.PROFILE_NOT_FOUND, f"Steering profile {name!r} does not exist. {served}", HTTPStatus.NOT_FOUND
            )
        if versioned and not (len(digest) >= _MIN_DIGEST_PREFIX and profile.bundle.digest.startswith(digest)):
            raise SteeringRequestError(
                ErrorCode.PROFILE_NOT_FOUND,
                f"Steering profile {name!r} has no version {digest!r}; it is {profile.bundle.digest}.",
                HTTPStatus.NOT_FOUND,
            )
        strength = profile.strength if ref.strength is None else ref.strength
        return ResolvedTerm(profile, strength, profile.scope if ref.scope is None else ref.scope)


def _check_total_strength(terms: Sequence[ResolvedTerm]) -> None:
    """Listing a profile twice must not get around its maximum."""
    for profile in {term.profile.name: term.profile for term in terms}.values():
        total = sum(abs(term.strength) for term in terms if term.profile is profile)
        if total > profile.maximum_strength * (1 + _ROUNDING):
            raise SteeringRequestError(
                ErrorCode.STRENGTH_INVALID,
                f"Strength {total:g} of profile {profile.name!r} is over its maximum of {profile.maximum_strength:g}.",
            )


def _engine_term(term: ResolvedTerm) -> Term:
    return Term(term.profile.bundle.digest, term.strength, term.scope.value, term.profile.exclude)


def _check_capacity(manifests: Sequence[Manifest]) -> None:
    """A bundle fits a slot by itself (`artifacts.manifest`); several together may not."""
    layers = Counter(step.layer for manifest in manifests for step in manifest.interventions)
    for layer, count in layers.items():
        if count > MAX_OPS:
            raise SteeringRequestError(
                ErrorCode.TOO_MANY, f"There are {count} interventions at layer {layer}; at most {MAX_OPS} fit."
            )
    num_gates = sum(len(manifest.gates) for manifest in manifests)
    if num_gates > NUM_GATES:
        raise SteeringRequestError(
            ErrorCode.TOO_MANY, f"There are {num_gates} conditions and triggers; at most {NUM_GATES} fit."
        )

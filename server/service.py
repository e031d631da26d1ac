"""What the routes of one API process work with."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from server.auth.audit import AuditLog
from server.auth.keys import Identity, KeyRing
from server.bundle_operations import BundleOperations
from server.convergence import Convergence
from server.engine.client import SteeringEngine
from server.engine.steering import Steering
from server.errors import ErrorCode, SteeringRequestError
from server.metrics.metrics import SteeringMetrics
from server.pins import Pins
from server.profile_operations import ProfileOperations
from server.profiles import ProfileTable, Resolved
from server.reconciler import Reconciler
from server.registry.registry import Registry
from server.schema import ProfileRef, Unsteerable
from server.tracing import span


class SteerableRequest(Protocol):
    """What the request models of this server have in common."""

    model: str | None

    @property
    def profile_refs(self) -> list[ProfileRef]: ...

    def unsteerable(self) -> Unsteerable | None: ...

    def steer_with(self, steering: Steering | None) -> None: ...


@dataclass(frozen=True)
class SteeringService:
    """The parts of the steering server, and the admission of requests.

    Attributes:
        model_names: names under which the target model is served.
        instance: id of this server among those on the registry.
        build: versions of what serves, by label of the metrics.
        bytes_per_row: device memory of one row of the pool.
        engine: the steering engine.
        registry: the durable state.
        reconciler: keeps this process in step with it.
        bundle_operations: changes of its bundles.
        profile_operations: changes of its profiles.
        pins: programs that running requests rely on.
        metrics: counters of this process.
        audit: log of changes.
        keys: who may do what.
        convergence: keeps the profiles as a file declares them; None where no file does.
    """

    model_names: tuple[str, ...]
    instance: str
    build: Mapping[str, Any]
    bytes_per_row: int
    engine: SteeringEngine
    registry: Registry
    reconciler: Reconciler
    bundle_operations: BundleOperations
    profile_operations: ProfileOperations
    pins: Pins
    metrics: SteeringMetrics
    audit: AuditLog
    keys: KeyRing
    convergence: Convergence | None = None

    @property
    def is_ready(self) -> bool:
        """Whether requests see the registry's state, and a state that was once as the file declares."""
        return self.reconciler.is_ready and self.is_declared

    @property
    def is_declared(self) -> bool:
        """Whether requests have seen the profiles as the file declares them; True where no file does."""
        if self.convergence is None:
            return True
        applied = self.convergence.applied_generation
        return applied is not None and applied <= self.reconciler.generation_observed

    @property
    def profiles(self) -> ProfileTable:
        """The profiles that requests may name now."""
        return self.reconciler.table

    async def status(self) -> dict[str, Any]:
        """State of the registry's followers, and of every worker of this server."""
        rows = await asyncio.to_thread(self.registry.members.list)
        reconciler = self.reconciler
        return {
            "is_ready": self.is_ready,
            "generation_desired": await asyncio.to_thread(self.registry.generation),
            "generation_observed": min(
                (row.observed for row in rows if row.instance == reconciler.instance and row.state != "starting"),
                default=reconciler.generation_observed,
            ),
            "members": [
                {
                    "member": row.member,
                    "instance": row.instance,
                    "pid": row.pid,
                    "state": row.state,
                    "observed": row.observed,
                    "problem": row.problem,
                }
                for row in rows
            ],
            "workers": await self.engine.status(),
        }

    def admit(
        self, request: SteerableRequest, identity: Identity, headers: Mapping[str, str] | None = None
    ) -> Resolved | None:
        """Resolve a request's profiles; None when it asks for no steering.

        A model name `<model>@<profile>` is replaced by `<model>`.

        Args:
            request: validated body.
            identity: whose request it is.
            headers: of the request, for its place in a trace.

        Raises:
            SteeringRequestError: the request cannot be steered as it asks.
        """
        refs = request.profile_refs
        base, profile = self.split_model(request.model)
        if profile is not None:
            if refs:
                raise SteeringRequestError(
                    ErrorCode.CONFLICT,
                    f"Both the model name {request.model!r} and steering_profile choose a profile; use one of them.",
                    param="model",
                )
            refs = [ProfileRef(name=profile)]
            request.model = base
        if not refs:
            return None
        unsteerable = request.unsteerable()
        if unsteerable is not None:
            raise SteeringRequestError(
                ErrorCode.UNSUPPORTED,
                f"Steering is not supported together with {unsteerable.what}; leave that out.",
                param=unsteerable.field,
            )
        with span("steering.resolve", headers, profile=",".join(ref.name for ref in refs)):
            resolved = self.profiles.resolve(refs, identity)
        request.steer_with(resolved.steering)
        return resolved

    def split_model(self, model: str | None) -> tuple[str | None, str | None]:
        """Model and profile that a model name means; the profile is None unless it is `<served model>@<profile>`."""
        if model is None or model in self.model_names:
            return model, None
        for base in sorted(self.model_names, key=len, reverse=True):
            if model.startswith(f"{base}@"):
                return base, model.removeprefix(f"{base}@")
        return model, None

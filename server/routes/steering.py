"""`GET /v1/steering/...`: what can be asked for and what the workers hold."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from artifacts.manifest import Scope
from server.profiles import Profile
from server.routes.steered import SteeringService

router = APIRouter(prefix="/v1/steering", tags=["steering"])


class ProfileInfo(BaseModel):
    """A profile that requests may name."""

    name: Annotated[str, Field(description="What a request puts into `steering_profile`.")]
    description: Annotated[str, Field(description="From the bundle's manifest.")]
    bundle: Annotated[str, Field(description="Content digest.")]
    strength: Annotated[float, Field(description="Default strength.")]
    maximum_strength: Annotated[float, Field(description="Bound of the absolute strength in a request.")]
    scope: Annotated[Scope, Field(description="Default scope.")]
    layers: Annotated[list[int], Field(description="Decoder layers (0-based) it steers.")]
    exclude: Annotated[list[str], Field(description="Spans that it leaves unsteered.")]

    @staticmethod
    def of(profile: Profile) -> "ProfileInfo":
        """Public view of a profile."""
        return ProfileInfo(
            name=profile.name,
            description=profile.bundle.manifest.description,
            bundle=profile.bundle.digest,
            strength=profile.strength,
            maximum_strength=profile.maximum_strength,
            scope=profile.scope,
            layers=sorted(set(profile.layers)),
            exclude=list(profile.exclude),
        )


class ProfileList(BaseModel):
    """All profiles."""

    profiles: list[ProfileInfo]


class WorkerStatus(BaseModel):
    """State of one worker."""

    rank: Annotated[int, Field(description="Rank among the workers.")]
    bundles: Annotated[list[str], Field(description="Digests of the resident bundles.")]
    rows_used: Annotated[int, Field(description="Rows of the row pool in use.")]
    rows_total: Annotated[int, Field(description="Rows of the row pool.")]
    slots_used: Annotated[int, Field(description="Slots that the requests in flight need.")]
    slots_total: Annotated[int, Field(description="Slots; always more than a batch can use.")]
    requests: Annotated[int, Field(description="Steered requests in flight.")]
    layers: Annotated[int, Field(description="Steerable layers.")]
    fused_layers: Annotated[list[int], Field(description="Layers whose steering is part of the RMSNorm that follows.")]
    in_place_layers: Annotated[list[int], Field(description="Layers that are steered by an operator of their own.")]
    backend: Annotated[str, Field(description="Kernel backend.")]


class Status(BaseModel):
    """State of every worker."""

    workers: list[WorkerStatus]


@router.get("/profiles")
async def list_profiles(raw_request: Request) -> ProfileList:
    """List the profiles."""
    service: SteeringService = raw_request.app.state.steering
    return ProfileList(profiles=[ProfileInfo.of(profile) for profile in service.profiles])


@router.get("/status")
async def show_status(raw_request: Request) -> Status:
    """Report what each worker holds, as the worker says it."""
    service: SteeringService = raw_request.app.state.steering
    statuses: list[dict[str, Any]] = await service.engine.status()
    return Status(workers=[WorkerStatus(**status) for status in statuses])

"""`GET /health/live` and `GET /health/ready`, for supervisors and load balancers."""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from server.convergence import THE_FILE
from server.engine.launch import has_died
from server.service import SteeringService

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live", summary="Is this process alive?")
async def show_liveness(raw_request: Request) -> JSONResponse:
    """200 while the engine runs, also while the server ends; 503 when it has died and a restart is what helps."""
    return _answer(not has_died(raw_request.app.state.engine_client), "the engine has died")


@router.get("/ready", summary="Should this process get requests?")
async def show_readiness(raw_request: Request) -> JSONResponse:
    """200 when the self-test has passed and requests see the registry's newest state on every rank; otherwise 503.

    With --steering-declaration also not before the profiles were once as the file says.
    """
    service: SteeringService = raw_request.app.state.steering
    reconciler = service.reconciler
    if has_died(raw_request.app.state.engine_client):
        return _answer(False, "the engine has died")
    reason = reconciler.problem or (
        f"state {reconciler.state}, generation {reconciler.generation_observed} of {reconciler.generation_desired}"
    )
    if reconciler.is_ready and service.convergence is not None and not service.is_declared:
        # No names: anybody may ask this.
        num_missing = len(service.convergence.problems.keys() - {THE_FILE})
        reason = (
            f"{num_missing} of {service.convergence.num_profiles} profiles are not yet as declared; "
            "/v1/steering/status says why"
        )
    return _answer(service.is_ready, reason, generation=reconciler.generation_observed)


def _answer(is_good: bool, reason: str, **facts: Any) -> JSONResponse:
    body = {"status": "ok", **facts} if is_good else {"status": "unavailable", "reason": reason, **facts}
    return JSONResponse(body, HTTPStatus.OK if is_good else HTTPStatus.SERVICE_UNAVAILABLE)

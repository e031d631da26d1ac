"""`GET /v1/steering/status`: what the processes and the workers say about themselves."""

from fastapi import Request

from server.admin_schema import DeclarationStatus, Status
from server.routes.admin.route import admin_router, service_of

router = admin_router()


@router.get("/status", summary="Show the state of every process and worker")
async def show_status(raw_request: Request) -> Status:
    """Report the generation that is desired and that each process admits requests with, and what each worker holds."""
    service = service_of(raw_request)
    status, convergence = Status.model_validate(await service.status()), service.convergence
    if convergence is None:
        return status
    declaration = DeclarationStatus(
        file=str(convergence.path),
        digest=convergence.digest,
        is_applied=convergence.is_applied,
        problems=dict(convergence.problems),
    )
    return status.model_copy(update={"declaration": declaration})

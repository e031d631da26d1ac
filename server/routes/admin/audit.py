"""`GET /v1/steering/audit`: who changed what."""

import asyncio
from typing import Annotated

from fastapi import Query, Request

from server.admin_schema import AuditEntry, AuditPage
from server.routes.admin.page import Limit
from server.routes.admin.route import admin_router, service_of

router = admin_router()


@router.get("/audit", summary="Show the audit log")
async def show_audit(
    raw_request: Request,
    limit: Limit = 50,
    before: Annotated[int | None, Query(ge=0, le=2**62, description="`next` of the page before.")] = None,
) -> AuditPage:
    """Show the changes that were made or tried, newest first."""
    page = await asyncio.to_thread(service_of(raw_request).audit.tail, limit, before)
    return AuditPage(entries=[AuditEntry.model_validate(entry) for entry in page.entries], next=page.before)

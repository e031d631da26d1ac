"""`GET /v1/steering/root`: which bundles lie in the folder that the server takes bundles from by name."""

from fastapi import Request

from server.admin_schema import RootList
from server.routes.admin.route import admin_router, service_of
from server.sources.root import MAX_LISTED

router = admin_router()


@router.get("/root", summary="List the files of the bundle root")
async def list_root(raw_request: Request) -> RootList:
    """List the files of `--steering-bundle-root` that could be added. They are not checked before they are."""
    names = await service_of(raw_request).bundle_operations.root_files()
    return RootList(names=list(names), is_complete=len(names) < MAX_LISTED)

"""`/v1/steering/profiles`: point names at bundles, look at their history and go back in it."""

import asyncio
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Header, Path, Query, Request, Response

from artifacts.errors import quoted
from artifacts.manifest import Manifest
from server.admin_schema import (
    MAX_PAGE,
    PROFILE_NAME,
    ProfileAnswer,
    ProfileDetail,
    ProfileInfo,
    ProfileList,
    ProfileSpec,
    Rollback,
)
from server.errors import ErrorCode, SteeringRequestError
from server.outcomes import ProfileOutcome
from server.outcomes import ProfileSpec as WantedProfile
from server.preconditions import entity_tag
from server.registry.records import ProfileVersion, Snapshot
from server.routes.admin.bundles import Drain, DrainTimeout, DryRun
from server.routes.admin.page import Cursor, Limit, page_of
from server.routes.admin.route import admin_router, identity_of, service_of, snapshot_of
from server.routes.admin.views import may_see, profile_info, version_info

_ETAG: dict[str, Any] = {
    "ETag": {"description": "Generation of the current version, in quotes.", "schema": {"type": "string"}}
}

Name = Annotated[str, Path(pattern=PROFILE_NAME, description="Name of the profile.")]
IfMatch = Annotated[
    str | None, Header(description="ETag: do it only while that version is the current one.", max_length=200)
]
IfNoneMatch = Annotated[str | None, Header(description="`*`: do it only if there is no such profile.", max_length=200)]

router = admin_router()


@router.put(
    "/profiles/{name}",
    summary="Create or change a profile",
    responses={
        200: {"model": ProfileAnswer, "description": "It was there, or this was a dry run.", "headers": _ETAG},
        201: {"model": ProfileAnswer, "description": "It is new.", "headers": _ETAG},
    },
)
async def put_profile(
    raw_request: Request,
    response: Response,
    name: Name,
    spec: ProfileSpec,
    dry_run: DryRun = False,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> ProfileAnswer:
    """Point a name at a bundle that every worker holds, all at once.

    Requests that run go on with the version they began with. Fields that are left out get what the bundle recommends,
    not what the profile had before. Putting what is there already changes nothing.
    """
    outcome = await service_of(raw_request).profile_operations.put(
        name,
        WantedProfile(**dict(spec)),
        actor=identity_of(raw_request).name,
        if_match=if_match,
        if_none_match=if_none_match,
        dry_run=dry_run,
    )
    is_new = outcome.previous is None or outcome.previous.settings is None
    if is_new and outcome.changed and not dry_run:
        response.status_code = HTTPStatus.CREATED
    return await _answer(outcome, raw_request, response)


@router.get("/profiles", summary="List profiles")
async def list_profiles(raw_request: Request, limit: Limit = MAX_PAGE, cursor: Cursor = None) -> ProfileList:
    """List the profiles by name; to an inference key, those that it may use."""
    snapshot, viewer = await snapshot_of(raw_request), identity_of(raw_request)
    visible = {
        name: versions[0]
        for name, versions in snapshot.profiles.items()
        if versions[0].settings is not None and may_see(viewer, name, versions[0].settings)
    }
    page = page_of(visible, limit, cursor)
    infos = [_info(version, _manifest(version, snapshot), raw_request) for version in page.items]
    return ProfileList(profiles=infos, next=page.next)


@router.get(
    "/profiles/{name}",
    summary="Show a profile",
    responses={200: {"model": ProfileDetail, "description": "The profile.", "headers": _ETAG}},
)
async def show_profile(
    raw_request: Request,
    response: Response,
    name: Name,
    limit: Limit = 50,
    before: Annotated[
        int | None, Query(ge=0, le=2**62, description="Show the history before this generation only.")
    ] = None,
) -> ProfileDetail:
    """Show what a profile is now and what it was before."""
    snapshot, registry = await snapshot_of(raw_request), service_of(raw_request).registry
    current = snapshot.current(name)
    if current is None:
        last = await asyncio.to_thread(registry.history, name, limit=1)
        was = f"; generation {last[0].generation} deleted it and a rollback restores it" if last else ""
        raise SteeringRequestError(
            ErrorCode.PROFILE_NOT_FOUND, f"There is no profile {quoted(name)}{was}.", HTTPStatus.NOT_FOUND, "name"
        )
    # One more than asked for tells whether there is a next page.
    history = await asyncio.to_thread(registry.history, name, limit=limit + 1, before=before)
    response.headers["etag"] = entity_tag(current.generation)
    return ProfileDetail(
        **dict(_info(current, _manifest(current, snapshot), raw_request)),
        history=[version_info(version) for version in history[:limit]],
        next=history[limit - 1].generation if len(history) > limit else None,
    )


@router.post(
    "/profiles/{name}/rollback",
    summary="Restore an earlier version of a profile",
    responses={200: {"model": ProfileAnswer, "description": "It is restored.", "headers": _ETAG}},
)
async def roll_back_profile(
    raw_request: Request, response: Response, name: Name, body: Rollback | None = None, if_match: IfMatch = None
) -> ProfileAnswer:
    """Make an earlier version the current one again, as a version of its own; without a body, the one before."""
    outcome = await service_of(raw_request).profile_operations.rollback(
        name, actor=identity_of(raw_request).name, to=None if body is None else body.to, if_match=if_match
    )
    return await _answer(outcome, raw_request, response)


@router.delete(
    "/profiles/{name}",
    summary="Delete a profile",
    status_code=HTTPStatus.NO_CONTENT,
    response_class=Response,
)
async def delete_profile(
    raw_request: Request,
    name: Name,
    drain: Drain = False,
    timeout_s: DrainTimeout = 30.0,
    if_match: IfMatch = None,
) -> Response:
    """Delete a profile: no new request can name it, those that run go on. With `drain`, answer when they have ended."""
    await service_of(raw_request).profile_operations.delete(
        name, actor=identity_of(raw_request).name, if_match=if_match, drain=drain, timeout_s=timeout_s
    )
    return Response(status_code=HTTPStatus.NO_CONTENT)


async def _answer(outcome: ProfileOutcome, raw_request: Request, response: Response) -> ProfileAnswer:
    if not outcome.dry_run:
        response.headers["etag"] = entity_tag(outcome.version.generation)
    info = _info(outcome.version, outcome.manifest, raw_request)
    return ProfileAnswer(
        **dict(info),
        changed=outcome.changed,
        observed=outcome.observed,
        dry_run=outcome.dry_run,
        previous=None if outcome.previous is None else version_info(outcome.previous),
    )


def _info(version: ProfileVersion, manifest: Manifest, raw_request: Request) -> ProfileInfo:
    assert version.settings is not None
    return profile_info(version, version.settings, manifest, identity_of(raw_request))


def _manifest(version: ProfileVersion, snapshot: Snapshot) -> Manifest:
    """Of the bundle of a current version, which nobody can remove from the registry."""
    assert version.settings is not None
    return snapshot.bundles[version.settings.bundle].manifest

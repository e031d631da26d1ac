"""`/v1/steering/bundles`: add, list, look at and remove bundles."""

import asyncio
import base64
import binascii
import functools
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import Header, Path, Query, Request, Response
from pydantic import BaseModel, ValidationError

from artifacts.errors import quoted
from artifacts.manifest import Manifest
from server.admin_schema import (
    DIGEST,
    DIGEST_PREFIX,
    MAX_DRAIN_S,
    BundleAnswer,
    BundleDetail,
    BundleFromRemote,
    BundleFromRoot,
    BundleList,
    BundleResidency,
    BundleTensors,
    CheckInfo,
)
from server.bundle_operations import bundle_named
from server.errors import ErrorCode, SteeringRequestError
from server.outcomes import BundleOutcome
from server.registry.records import Snapshot
from server.registry.store import BundleStore
from server.routes.admin.page import Cursor, Limit, page_of
from server.routes.admin.route import (
    JSON_TYPE,
    AdminRequest,
    admin_router,
    content_type,
    identity_of,
    refusal,
    service_of,
    snapshot_of,
)
from server.routes.admin.views import bundle_info, bundle_tensors

UPLOAD_TYPE = "application/octet-stream"
DIGEST_HEADER, SIGNATURE_HEADER = "x-steering-digest", "x-steering-signature"
_MAX_SIGNATURE_BYTES = 64 * 1024
_MAX_READ = 64
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            UPLOAD_TYPE: {"schema": {"type": "string", "format": "binary"}},
            JSON_TYPE: {
                "schema": {"oneOf": [BundleFromRoot.model_json_schema(), BundleFromRemote.model_json_schema()]},
            },
        },
    }
}

Asked = TypeVar("Asked", bound=BaseModel)
Digest = Annotated[
    str,
    Path(pattern=DIGEST_PREFIX, description="Digest, or a prefix of 8 hex digits or more that only one bundle has."),
]
DryRun = Annotated[bool, Query(description="Run every check and keep nothing.")]
Drain = Annotated[bool, Query(description="Wait until no request uses it, in place of a refusal while one does.")]
DrainTimeout = Annotated[float, Query(ge=0, le=MAX_DRAIN_S, description="How long to wait for that.")]

router = admin_router()


@router.post(
    "/bundles",
    summary="Add a bundle",
    responses={
        200: {"model": BundleAnswer, "description": "It was there already, or this was a dry run."},
        201: {"model": BundleAnswer, "description": "It was added."},
    },
    openapi_extra=_BODY,
)
async def add_bundle(
    raw_request: Request,
    response: Response,
    dry_run: DryRun = False,
    digest: Annotated[
        str | None,
        Header(alias=DIGEST_HEADER, pattern=DIGEST, description="Digest that an uploaded file must have."),
    ] = None,
    signature: Annotated[
        str | None,
        Header(alias=SIGNATURE_HEADER, description="Signature of the file by model-signing, in base64."),
    ] = None,
) -> BundleAnswer:
    """Check a bundle, keep it and put it on every worker.

    The body is the file itself, or a JSON object that names a file of the server's bundle root (`path`) or a remote
    one (`uri` and `digest`). Adding the same bundle again changes nothing.
    """
    operations, actor = service_of(raw_request).bundle_operations, identity_of(raw_request).name
    signed = None if signature is None else _decode_signature(signature)
    if content_type(raw_request, UPLOAD_TYPE, JSON_TYPE) == UPLOAD_TYPE:
        outcome = await operations.upload(
            raw_request.stream(),
            actor=actor,
            source="upload",
            expected_digest=digest,
            signature=signed,
            dry_run=dry_run,
        )
    else:
        _refuse_header(DIGEST_HEADER, digest)
        body = await AdminRequest(raw_request.scope, raw_request.receive).json()
        if isinstance(body, dict) and "uri" in body:
            remote = _parse(BundleFromRemote, body)
            outcome = await operations.add_from_remote(
                remote.uri, remote.digest, actor=actor, signature=signed, dry_run=dry_run
            )
        else:
            path = _parse(BundleFromRoot, body).path
            outcome = await operations.add_from_root(path, actor=actor, signature=signed, dry_run=dry_run)
    if outcome.created and not dry_run:
        response.status_code = HTTPStatus.CREATED
    return _answer(outcome, await snapshot_of(raw_request))


@router.get("/bundles", summary="List bundles")
async def list_bundles(raw_request: Request, limit: Limit = 100, cursor: Cursor = None) -> BundleList:
    """List the bundles of the registry, by digest."""
    snapshot = await snapshot_of(raw_request)
    page = page_of(snapshot.bundles, limit, cursor)
    return BundleList(bundles=[bundle_info(record, snapshot) for record in page.items], next=page.next)


@router.get("/bundles/{digest}", summary="Show a bundle")
async def show_bundle(raw_request: Request, digest: Digest) -> BundleDetail:
    """Show a bundle, which profiles name it and which workers hold it."""
    snapshot = await snapshot_of(raw_request)
    record = bundle_named(snapshot, digest)
    workers = await service_of(raw_request).engine.status()
    residency = [
        BundleResidency(
            replica=worker.get("replica", 0),
            rank=worker["rank"],
            keys=sorted(
                key for key in worker["bundles"] if key == record.digest or key.startswith(f"{record.digest}+")
            ),
        )
        for worker in workers
    ]
    return BundleDetail(**dict(bundle_info(record, snapshot)), residency=residency)


@router.get("/bundles/{digest}/manifest", summary="Show the manifest of a bundle")
async def show_manifest(raw_request: Request, digest: Digest) -> Manifest:
    """Show all that a bundle says of itself: interventions, layer pairs, scores and evaluation."""
    return bundle_named(await snapshot_of(raw_request), digest).manifest


@router.get("/bundles/{digest}/tensors", summary="Show the tensors of a bundle")
async def show_tensors(raw_request: Request, digest: Digest) -> BundleTensors:
    """Show the norms of the rows that the interventions use, and which tensors the file holds as evidence."""
    record = bundle_named(await snapshot_of(raw_request), digest)
    return await asyncio.to_thread(_tensors, service_of(raw_request).registry.store, record.digest)


@router.delete(
    "/bundles/{digest}",
    summary="Remove a bundle",
    status_code=HTTPStatus.NO_CONTENT,
    response_class=Response,
)
async def delete_bundle(
    raw_request: Request,
    digest: Digest,
    drain: Drain = False,
    timeout_s: DrainTimeout = 30.0,
) -> Response:
    """Remove a bundle from the workers and the registry. Refused while a profile names it."""
    await service_of(raw_request).bundle_operations.delete(
        digest, actor=identity_of(raw_request).name, drain=drain, timeout_s=timeout_s
    )
    return Response(status_code=HTTPStatus.NO_CONTENT)


# The whole file is read and hashed for it, and what a digest names never changes.
@functools.lru_cache(_MAX_READ)
def _tensors(store: BundleStore, digest: str) -> BundleTensors:
    return bundle_tensors(store.load(digest))


def _answer(outcome: BundleOutcome, snapshot: Snapshot) -> BundleAnswer:
    return BundleAnswer(
        **dict(bundle_info(outcome.record, snapshot)),
        created=outcome.created,
        is_resident=outcome.is_resident,
        checks=[CheckInfo(check=check, found=found) for check, found in outcome.checks],
        dry_run=outcome.dry_run,
        duration_s=outcome.duration_s,
    )


def _parse(model: type[Asked], body: Any) -> Asked:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors(include_url=False)]
        raise refusal(problems) from None


def _refuse_header(name: str, value: str | None) -> None:
    """What would have no effect here must not seem to have one."""
    if value is not None:
        raise SteeringRequestError(
            ErrorCode.REQUEST_INVALID, f"The header {name} has no meaning for this source; leave it out.", param=name
        )


def _decode_signature(text: str) -> bytes:
    try:
        signature = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SteeringRequestError(
            ErrorCode.SIGNATURE_INVALID, f"{SIGNATURE_HEADER} is {quoted(text)}, not base64.", param=SIGNATURE_HEADER
        ) from None
    if len(signature) > _MAX_SIGNATURE_BYTES:
        raise SteeringRequestError(
            ErrorCode.SIGNATURE_INVALID,
            f"The signature has {len(signature)} bytes; at most {_MAX_SIGNATURE_BYTES} are read.",
            param=SIGNATURE_HEADER,
        )
    return signature

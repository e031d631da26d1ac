"""Objects of an S3 bucket, or of a store that speaks the same protocol."""

import importlib.util
import re
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import NamedTuple

from artifacts.errors import quoted
from server.sources.errors import SourceError, SourceErrorCode
from server.sources.incoming_file import require_size
from server.sources.names import name_parts

_ADDRESS = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<key>.+)", re.DOTALL)
_MAX_RETRIES, _RETRY_TIME = 2, timedelta(seconds=30)


class StoredObject(NamedTuple):
    """One object."""

    bucket: str
    key: str


def require_package() -> None:
    """Check that the package for S3 is there.

    Raises:
        SourceError: `missing_package`.
    """
    if importlib.util.find_spec("obstore") is None:
        message = "s3:// addresses need the package obstore; install it"
        raise SourceError(SourceErrorCode.MISSING_PACKAGE, message)


def parse(uri: str) -> StoredObject:
    """Return what `uri` names.

    Raises:
        SourceError: `bad_address`, `bad_name`.
    """
    match = _ADDRESS.fullmatch(uri)
    if match is None:
        message = "the address is not of the form s3://BUCKET/KEY; credentials come from the server's environment"
        raise SourceError(SourceErrorCode.BAD_ADDRESS, message)
    name_parts(match["key"])
    return StoredObject(**match.groupdict())


async def read(item: StoredObject, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Yield the content of `item`. The caller bounds the time.

    Credentials, region and endpoint come from the environment as obstore has it: AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL and, for an endpoint without TLS, AWS_ALLOW_HTTP=true.

    Raises:
        SourceError: `missing_package`, `not_found`, `refused`, `unavailable`, `too_large`.
    """
    require_package()
    from obstore import get_async
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
    from obstore.store import S3Store

    # Without the causes: messages of the store hold its answers, which may repeat what was sent to it.
    try:
        # No client options: with any of them obstore forgets those of the environment.
        store = S3Store(item.bucket, retry_config={"max_retries": _MAX_RETRIES, "retry_timeout": _RETRY_TIME})
        result = await get_async(store, item.key)
        require_size(result.meta["size"], max_bytes)
        # As it arrives: the wait for each piece is bounded, and a slow line must get one through in time.
        async for chunk in result.stream(min_chunk_size=1):
            yield bytes(chunk)
    except FileNotFoundError:
        message = f"the bucket {item.bucket!r} has no object {quoted(item.key)}; correct the address"
        raise SourceError(SourceErrorCode.NOT_FOUND, message) from None
    except (PermissionDeniedError, UnauthenticatedError):
        message = f"the store refuses access to the bucket {item.bucket!r}; check the server's AWS_ variables"
        raise SourceError(SourceErrorCode.REFUSED, message) from None
    except (BaseError, OSError, ValueError) as error:
        message = (
            f"the store of the bucket {item.bucket!r} did not send the object ({type(error).__name__}); "
            "check AWS_ENDPOINT_URL and AWS_REGION, and try again"
        )
        raise SourceError(SourceErrorCode.UNAVAILABLE, message) from None

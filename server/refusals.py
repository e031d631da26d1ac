"""What the parts of the server refuse or fail at, as answers of the admin API."""

from collections.abc import Collection, Sequence
from http import HTTPStatus

from artifacts.errors import BundleError, BundleErrorCode
from artifacts.manifest import ExcludedSpan
from server.engine.client import SteeringEngineError
from server.errors import ErrorCode, SteeringRequestError
from server.reconciler import StagingError, spans_of
from server.registry.errors import RegistryError, RegistryErrorCode
from server.sources.errors import SourceError, SourceErrorCode

_OF_REGISTRY = {
    RegistryErrorCode.NOT_FOUND: (ErrorCode.PROFILE_NOT_FOUND, HTTPStatus.NOT_FOUND),
    RegistryErrorCode.IN_USE: (ErrorCode.BUNDLE_IN_USE, HTTPStatus.CONFLICT),
    RegistryErrorCode.PRECONDITION_FAILED: (ErrorCode.PRECONDITION_FAILED, HTTPStatus.PRECONDITION_FAILED),
    RegistryErrorCode.NOT_HELD: (ErrorCode.NOT_STAGED, HTTPStatus.CONFLICT),
    RegistryErrorCode.BUNDLE_MISSING: (ErrorCode.BUNDLE_NOT_FOUND, HTTPStatus.CONFLICT),
    RegistryErrorCode.LOCKED: (ErrorCode.CONFLICT_STATE, HTTPStatus.CONFLICT),
}
_OF_SOURCE = {
    SourceErrorCode.BAD_NAME: (ErrorCode.REQUEST_INVALID, HTTPStatus.BAD_REQUEST),
    SourceErrorCode.BAD_ADDRESS: (ErrorCode.REQUEST_INVALID, HTTPStatus.BAD_REQUEST),
    SourceErrorCode.BAD_DIGEST: (ErrorCode.REQUEST_INVALID, HTTPStatus.BAD_REQUEST),
    SourceErrorCode.SCHEME_DISABLED: (ErrorCode.SOURCE_REFUSED, HTTPStatus.FORBIDDEN),
    SourceErrorCode.NOT_FOUND: (ErrorCode.SOURCE_REFUSED, HTTPStatus.NOT_FOUND),
    SourceErrorCode.EMPTY: (ErrorCode.BUNDLE_INVALID, HTTPStatus.BAD_REQUEST),
    SourceErrorCode.TOO_LARGE: (ErrorCode.TOO_LARGE, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    SourceErrorCode.DIGEST_MISMATCH: (ErrorCode.DIGEST_MISMATCH, HTTPStatus.CONFLICT),
    SourceErrorCode.NO_SPACE: (ErrorCode.NO_SPACE, HTTPStatus.CONFLICT),
    SourceErrorCode.UNSIGNED: (ErrorCode.SIGNATURE_INVALID, HTTPStatus.FORBIDDEN),
    SourceErrorCode.BAD_SIGNATURE: (ErrorCode.SIGNATURE_INVALID, HTTPStatus.FORBIDDEN),
}


def refusal_of(error: Exception) -> SteeringRequestError:
    """The answer to a request that failed with an error of the server's parts.

    Args:
        error: `BundleError`, `SourceError`, `RegistryError`, `StagingError` or a `ValueError` about a bundle.
    """
    match error:
        case SteeringRequestError():
            return error
        case BundleError():
            is_other_model = error.code is BundleErrorCode.MODEL_MISMATCH
            code = ErrorCode.BUNDLE_MISMATCH if is_other_model else ErrorCode.BUNDLE_INVALID
            status = HTTPStatus.CONFLICT if is_other_model else HTTPStatus.BAD_REQUEST
            return SteeringRequestError(code, f"{error.code.value}: {error}", status, "bundle")
        case SourceError():
            code, status = _OF_SOURCE.get(error.code, (ErrorCode.SOURCE_REFUSED, HTTPStatus.CONFLICT))
            return SteeringRequestError(code, str(error), status, None)
        case RegistryError():
            # What is no refusal is a failure of the disk, or of what lies on it.
            code, status = _OF_REGISTRY.get(error.code, (ErrorCode.STORAGE_FAILED, HTTPStatus.INTERNAL_SERVER_ERROR))
            return SteeringRequestError(code, str(error), status, None)
        case SteeringEngineError():
            message = f"The engine does not answer as it should: {error}"
            return SteeringRequestError(ErrorCode.NOT_STAGED, message, HTTPStatus.SERVICE_UNAVAILABLE, None)
        case StagingError():
            code = ErrorCode.CAPACITY if error.code == "no_room" else ErrorCode.NOT_STAGED
            return SteeringRequestError(code, f"{error} Nothing was changed.", HTTPStatus.CONFLICT, "bundle")
        case _:
            return SteeringRequestError(ErrorCode.BUNDLE_MISMATCH, str(error), HTTPStatus.CONFLICT, "bundle")


def refuse_unknown_spans(exclude: Sequence[ExcludedSpan], known: Collection[str]) -> None:
    """Refuse to leave out spans whose tokens the engine cannot tell.

    Args:
        exclude: what is to be left out of steering.
        known: names of `SPAN_NAMES` whose delimiters the engine knows.

    Raises:
        SteeringRequestError: names the first such span (409).
    """
    for name in spans_of(exclude):
        if name not in known:
            raise SteeringRequestError(
                ErrorCode.UNSUPPORTED,
                f"This server does not know which tokens open and close {name}; start it with "
                f"--steering-span {name}=OPEN,CLOSE, or leave {name} out of exclude.",
                HTTPStatus.CONFLICT,
                "exclude",
            )

"""Refusals, in the error form of OpenAI or of Anthropic, with stable codes."""

from collections.abc import Mapping
from enum import StrEnum
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse


class ErrorCode(StrEnum):
    """Stable value of `error.code`."""

    PROFILE_NOT_FOUND = "steering_profile_not_found"
    PROFILE_INVALID = "steering_profile_invalid"
    PROFILE_FORBIDDEN = "steering_profile_forbidden"
    STRENGTH_INVALID = "steering_strength_invalid"
    SCOPE_INVALID = "steering_scope_invalid"
    FIELD_UNKNOWN = "steering_field_unknown"
    CONFLICT = "steering_profile_conflict"
    TOO_MANY = "steering_too_many_profiles"
    UNSUPPORTED = "steering_unsupported"
    NOT_APPLIED = "steering_not_applied"
    DRAINING = "steering_server_draining"
    # Of the admin API.
    REQUEST_INVALID = "steering_request_invalid"
    BUNDLE_NOT_FOUND = "steering_bundle_not_found"
    BUNDLE_INVALID = "steering_bundle_invalid"
    BUNDLE_MISMATCH = "steering_bundle_mismatch"
    BUNDLE_IN_USE = "steering_bundle_in_use"
    CAPACITY = "steering_capacity"
    NOT_STAGED = "steering_not_staged"
    PRECONDITION_FAILED = "steering_precondition_failed"
    CONFLICT_STATE = "steering_conflict"
    SOURCE_REFUSED = "steering_source_refused"
    SIGNATURE_INVALID = "steering_signature_invalid"
    DIGEST_MISMATCH = "steering_digest_mismatch"
    TOO_LARGE = "steering_too_large"
    NO_SPACE = "steering_no_space"
    STORAGE_FAILED = "steering_storage_failed"
    # Of access.
    KEY_INVALID = "invalid_api_key"
    ACCESS_DENIED = "steering_access_denied"
    ADMIN_DISABLED = "steering_admin_disabled"
    RATE_LIMITED = "steering_rate_limited"


_TYPES = {
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
    HTTPStatus.FORBIDDEN: "PermissionDeniedError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.CONFLICT: "ConflictError",
    HTTPStatus.PRECONDITION_FAILED: "PreconditionFailedError",
    HTTPStatus.TOO_MANY_REQUESTS: "RateLimitError",
    HTTPStatus.INTERNAL_SERVER_ERROR: "InternalServerError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
}
_ANTHROPIC_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.INTERNAL_SERVER_ERROR: "api_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}
_ANTHROPIC_ROUTE = "/v1/messages"


class SteeringRequestError(ValueError):
    """A request that is refused.

    Attributes:
        code: stable error code.
        status: HTTP status.
        param: request field at fault; None when no single one is.
        headers: headers that go with the answer.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        param: str | None = "steering_profile",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.param = param
        self.headers = dict(headers or {})

    def body(self, instance: str | None = None) -> dict[str, Any]:
        """OpenAI error body, with the members `title`, `status` and `instance` of RFC 7807 inside.

        Args:
            instance: what tells this occurrence from others: the request's id or path.
        """
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, "BadRequestError"),
                "param": self.param,
                "code": self.code.value,
                "title": self.status.phrase,
                "status": self.status.value,
                "instance": instance,
            }
        }

    def anthropic_body(self, instance: str | None = None) -> dict[str, Any]:
        """Anthropic error body: the same members with Anthropic's types of errors.

        Args:
            instance: see `body`.
        """
        error = self.body(instance)["error"]
        error["type"] = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
        return {"type": "error", "error": error}

    def response(self, instance: str | None = None, route: str = "") -> JSONResponse:
        """The refusal as an HTTP response.

        Args:
            instance: see `body`.
            route: path of the route without the root path; those of Anthropic's API have its form of errors.
        """
        is_anthropic = route == _ANTHROPIC_ROUTE or route.startswith(f"{_ANTHROPIC_ROUTE}/")
        body = self.anthropic_body(instance) if is_anthropic else self.body(instance)
        return JSONResponse(body, status_code=self.status.value, headers=self.headers)

"""Refusals, in the OpenAI error form with stable codes."""

from enum import StrEnum
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse


class ErrorCode(StrEnum):
    """Stable value of `error.code`."""

    PROFILE_NOT_FOUND = "steering_profile_not_found"
    PROFILE_INVALID = "steering_profile_invalid"
    STRENGTH_INVALID = "steering_strength_invalid"
    SCOPE_INVALID = "steering_scope_invalid"
    FIELD_UNKNOWN = "steering_field_unknown"
    CONFLICT = "steering_profile_conflict"
    TOO_MANY = "steering_too_many_profiles"
    UNSUPPORTED = "steering_unsupported"
    NOT_APPLIED = "steering_not_applied"


class SteeringRequestError(ValueError):
    """A request that asks for steering and is refused.

    Attributes:
        code: stable error code.
        status: HTTP status.
        param: request field at fault.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        param: str = "steering_profile",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.param = param

    def body(self) -> dict[str, Any]:
        """OpenAI error body."""
        kind = {HTTPStatus.NOT_FOUND: "NotFoundError", HTTPStatus.INTERNAL_SERVER_ERROR: "InternalServerError"}
        return {
            "error": {
                "message": str(self),
                "type": kind.get(self.status, "BadRequestError"),
                "param": self.param,
                "code": self.code.value,
            }
        }

    def response(self) -> JSONResponse:
        """The refusal as an HTTP response."""
        return JSONResponse(self.body(), status_code=self.status.value)

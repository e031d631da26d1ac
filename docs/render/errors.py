"""Codes of refusals: where they come from and what helps."""

from typing import NamedTuple

from docs.render.markdown import code, table
from server.errors import ErrorCode


class _Refusal(NamedTuple):
    """HTTP statuses that a code comes with, what it means, and what helps."""

    statuses: str
    meaning: str
    remedy: str


_REFUSALS: dict[ErrorCode, _Refusal] = {
    ErrorCode.PROFILE_NOT_FOUND: _Refusal(
        "404", "No such profile, or no such version of it.", "Take a name of `GET /v1/steering/profiles`."
    ),
    ErrorCode.PROFILE_INVALID: _Refusal(
        "400", "`steering_profile` is no name, object or list.", "Send one of the three forms."
    ),
    ErrorCode.PROFILE_FORBIDDEN: _Refusal(
        "403", "The key may not use this profile.", "Use another key, or widen `profiles` or `allowed_keys`."
    ),
    ErrorCode.STRENGTH_INVALID: _Refusal(
        "400, 403",
        "The strength is no finite number, or over the maximum of the profile (400) or of the key (403).",
        "Stay within the bound that the message names.",
    ),
    ErrorCode.SCOPE_INVALID: _Refusal("400", "The scope is none of the four.", "Send one that the message lists."),
    ErrorCode.FIELD_UNKNOWN: _Refusal(
        "400", "A field or query parameter that does not exist, often a misspelt one.", "Correct its name."
    ),
    ErrorCode.CONFLICT: _Refusal(
        "400", "Both the model name and `steering_profile` choose a profile.", "Keep one of the two."
    ),
    ErrorCode.TOO_MANY: _Refusal(
        "400", "More profiles, interventions at one layer, or gates than fit.", "Name fewer profiles."
    ),
    ErrorCode.UNSUPPORTED: _Refusal(
        "400, 409", "This route, option or engine cannot be steered.", "Leave out what the message names."
    ),
    ErrorCode.NOT_APPLIED: _Refusal(
        "500", "The engine did not report that it steered, so there is no answer.", "Try again; see the server's log."
    ),
    ErrorCode.STORAGE_FAILED: _Refusal(
        "500",
        "The disk of the registry failed, or what lies on it is damaged.",
        "See the server's log; run `expertsteer registry verify`.",
    ),
    ErrorCode.DRAINING: _Refusal("503", "The server is shutting down.", "Send the request to another server."),
    ErrorCode.REQUEST_INVALID: _Refusal(
        "400, 404, 405, 411, 415", "Body, header, address or parameter is wrong.", "Correct what the message names."
    ),
    ErrorCode.BUNDLE_NOT_FOUND: _Refusal("404, 409", "The server has no such bundle.", "Upload it first."),
    ErrorCode.BUNDLE_INVALID: _Refusal(
        "400", "The file is damaged or no bundle; the message begins with a code of the format.", "Build it again."
    ),
    ErrorCode.BUNDLE_MISMATCH: _Refusal(
        "409", "The bundle was made for another model.", "Build one for the served model."
    ),
    ErrorCode.BUNDLE_IN_USE: _Refusal(
        "409", "A profile or a running request needs the bundle.", "Delete the profiles that name it; ask for a drain."
    ),
    ErrorCode.CAPACITY: _Refusal(
        "409", "The bundle does not fit on the device.", "Delete profiles, or raise `--steering-rows`."
    ),
    ErrorCode.NOT_STAGED: _Refusal(
        "409, 503", "A worker did not load the bundle; nothing was changed.", "See status and log, then try again."
    ),
    ErrorCode.PRECONDITION_FAILED: _Refusal(
        "412", "Somebody else has changed the profile.", "Read it again, then decide."
    ),
    ErrorCode.CONFLICT_STATE: _Refusal(
        "409", "The present state does not allow the change.", "Do what the message says, or try again."
    ),
    ErrorCode.SOURCE_REFUSED: _Refusal(
        "403, 404, 409", "The place is not enabled, or it does not hand the file out.", "Upload the file, or enable it."
    ),
    ErrorCode.SIGNATURE_INVALID: _Refusal(
        "403", "The signature is missing or wrong.", "Sign the file with a key that the server knows."
    ),
    ErrorCode.DIGEST_MISMATCH: _Refusal(
        "409", "The bytes are not those that the digest says.", "Send the file again, or correct the digest."
    ),
    ErrorCode.TOO_LARGE: _Refusal("413", "The body is over the bound.", "Send less, or raise the bound."),
    ErrorCode.NO_SPACE: _Refusal("409", "The registry's disk is full.", "Free space: `expertsteer registry gc`."),
    ErrorCode.KEY_INVALID: _Refusal("401", "No key, or an unknown or expired one.", "Send a valid key."),
    ErrorCode.ACCESS_DENIED: _Refusal("403", "The role of the key does not allow this.", "Use a key of that role."),
    ErrorCode.ADMIN_DISABLED: _Refusal("403", "The server has no write key.", "Start it with one."),
    ErrorCode.RATE_LIMITED: _Refusal(
        "429", "The key makes changes too often.", "Wait for as long as `Retry-After` says."
    ),
}


def codes_table() -> str:
    """Every code. One without a description is a `KeyError`."""
    rows = [(code(each.value), *_REFUSALS[each]) for each in ErrorCode]
    return table(("code", "status", "meaning", "what helps"), rows)

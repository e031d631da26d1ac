"""`If-Match` and `If-None-Match` of the admin API: an entity tag is the generation that made a version."""

import re
from http import HTTPStatus

from artifacts.errors import quoted
from server.errors import ErrorCode, SteeringRequestError
from server.registry.records import ProfileVersion

_TAG = re.compile(r'"([0-9]{1,18})"')


def entity_tag(generation: int) -> str:
    """The entity tag of a version."""
    return f'"{generation}"'


def expected_generation(current: ProfileVersion | None, if_match: str | None) -> int | None:
    """Generation that the current version must still have when a change is committed; None for any.

    Args:
        current: the current version; None where there is none.
        if_match: the header: "*", or entity tags separated by commas.

    Raises:
        SteeringRequestError: 412, the current version has none of the tags; 400, the header is not understood.
    """
    if if_match is None:
        return None
    if current is None:
        raise failed("There is no such profile, so no version of it can match.")
    if if_match.strip() == "*":
        return None
    tags = [_TAG.fullmatch(tag.strip()) for tag in if_match.split(",")]
    generations = [int(tag[1]) for tag in tags if tag is not None]
    if len(generations) < len(tags):
        raise SteeringRequestError(
            ErrorCode.REQUEST_INVALID,
            f'If-Match is {quoted(if_match)}, expected * or entity tags like "12".',
            param="If-Match",
        )
    if current.generation not in generations:
        raise failed(f"The current version is {entity_tag(current.generation)}, not {if_match.strip()}; read it again.")
    return current.generation


def must_be_new(if_none_match: str | None) -> bool:
    """Whether a profile may only be created, not changed.

    Raises:
        SteeringRequestError: 400, the header says something else than "*".
    """
    if if_none_match is not None and if_none_match.strip() != "*":
        raise SteeringRequestError(
            ErrorCode.REQUEST_INVALID,
            f"If-None-Match is {quoted(if_none_match)}; only * is understood here.",
            param="If-None-Match",
        )
    return if_none_match is not None


def failed(message: str, param: str = "If-Match") -> SteeringRequestError:
    """The refusal 412."""
    return SteeringRequestError(ErrorCode.PRECONDITION_FAILED, message, HTTPStatus.PRECONDITION_FAILED, param)

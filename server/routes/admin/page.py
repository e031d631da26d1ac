"""Pages of long lists, by opaque cursors."""

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Generic, NamedTuple, TypeVar

from fastapi import Query

from artifacts.errors import quoted
from server.admin_schema import MAX_PAGE
from server.errors import ErrorCode, SteeringRequestError

Item = TypeVar("Item")

Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Entries of a page.")]
Cursor = Annotated[
    str | None,
    Query(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_-]+$", description="`next` of the page before."),
]


class Page(NamedTuple, Generic[Item]):
    """Some entries, and the cursor of those that follow; None at the end."""

    items: list[Item]
    next: str | None


def page_of(items: Mapping[str, Item], limit: int, cursor: str | None) -> Page[Item]:
    """Cut a page.

    Entries are in the order of their keys and a cursor is the last key of a page, so that entries that come and go
    between two pages neither repeat nor hide others.

    Args:
        items: all entries.
        limit: most entries of the page.
        cursor: None for the first page.

    Raises:
        SteeringRequestError: the cursor is none that a page gave.
    """
    after = "" if cursor is None else _decode(cursor)
    keys = sorted(key for key in items if key > after)
    shown = keys[:limit]
    return Page([items[key] for key in shown], _encode(shown[-1]) if len(keys) > limit else None)


def _encode(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def _decode(cursor: str) -> str:
    try:
        return base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise SteeringRequestError(
            ErrorCode.REQUEST_INVALID,
            f"cursor is {quoted(cursor)}, which no page gave; leave it out to start from the beginning.",
            param="cursor",
        ) from None

"""`GET /playground/`: a static page that shows what profiles do."""

import os
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles

PLAYGROUND = Path(__file__).parents[1] / "playground"
# The page asks nobody but this server, runs no markup of an answer, and no other page can frame it.
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{directive} {value}" for directive, value in _POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}

_router = APIRouter(include_in_schema=False)


@_router.get("/playground")
async def redirect_to_playground() -> RedirectResponse:
    """Add the slash: the page's addresses are relative, so that it works behind a proxy that adds a prefix."""
    return RedirectResponse("playground/")


class _Files(StaticFiles):
    """Files of the page, with headers that keep it apart from everything else."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def attach(app: FastAPI) -> None:
    """Add the page to the app."""
    app.include_router(_router)
    app.mount("/playground", _Files(directory=os.fspath(PLAYGROUND), html=True))

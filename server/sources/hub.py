"""Files of a repository on the Hugging Face Hub or a mirror of it, at one commit."""

import re
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import NamedTuple

import httpx

from artifacts.errors import quoted
from server.sources.errors import SourceError, SourceErrorCode
from server.sources.incoming_file import require_size
from server.sources.names import name_parts

MAX_REDIRECTS = 5
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ADDRESS = re.compile(rf"hf://(?P<repository>{_PART}/{_PART})@(?P<commit>[0-9a-f]{{40}})/(?P<path>.+)", re.DOTALL)


class HubFile(NamedTuple):
    """One file that cannot change: a commit, not a branch or a tag."""

    repository: str
    commit: str
    path: str


def parse(uri: str) -> HubFile:
    """Return what `uri` names.

    Raises:
        SourceError: `bad_address`, `bad_name`.
    """
    match = _ADDRESS.fullmatch(uri)
    if match is None:
        message = (
            "the address is not of the form hf://ORGANISATION/REPOSITORY@COMMIT/PATH; "
            "give the commit as 40 lower-case hexadecimal digits, not a branch"
        )
        raise SourceError(SourceErrorCode.BAD_ADDRESS, message)
    name_parts(match["path"])
    return HubFile(**match.groupdict())


async def read(file: HubFile, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Yield the content of `file`. Waits without limit: the caller bounds the time.

    Endpoint, offline mode and token are those of huggingface_hub's own configuration. The token goes to the endpoint
    only, not to the storage that it redirects to.

    Raises:
        SourceError: `not_found`, `refused`, `bad_redirect`, `unavailable`, `too_large`.
    """
    # Here: the import takes longer than the rest of the server's start, and few servers need it.
    from huggingface_hub import constants, get_token, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        raise SourceError(SourceErrorCode.UNAVAILABLE, "HF_HUB_OFFLINE is set; unset it or upload the file")
    # What is hashed is the file, not a compressed form of it. Not the library's build_hf_headers: it may ask the hub
    # which programs to name as the user agent, and everybody would wait.
    headers = {"User-Agent": "expertsteer", "Accept-Encoding": "identity"}
    if not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (token := get_token()):
        headers["Authorization"] = f"Bearer {token}"
    try:
        url = httpx.URL(hf_hub_url(file.repository, file.path, revision=file.commit))
        # The caller bounds every wait; a time-out of the client would only race with it.
        async with httpx.AsyncClient(timeout=None) as client:
            for _ in range(MAX_REDIRECTS + 1):
                async with client.stream("GET", url, headers=headers) as response:
                    if response.has_redirect_location:
                        url, headers = _follow(response, headers)
                        continue
                    _require_content(response, file, max_bytes)
                    async for chunk in response.aiter_raw():
                        yield chunk
                    return
    # Without the cause, which may hold a token of the wrong form or the address of the storage with its signature.
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        message = f"the hub did not send the file ({type(error).__name__}); check HF_ENDPOINT and try again"
        raise SourceError(SourceErrorCode.UNAVAILABLE, message) from None
    message = f"the hub redirects more than {MAX_REDIRECTS} times; check HF_ENDPOINT"
    raise SourceError(SourceErrorCode.BAD_REDIRECT, message)


def _follow(response: httpx.Response, headers: dict[str, str]) -> tuple[httpx.URL, dict[str, str]]:
    """Return where to go next and what to send there."""
    here = response.url
    there = here.join(response.headers["Location"])
    if not there.host or there.scheme not in {"https", here.scheme}:
        message = "the hub redirects to an address that is not a web address as safe as its own; check HF_ENDPOINT"
        raise SourceError(SourceErrorCode.BAD_REDIRECT, message)
    if (there.scheme, there.host, there.port) != (here.scheme, here.host, here.port):
        headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
    return there, headers


def _require_content(response: httpx.Response, file: HubFile, max_bytes: int) -> None:
    status = response.status_code
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        message = f"the hub refuses access to {file.repository} ({status}); check its name and the server's HF_TOKEN"
        raise SourceError(SourceErrorCode.REFUSED, message)
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        message = f"{file.repository} at commit {file.commit} has no file {quoted(file.path)}; correct the address"
        raise SourceError(SourceErrorCode.NOT_FOUND, message)
    if status != HTTPStatus.OK:
        raise SourceError(SourceErrorCode.UNAVAILABLE, f"the hub answered with status {status}; try again later")
    length = response.headers.get("Content-Length", "")
    if length.isascii() and length.isdigit() and len(length) < 20:
        require_size(int(length), max_bytes)

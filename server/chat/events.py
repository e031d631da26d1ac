"""Server-sent events, as far as chat completions use them."""

import re
from collections.abc import AsyncIterator

# Only these end a line: U+2028 and its like are text, though Python splits lines at them.
_LINE = re.compile(rb"\r\n|\n|\r")
_EVENT = re.compile(rb"\r\n\r\n|\n\n|\r\r")


async def event_data(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The data of each event, in order.

    Args:
        chunks: body of the response, cut anywhere.
    """
    pending = b""
    async for chunk in chunks:
        *events, pending = _EVENT.split(pending + chunk)
        for event in events:
            lines = [line for line in _LINE.split(event) if line.startswith(b"data:")]
            if lines:
                yield b"\n".join(line[5:].removeprefix(b" ") for line in lines).decode("utf-8", errors="replace")

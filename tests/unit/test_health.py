"""Liveness while an engine runs, is shut down, or has died."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from server.routes.health import show_liveness


@pytest.mark.parametrize(
    ("client", "status"),
    [
        (SimpleNamespace(errored=False), 200),
        # Shut down after its streams ended: whoever asks now must not restart the server.
        (SimpleNamespace(errored=True, died_before_shutdown=False), 200),
        (SimpleNamespace(errored=True), 503),
        (SimpleNamespace(errored=True, died_before_shutdown=True), 503),
    ],
    ids=["runs", "shut down", "died", "died and shut down"],
)
def test_liveness(client: Any, status: int) -> None:
    request: Any = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(engine_client=client)))
    answer = asyncio.run(show_liveness(request))
    assert answer.status_code == status
    assert json.loads(answer.body)["status"] == ("ok" if status == 200 else "unavailable")

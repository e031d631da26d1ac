"""Waiting for what a server does in its own time."""

import time
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 90.0


def wait_until(condition: Callable[[], Any], what: str = "the condition does not hold") -> Any:
    """Ask again and again until the answer is true.

    Args:
        condition: what is asked.
        what: message of the failure.

    Returns:
        The answer.

    Raises:
        AssertionError: it takes longer than a busy machine explains.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found

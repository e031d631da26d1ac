"""Many administrators, senders and clients at once, at a size for every day; `tests/bench/soak.py` is the full one."""

from pathlib import Path
from typing import Any

import churn
import pytest
from race import race
from traffic import Address

pytestmark = pytest.mark.engine

NUM_THREADS, NUM_CALLS = 32, 8
NUM_CYCLES, NUM_WARM_UP = 100, 20
NUM_STREAMS = 100
MAX_GROWTH_MIB = 50


@pytest.fixture
def address(operated: Any) -> Any:
    """Of a server that is empty, and must be so again."""
    yield Address(operated.server.url, operated.server.client.headers["authorization"].removeprefix("Bearer "))
    assert operated.admin.profiles() == []
    assert operated.admin.bundles() == []


def test_one_name_changed_by_everybody(address: Address, operated: Any, bundle_files: dict[str, Path]) -> None:
    found = race(address, [bundle_files["early"], bundle_files["late"]], NUM_THREADS, NUM_CALLS)
    assert found.problems == []
    # Otherwise the calls were none that could disturb each other.
    assert min(found.changes.get(action, 0) for action in ("put", "rollback", "delete")) > NUM_CALLS
    assert operated.server.process.poll() is None


def test_bundles_come_and_go(address: Address, bundle_files: dict[str, Path], tmp_path: Path) -> None:
    found = churn.cycle(address, bundle_files["every"], tmp_path, NUM_CYCLES, NUM_WARM_UP)
    assert found.problems == []
    assert found.left == churn.NOTHING
    assert found.growth_mib < MAX_GROWTH_MIB, found.by_process


def test_streams_that_are_left(address: Address, operated: Any, bundle_files: dict[str, Path]) -> None:
    generated = operated.server.metric("vllm:generation_tokens_total")
    found = churn.abort(address, bundle_files["double"], NUM_STREAMS)
    assert found.problems == []
    assert found.left == churn.NOTHING
    # They were cut off indeed, and did not merely go unread.
    full = NUM_STREAMS * churn.MAX_TOKENS * 1.5
    assert operated.server.metric("vllm:generation_tokens_total") - generated < full / 2

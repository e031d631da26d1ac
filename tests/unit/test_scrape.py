"""Scrapes of metrics: one at a time, and also where the engine does not answer."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from server import scrape
from server.metrics import series
from server.metrics.figures import NO_ENGINE
from server.metrics.metrics import SteeringMetrics
from server.scrape import Scraper


class Counted:
    """Stands for the work of one scrape: counts how many run at once, and how often."""

    def __init__(self) -> None:
        self.running = self.most = self.calls = 0

    async def __call__(self, _: Any) -> list[int]:
        self.calls += 1
        number = self.calls
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.01)
        self.running -= 1
        return [number]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """What a scraper does in place of a scrape."""
    counted = Counted()
    monkeypatch.setattr(scrape, "_scrape", counted)
    return counted


@pytest.fixture
def scraper() -> Scraper:
    service: Any = None
    return Scraper(service)


async def test_who_waits_shares_the_next(scraper: Scraper, counted: Counted) -> None:
    first = asyncio.create_task(scraper.scrape())
    await asyncio.sleep(0)
    others = [asyncio.create_task(scraper.scrape()) for _ in range(20)]
    assert await first == [1]
    assert await asyncio.gather(*others) == [[2]] * 20, "one that began after they had asked"
    assert (counted.most, counted.calls) == (1, 2)


@pytest.mark.usefixtures("counted")
async def test_a_client_that_leaves_takes_nothing_with_it(scraper: Scraper) -> None:
    first = asyncio.create_task(scraper.scrape())
    await asyncio.sleep(0)
    second = asyncio.create_task(scraper.scrape())
    await asyncio.sleep(0)
    first.cancel()
    assert await second == [2]


async def test_an_engine_that_hangs(start_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "_ENGINE_TIMEOUT_S", 0.05)
    seen = []

    class Metrics(SteeringMetrics):
        def families(self, members: Any, engine: Any, state: Any) -> Any:
            seen.append(engine)
            return super().families(members, engine, state)

    async def hang() -> None:
        await asyncio.Event().wait()

    async with start_process() as node:
        service: Any = SimpleNamespace(
            metrics=Metrics(),
            engine=SimpleNamespace(counters=hang, ended=node.engine.ended),
            reconciler=node.reconciler,
            registry=node.registry,
            instance=node.reconciler.instance,
            convergence=None,
            is_ready=True,
            bytes_per_row=4,
            build=dict.fromkeys(series.BUILD.labels, "1"),
        )
        async with asyncio.timeout(30):
            families = await Scraper(service).scrape()
        assert seen == [NO_ENGINE]
        assert any(family.name == "steering_ready" for family in families)

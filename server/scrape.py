"""The figures of one scrape, over all processes and workers of this server."""

import asyncio
import json
import logging

from prometheus_client.metrics_core import Metric

from server.engine.client import SteeringEngineError
from server.metrics.figures import NO_ENGINE, StateFigures
from server.registry.members import FORGET_S
from server.service import SteeringService

logger = logging.getLogger("vllm.expertsteer")


_ENGINE_TIMEOUT_S = 5.0


class Scraper:
    """Makes one scrape at a time: anybody may ask for one, and the engine answers between two of its steps."""

    def __init__(self, service: SteeringService) -> None:
        """Take what is scraped."""
        self._service = service
        self._running: asyncio.Task[list[Metric]] | None = None

    async def scrape(self) -> list[Metric]:
        """Every steering series of this server. Who asks while a scrape runs gets the next one, with all who wait.

        Raises:
            RegistryError: the registry cannot be read or written.
        """
        before = self._running
        if before is not None and not before.done():
            await asyncio.wait([before])
        if self._running is before:
            self._running = asyncio.create_task(_scrape(self._service))
        assert self._running is not None
        return await asyncio.shield(self._running)


async def _scrape(service: SteeringService) -> list[Metric]:
    """Every steering series of this server, whichever of its processes is asked.

    An engine that does not answer in time gives no figures, as one that has died: so the scrape says so before
    Prometheus gives up on it. This process publishes its own counters first, so that the next scrape, of another
    process, sees no less.
    """
    try:
        async with asyncio.timeout(_ENGINE_TIMEOUT_S):
            await service.metrics.receipts.reconcile(service.engine.ended)
            engine = await service.engine.counters()
    except (SteeringEngineError, TimeoutError) as error:
        logger.warning("The engine gives no figures: %s", str(error) or f"no answer in {_ENGINE_TIMEOUT_S:g} s")
        engine = NO_ENGINE
    await service.reconciler.publish()
    registry = service.registry
    # A process that has been silent for a while still counts: it may come back, and sums must not shrink.
    known = [
        row for row in await asyncio.to_thread(registry.members.list, FORGET_S) if row.instance == service.instance
    ]
    live = {row.member for row in await asyncio.to_thread(registry.members.list)}
    rows = [row for row in known if row.member in live]
    snapshot = await asyncio.to_thread(registry.snapshot)
    state = StateFigures(
        generation_desired=snapshot.generation,
        generation_observed=min((row.observed for row in rows), default=0),
        num_members=len(rows),
        num_profiles=len(snapshot.profiles),
        num_bundles=len(snapshot.bundles),
        has_passed_self_test=service.reconciler.has_passed_self_test,
        is_ready=service.is_ready,
        is_declaration_applied=service.convergence is None or service.convergence.is_applied,
        last_change_at_s=await asyncio.to_thread(registry.last_change_at_s),
        bytes_per_row=service.bytes_per_row,
        build=service.build,
    )
    members = [json.loads(row.counters) for row in known if row.counters is not None]
    return service.metrics.families(members, engine, state)

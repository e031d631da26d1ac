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


async def scrape(service: SteeringService) -> list[Metric]:
    """Every steering series of this server, whichever of its processes is asked.

    This process publishes its own counters first, so that the next scrape, of another process, sees no less.
    """
    try:
        await service.metrics.receipts.reconcile(service.engine.ended)
        engine = await service.engine.counters()
    except SteeringEngineError as error:
        logger.warning("The engine gives no figures: %s", error)
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

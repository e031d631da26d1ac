"""One API process without HTTP: real registry, reconciler and operations; the engine is a set of keys in memory."""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts.verify import ServedModel
from server.auth.audit import AuditLog
from server.auth.keys import ANONYMOUS
from server.bundle_operations import BundleOperations
from server.engine.client import SteeringEngineError
from server.errors import SteeringRequestError
from server.metrics.metrics import SteeringMetrics
from server.operation import OperationRecorder
from server.outcomes import ProfileSpec
from server.pins import Pins
from server.profile_operations import ProfileOperations
from server.programs import Programs
from server.reconciler import Reconciler
from server.registry.registry import Registry
from server.rollout import Rollout
from server.schema import ProfileRef
from server.sources.remote import RemoteSources
from server.sources.root import BundleRoot
from server.sources.signature import SignaturePolicy

SERVED = ServedModel(id="tiny", architecture="LlamaForCausalLM", hidden_size=4, num_layers=6, fingerprint=None)


class Engine:
    """Holds what it is told to, and fails when it is told to."""

    def __init__(self) -> None:
        self.resident: set[str] = set()
        self.busy: Counter[str] = Counter()
        self.load_error: SteeringEngineError | None = None
        self.unload_error: SteeringEngineError | None = None
        self.calls: Counter[str] = Counter()

    async def load(self, key: str, _program: Any) -> list[dict[str, Any]]:
        self.calls["load"] += 1
        if self.load_error is not None:
            raise self.load_error
        self.resident.add(key)
        return [{"replica": 0, "rank": 0, "checksum": key}]

    async def unload(self, key: str) -> bool:
        self.calls["unload"] += 1
        if self.unload_error is not None:
            raise self.unload_error
        if self.busy[key]:
            return False
        self.resident.discard(key)
        return True

    async def users(self) -> Counter[str]:
        return self.busy

    async def holds(self) -> set[str]:
        return set(self.resident)

    async def ended(self, _ids: Any) -> dict[str, Any]:
        self.calls["ended"] += 1
        return {}


class Node:
    """One API process."""

    def __init__(
        self,
        directory: Path,
        lock: Path,
        instance: str,
        engine: Engine,
        spans: tuple[str, ...],
        root: Path | None = None,
    ) -> None:
        self.engine: Any = engine
        self.registry = Registry.open(directory)
        self.pins, metrics = Pins(), SteeringMetrics()
        programs = Programs(self.registry.store, SERVED, "enforce", dict)
        self.reconciler = Reconciler(
            self.registry,
            self.engine,
            programs,
            self.pins,
            instance=instance,
            lock=lock,
            member=self.registry.members.join(instance, os.getpid()),
            keep_versions=1,
            spans=spans,
            metrics=metrics,
        )
        self.reconciler.has_passed_self_test = True
        rollout = Rollout(self.registry, self.reconciler)
        recorder = OperationRecorder(metrics, AuditLog(directory / "audit.jsonl"))
        self.profiles = ProfileOperations(self.registry, self.reconciler, rollout, recorder, spans=spans)
        self.bundles = BundleOperations(
            self.registry,
            self.reconciler,
            rollout,
            programs,
            recorder,
            spans=spans,
            signatures=SignaturePolicy("off"),
            root=None if root is None else BundleRoot(root),
            remote=RemoteSources([]),
            max_bundle_bytes=1 << 20,
        )

    async def add(self, path: Path) -> str:
        """Upload a bundle; its digest."""

        async def chunks() -> AsyncIterator[bytes]:
            yield path.read_bytes()

        outcome = await self.bundles.upload(chunks(), actor="ops", source="test")
        return outcome.record.digest

    async def put(self, name: str, digest: str, **fields: Any) -> int:
        outcome = await self.profiles.put(name, ProfileSpec(digest, **fields), actor="ops")
        return outcome.version.generation

    def resolve(self, name: str) -> list[str]:
        return self.reconciler.table.resolve([ProfileRef(name=name)], ANONYMOUS).keys


async def refused(call: Any) -> SteeringRequestError:
    with pytest.raises(SteeringRequestError) as caught:
        await call
    return caught.value


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.02)

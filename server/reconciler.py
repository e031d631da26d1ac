"""Keeps one API process, and the engine that it shares with others of its kind, in step with the registry."""

import asyncio
import json
import logging
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from artifacts.errors import BundleError
from server.engine.client import SteeringEngine, SteeringEngineError
from server.engine.steering import SPAN_NAMES
from server.metrics.metrics import SteeringMetrics
from server.pins import Pins
from server.profiles import Profile, ProfileTable
from server.programs import Programs
from server.registry.desired import LIVE_S
from server.registry.errors import RegistryError
from server.registry.lock import InstanceLock
from server.registry.records import Snapshot
from server.registry.registry import DEFAULT_HISTORY, Registry

logger = logging.getLogger("vllm.expertsteer")

# How soon a change that another process made is seen: mostly, and at the latest.
_POLL_S = 0.01
_ASK_S = 0.2
_BEAT_S = 1.0
# Between two attempts at what could not be finished.
_AGAIN_S = 0.1
_CHECK_TIMEOUT_S = 5.0
_RETRY_S = 5.0
_LOCK_TIMEOUT_S = 60.0
_WAIT_STEP_S = 0.01

MemberState = Literal["starting", "ready", "draining"]


class _View(NamedTuple):
    """What a process has seen of the registry: which programs requests may refer to, and which are to be loaded."""

    seen: tuple[int, int]
    snapshot: Snapshot
    needed: frozenset[str]
    wanted: frozenset[str]

    @property
    def facts(self) -> tuple[int, frozenset[str]]:
        return _facts(self.snapshot)


class _Said(NamedTuple):
    """What a process has told the others about itself."""

    observed: int
    pins: frozenset[str]
    state: MemberState
    problem: str | None


class StagingError(RuntimeError):
    """The engine does not hold a program that it was to hold.

    Attributes:
        code: of `SteeringEngineError`, or "damaged" when the registry could not give the program.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Reconciler:
    """Follows the registry: stages what is wanted, then shows it to requests; frees what nobody wants or uses.

    Every API process of an instance runs one. What they do to the engine they share is serialised by the instance's
    lock, and what each has seen stands in the registry, so that no program is unloaded that a process can still use.

    Attributes:
        table: the profiles that requests may name; replaced as a whole.
        instance: id of the server that this process belongs to.
        member: id of this process in the registry.
        state: of this process.
        problem: why the registry's state is not shown to requests; None when it is.
        has_passed_self_test: whether steering was proved to work at the start.
    """

    def __init__(
        self,
        registry: Registry,
        engine: SteeringEngine,
        programs: Programs,
        pins: Pins,
        *,
        instance: str,
        lock: Path,
        member: str,
        keep_versions: int,
        spans: Collection[str],
        metrics: SteeringMetrics,
    ) -> None:
        """Take what is needed; `start` begins.

        Args:
            registry: the desired state.
            engine: the engine of this instance.
            programs: makes programs of bundles.
            pins: programs that requests of this process rely on.
            instance: id of the server that this process belongs to.
            lock: file for the lock of this instance's processes.
            member: id of this process in the registry.
            keep_versions: previous versions of each profile that stay loaded.
            spans: names of the spans whose delimiters the engine knows.
            metrics: of this process: told which profiles there are, and given to the other processes.
        """
        self.table = ProfileTable({})
        self.instance = instance
        self.member = member
        self.state: MemberState = "starting"
        self.problem: str | None = None
        self.has_passed_self_test = False
        self._registry = registry
        self._engine = engine
        self._programs = programs
        self._pins = pins
        self._keep = keep_versions
        # The admin API's, where that is enough: what the registry has put together once serves both.
        self._history = max(DEFAULT_HISTORY, keep_versions + 1)
        self._spans = frozenset(spans)
        self._metrics = metrics
        self._lock = InstanceLock(lock, _LOCK_TIMEOUT_S)
        self._round = asyncio.Lock()
        self._publishing = asyncio.Lock()
        self._view: _View | None = None
        self._shown: tuple[Snapshot, frozenset[str]] | None = None
        self._is_unfinished = False
        # By key of a program that could not be loaded: when to try again, and why.
        self._failed: dict[str, tuple[float, str]] = {}
        self._again_at = 0.0
        self._looked_at = 0.0
        self._published: _Said | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def generation_observed(self) -> int:
        """Generation that requests see."""
        return self.table.generation

    @property
    def generation_desired(self) -> int:
        """Generation of the registry, as it was seen last."""
        return self._view.snapshot.generation if self._view is not None else 0

    @property
    def wanted(self) -> frozenset[str]:
        """Program keys that the registry, or a change in progress, wants loaded, as it was seen last."""
        return self._view.wanted if self._view is not None else frozenset()

    @property
    def is_ready(self) -> bool:
        """Whether requests see the registry's state, and steering was proved to work."""
        is_current = self.problem is None and self.generation_observed == self.generation_desired
        is_fresh = time.monotonic() < self._looked_at + LIVE_S
        return self.state == "ready" and is_current and is_fresh and self.has_passed_self_test

    async def start(self) -> None:
        """Make the engine hold everything that the registry wants, then follow it.

        Raises:
            StagingError: a current profile cannot be served.
        """
        self._tasks.append(asyncio.create_task(self._live()))
        await self.refresh()
        if self.problem is not None:
            raise StagingError(self.problem, "failed")
        self.state = "ready"
        await self.publish()
        self._tasks.append(asyncio.create_task(self._follow()))

    async def wait_for_peer(self, timeout_s: float) -> None:
        """Wait until another process of this instance is ready: it has tested and loaded what all of them share.

        Raises:
            StagingError: none is in time.
        """
        deadline = time.monotonic() + timeout_s
        while not any(
            row.instance == self.instance and row.state == "ready"
            for row in await asyncio.to_thread(self._registry.members.list)
        ):
            if time.monotonic() > deadline:
                raise StagingError(f"No other process of this server became ready in {timeout_s:g} s.", "failed")
            await self.publish()
            await asyncio.sleep(_BEAT_S)

    async def drain(self) -> None:
        """Say that this process takes no more requests."""
        self.state = "draining"
        await self.publish()

    async def stop(self) -> None:
        """Stop following and leave the registry."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._registry.members.leave, self.member)

    async def refresh(self, *, is_forced: bool = False) -> None:
        """Look at the registry now, and act on what has changed.

        Args:
            is_forced: look closely, because this process has changed something itself.

        Raises:
            RegistryError: it cannot be read.
            SteeringEngineError: the engine does not do what is asked of it.
        """
        async with self._round:
            before = self._view
            # One call for all that is to be read: on a busy machine each costs more than what it does.
            view = self._view = await asyncio.to_thread(self._look, is_forced)
            # Others say every second that they are alive, and that is no reason to act.
            is_new = before is None or view.facts != before.facts
            is_unfinished = self.problem is not None or self._is_unfinished
            if is_new or (is_unfinished and time.monotonic() >= self._again_at):
                await self._act(view)
                self._again_at = time.monotonic() + _AGAIN_S
            self._looked_at = time.monotonic()

    def _look(self, is_forced: bool) -> _View:
        view, seen = self._view, self._registry.changed()
        if view is not None and not is_forced and seen == view.seen:
            return view
        snapshot = self._registry.snapshot(self._history)
        if view is not None and _facts(snapshot) == view.facts:
            return view._replace(seen=seen)
        return _View(seen, snapshot, frozenset(snapshot.keys_needed()), frozenset(snapshot.keys_wanted(self._keep)))

    async def stage(self, key: str) -> None:
        """Make every rank of this instance's engine hold a program.

        Raises:
            StagingError: it cannot; nothing has changed.
            RegistryError: the engine's state could not be noted.
        """
        async with self._lock:
            if key in await asyncio.to_thread(self._registry.members.holdings, self.instance):
                return
            try:
                await self._load(key)
            except SteeringEngineError as error:
                raise StagingError(str(error), error.code) from error
            except (RegistryError, BundleError, ValueError) as error:
                raise StagingError(f"{key}: {error}", "damaged") from error

    async def is_held(self, key: str) -> bool:
        """Whether every rank of this instance's engine holds a program."""
        return key in await asyncio.to_thread(self._registry.members.holdings, self.instance)

    async def wait_observed(self, generation: int, timeout_s: float) -> bool:
        """Wait until every live process shows a generation to its requests; False when some do not in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            members = await asyncio.to_thread(self._registry.members.list)
            if all(row.observed >= generation for row in members if row.state != "starting"):
                return True
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_WAIT_STEP_S)

    async def wait_staged(self, key: str, timeout_s: float) -> list[str]:
        """Wait until every live instance holds a program; returns those that do not in time."""
        deadline = time.monotonic() + timeout_s
        while lacking := await asyncio.to_thread(self._registry.members.instances_without, key):
            if time.monotonic() > deadline:
                return list(lacking)
            await asyncio.sleep(_WAIT_STEP_S)
        return []

    async def publish(self, *, with_metrics: bool = True) -> None:
        """Tell the others what this process shows, what its requests use that may go, and its metrics."""
        # One after the other: what an earlier call has counted must not replace what a later one has published.
        async with self._publishing:
            said = self._said()
            is_known = await asyncio.to_thread(
                self._registry.members.beat,
                self.member,
                observed=said.observed,
                pins=said.pins,
                state=said.state,
                problem=said.problem,
                counters=json.dumps(self._metrics.snapshot()) if with_metrics else None,
            )
            self._published = said
        if not is_known:
            # This process stood still for so long that the others forgot it, and what its engine holds.
            async with self._lock:
                for key in await self._engine.holds():
                    try:
                        await self._load(key)
                    except (RegistryError, BundleError, ValueError) as error:
                        # Its bundle was deleted meanwhile, say; what is not noted would stay for ever.
                        logger.warning("%s is not held any more: %s", key, error)
                        await self._engine.unload(key)

    def _said(self) -> _Said:
        # Not what is only intended: an intent may be taken back at any moment.
        needed = self._view.needed if self._view is not None else frozenset()
        return _Said(self.table.generation, self._pins.keys - needed, self.state, self.problem)

    async def _load(self, key: str) -> None:
        """Make the engine hold a program, which costs little where it does, and note it. Under the instance's lock."""
        acknowledged = await self._engine.load(key, await self._programs.load(key))
        try:
            await asyncio.to_thread(self._registry.members.hold, self.instance, key, acknowledged[0]["checksum"])
        except RegistryError:
            # What is not noted would stay for ever.
            await self._engine.unload(key)
            raise

    async def _follow(self) -> None:
        written: tuple[int, ...] = ()
        asked_at = 0.0
        while True:
            await asyncio.sleep(_POLL_S)
            seen, now = self._registry.written(), time.monotonic()
            if seen == written and now < asked_at + _ASK_S:
                continue
            written, asked_at = seen, now
            try:
                await self.refresh()
            except Exception as error:  # noqa: BLE001 - whatever it was, the next round may succeed, and requests go on
                self.problem = f"The registry cannot be followed: {error}"
                logger.warning("%s", self.problem)
                await asyncio.sleep(_BEAT_S)

    async def _live(self) -> None:
        """Say regularly that this process is alive, whatever the engine does meanwhile; and check receipts."""
        while True:
            await asyncio.sleep(_BEAT_S)
            try:
                await self.publish()
                async with asyncio.timeout(_CHECK_TIMEOUT_S):
                    await self._metrics.receipts.reconcile(self._engine.ended)
            except Exception as error:  # noqa: BLE001 - as above
                logger.warning("Cannot tell the other processes of this one: %s", error)

    async def _act(self, view: _View) -> None:
        snapshot, needed, wanted = view.snapshot, view.needed, view.wanted
        holdings = set(await asyncio.to_thread(self._registry.members.holdings, self.instance))
        problem = None
        self._is_unfinished = False
        # The needed ones first: where the pool is small, a version kept for later must not take their place.
        for key in [*sorted(needed - holdings), *sorted(wanted - needed - holdings)]:
            failure = await self._try_stage(key)
            if failure is None:
                holdings.add(key)
                continue
            self._is_unfinished = True
            if key in needed:
                problem = failure
        problem = problem or self._unservable(snapshot)
        if problem is None:
            self._show(snapshot, holdings)
        elif problem != self.problem:
            logger.error("Generation %d of the registry is not served: %s", snapshot.generation, problem)
        self.problem = problem
        if self._said() != self._published:
            await self.publish(with_metrics=False)
        await self._unload(holdings - wanted)

    async def _try_stage(self, key: str) -> str | None:
        """Stage a program; None, or what was in the way. What failed is not tried again at once."""
        retry_at, reason = self._failed.get(key, (0.0, ""))
        if time.monotonic() < retry_at:
            return reason
        try:
            await self.stage(key)
        except (StagingError, RegistryError) as error:
            if reason != str(error):
                logger.warning("Cannot load %s: %s", key, error)
            self._failed[key] = (time.monotonic() + _RETRY_S, str(error))
            return str(error)
        self._failed.pop(key, None)
        return None

    def _show(self, snapshot: Snapshot, holdings: Collection[str]) -> None:
        """Let requests see a state. The only place where they begin to."""
        before, self._shown = self._shown, (snapshot, frozenset(holdings))
        is_same = before is not None and before[0].bundles is snapshot.bundles and before[1] == self._shown[1]
        shown: dict[str, Sequence[Profile]] = {}
        for name, kept in snapshot.profiles.items():
            # With a thousand profiles, making all of them anew would hold up the event loop at every change of one.
            if is_same and before is not None and before[0].profiles.get(name) is kept:
                shown[name] = self.table.versions(name)
            else:
                shown[name] = [
                    Profile(name, record.manifest, version.settings, version.generation)
                    for version in kept[: self._keep + 1]
                    if version.settings is not None
                    and version.settings.key in holdings
                    and (record := snapshot.bundles.get(version.settings.bundle)) is not None
                    and not record.is_draining
                    and self._spans.issuperset(spans_of(version.settings.exclude))
                ]
        self.table = ProfileTable(shown, snapshot.generation)
        self._metrics.register(list(shown))

    def _unservable(self, snapshot: Snapshot) -> str | None:
        """Why this server cannot serve a current version that an offline command has made; None when there is none."""
        for name, (version, *_) in snapshot.profiles.items():
            unknown = set(spans_of(version.settings.exclude)) - self._spans if version.settings is not None else None
            if unknown:
                return f"Profile {name!r} leaves {', '.join(unknown)} unsteered; start with --steering-span for it."
        return None

    async def _unload(self, surplus: Collection[str]) -> None:
        """Free programs that nobody wants, unless a request of some process still uses them."""
        members = self._registry.members
        users = await self._engine.users() if surplus else {}
        for key in sorted(surplus):
            if users.get(key):
                self._is_unfinished = True
                continue
            async with self._lock:
                checksum = (await asyncio.to_thread(members.holdings, self.instance)).get(key)
                if checksum is None:
                    continue
                if not await asyncio.to_thread(members.may_unload, self.instance, key, self._keep):
                    self._is_unfinished = True
                    continue
                is_free = False
                try:
                    is_free = await self._engine.unload(key)
                finally:
                    if not is_free:
                        # Failed, or a request came to use it: it is still there, and tried again later.
                        self._is_unfinished = True
                        await asyncio.shield(asyncio.to_thread(members.hold, self.instance, key, checksum))


def spans_of(exclude: Iterable[str]) -> list[str]:
    """Those of a profile's excluded spans whose delimiters the engine must know."""
    return [name for name in exclude if name in SPAN_NAMES]


def _facts(snapshot: Snapshot) -> tuple[int, frozenset[str]]:
    return snapshot.generation, snapshot.intents

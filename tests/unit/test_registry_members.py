"""Running processes on one registry: who lives, what is held, what may be unloaded."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from artifacts.manifest import Scope
from server.registry.desired import LIVE_S
from server.registry.errors import RegistryError, RegistryErrorCode
from server.registry.lock import InstanceLock
from server.registry.members import FORGET_S
from server.registry.offline import OfflineChanges
from server.registry.records import ProfileSettings
from server.registry.registry import Registry

KEEP = 1


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Iterator[Registry]:
    opened = Registry.open(tmp_path / "registry", clock=clock)
    yield opened
    opened.close()


@pytest.fixture
def digests(registry: Registry, make_bundle: Callable[..., Path]) -> list[str]:
    changes = OfflineChanges(registry, 0.0, print)
    return [changes.add(make_bundle(f"member-{seed}", [1], seed))[0].digest for seed in range(3)]


def join(registry: Registry, instance: str, **changes: Any) -> str:
    member = registry.members.join(instance, 7)
    beat(registry, member, **changes)
    return member


def beat(registry: Registry, member: str, **changes: Any) -> bool:
    return registry.members.beat(member, **{"observed": registry.generation(), "pins": (), "state": "ready"} | changes)


def put(registry: Registry, digest: str) -> None:
    registry.put_profile("calm", ProfileSettings(digest, 1.0, 4.0, Scope.ALL), actor="tester")


def test_members_describe_themselves(registry: Registry, clock: Clock) -> None:
    member = registry.members.join("one", 7)
    (row,) = registry.members.list()
    assert (row.instance, row.pid, row.state, row.observed, row.pins) == ("one", 7, "starting", 0, frozenset())
    clock.now += 1
    assert beat(registry, member, observed=5, pins={"a", "b"}, problem="slow", counters='{"x": 1}')
    (row,) = registry.members.list()
    assert (row.state, row.observed, row.pins) == ("ready", 5, frozenset({"a", "b"}))
    assert (row.problem, row.counters, row.heartbeat, row.pid) == ("slow", '{"x": 1}', clock.now, 7)
    registry.members.leave(member)
    assert registry.members.list() == []


def test_silent_members_are_not_live_and_then_forgotten(registry: Registry, clock: Clock) -> None:
    silent = join(registry, "one")
    registry.members.hold("one", "key", "checksum")
    registry.members.intend(silent, "key")
    clock.now += LIVE_S + 0.1
    other = join(registry, "two")
    assert [row.member for row in registry.members.list()] == [other]
    assert registry.members.instances_without("key") == ["two"]
    assert registry.members.held() == frozenset()
    assert registry.members.holdings("one") == {"key": "checksum"}
    assert registry.snapshot().intents == frozenset(), "what a dead process wanted is loaded for nobody"
    clock.now += FORGET_S
    beat(registry, other)
    registry.members.forget_dead()
    assert registry.members.holdings("one") == {}
    assert registry.snapshot().intents == frozenset()
    with pytest.raises(RegistryError, match="is not entered"):
        registry.members.intend(silent, "key")
    assert beat(registry, silent) is False
    assert beat(registry, silent) is True
    assert {row.member for row in registry.members.list()} == {silent, other}


def test_holdings_go_with_the_last_member(registry: Registry) -> None:
    first, second = join(registry, "one"), join(registry, "one")
    registry.members.hold("one", "key", "checksum")
    registry.members.leave(first)
    assert registry.members.holdings("one") == {"key": "checksum"}
    registry.members.leave(second)
    assert registry.members.holdings("one") == {}


def test_instances_without(registry: Registry) -> None:
    one, two = join(registry, "one"), join(registry, "two", state="starting")
    assert registry.members.instances_without("key") == ["one"]
    registry.members.hold("one", "key", "checksum")
    assert registry.members.instances_without("key") == []
    beat(registry, two)
    assert registry.members.instances_without("key") == ["two"]
    registry.members.hold("two", "key", "other checksum")
    assert registry.members.instances_without("key") == ["one", "two"]
    registry.members.hold("two", "key", "checksum")
    assert registry.members.instances_without("key") == []
    registry.members.release("one", "key")
    assert registry.members.instances_without("key") == ["one"]
    beat(registry, one, state="draining")
    assert registry.members.instances_without("key") == []


def test_intents(registry: Registry, digests: list[str]) -> None:
    put(registry, digests[0])
    first, second = join(registry, "one"), join(registry, "one")
    key = f"{digests[0]}+1"
    for member in (first, second, first):
        registry.members.intend(member, key)
    registry.members.forget_intent(first, key)
    assert key in registry.snapshot().keys_wanted(KEEP)
    registry.members.leave(second)
    assert key not in registry.snapshot().keys_wanted(KEEP)


def test_may_unload(registry: Registry, digests: list[str], clock: Clock) -> None:
    first, second, third = digests
    member, peer, elsewhere = join(registry, "one"), join(registry, "one"), join(registry, "two")
    for instance in ("one", "two"):
        for digest in digests:
            registry.members.hold(instance, digest, f"checksum of {digest}")

    def may_unload() -> bool:
        return registry.members.may_unload("one", first, KEEP)

    put(registry, first)
    assert not may_unload(), "current"
    put(registry, second)
    assert not may_unload(), "kept for a rollback"
    put(registry, third)
    assert not may_unload(), "no process has seen the change"
    beat(registry, member)
    assert not may_unload(), "one process has not seen the change"
    beat(registry, peer, pins={first})
    assert not may_unload(), "a request uses it"
    beat(registry, peer)
    registry.members.intend(elsewhere, first)
    assert not may_unload(), "a change is about to name it"
    registry.members.forget_intent(elsewhere, first)
    assert first in registry.members.holdings("one")
    assert may_unload()
    assert registry.members.holdings("one").keys() == {second, third}
    assert first in registry.members.holdings("two")
    assert not registry.members.may_unload("one", second, KEEP), "wanted, though nobody uses it"


def test_a_dead_process_pins_nothing(registry: Registry, digests: list[str], clock: Clock) -> None:
    first = digests[0]
    for digest in digests:
        put(registry, digest)
    member = join(registry, "one")
    join(registry, "one", observed=0, pins={first})
    assert not registry.members.may_unload("one", first, KEEP)
    clock.now += LIVE_S + 0.1
    beat(registry, member)
    assert registry.members.may_unload("one", first, KEEP)


async def test_the_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    inside, most = 0, 0

    async def work(lock: InstanceLock) -> None:
        nonlocal inside, most
        async with lock:
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.001)
            inside -= 1

    path = tmp_path / "locks" / "one.lock"
    one, two = InstanceLock(path, 10), InstanceLock(path, 10)
    await asyncio.gather(*(work(lock) for lock in (one, two) * 10))
    assert most == 1


async def test_the_lock_gives_up(tmp_path: Path) -> None:
    path = tmp_path / "one.lock"
    held, other = InstanceLock(path, 0.05), InstanceLock(path, 0.05)
    async with held:
        for lock in (held, other):
            with pytest.raises(RegistryError) as error:
                async with lock:
                    pytest.fail("two hold the lock")
            assert error.value.code is RegistryErrorCode.LOCKED
        waiting = asyncio.create_task(other.__aenter__())
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(60), other:
        pass

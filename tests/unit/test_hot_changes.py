"""Changes through the real registry, reconciler and operations; only the engine is a set of keys in memory."""

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from one_process import Engine, eventually, refused

from artifacts.bundle import load_bundle
from server import reconciler
from server.auth.audit import REQUEST_ID
from server.engine.client import EngineErrorCode, SteeringEngineError
from server.errors import ErrorCode, SteeringRequestError
from server.outcomes import ProfileSpec
from server.registry.errors import RegistryError, RegistryErrorCode
from server.registry.registry import Registry


async def test_add_switch_rollback_delete(start_process: Any, bundle_file: Any) -> None:
    async with start_process() as node:
        first, second = await node.add(bundle_file("one")), await node.add(bundle_file("two", 2))
        await node.put("p", first)
        generation = await node.put("p", second)
        assert node.resolve("p") == [second]
        assert node.resolve(f"p@{first}") == [first], "the version before stays loaded"
        assert await node.put("p", second) == generation, "nothing to change"
        await node.profiles.rollback("p", actor="ops")
        assert node.resolve("p") == [first]
        assert (await refused(node.bundles.delete(first, actor="ops", drain=False, timeout_s=1))).code == (
            ErrorCode.BUNDLE_IN_USE
        )
        await node.profiles.delete("p", actor="ops")
        for digest in (first, second):
            await node.bundles.delete(digest, actor="ops", drain=False, timeout_s=1)
        assert node.engine.resident == set()
        assert list((node.registry.directory / "bundles").iterdir()) == []
        assert node.reconciler.is_ready


async def test_versions_beyond_those_that_stay_loaded_are_not_offered(start_process: Any, bundle_file: Any) -> None:
    async with start_process() as node:
        digests = [await node.add(bundle_file(f"b{index}", index)) for index in range(3)]
        for digest in digests:
            await node.put("p", digest)
        assert node.engine.resident == set(digests[1:])
        with pytest.raises(SteeringRequestError) as caught:
            node.resolve(f"p@{digests[0]}")
        assert caught.value.code == ErrorCode.PROFILE_NOT_FOUND
        await node.profiles.rollback("p", actor="ops", to=node.registry.history("p")[-1].generation)
        assert node.resolve("p") == [digests[0]], "and comes back when it is needed"


async def test_a_bundle_that_is_added_anew_is_loaded(start_process: Any, bundle_file: Any) -> None:
    """Also where a profile that is gone had named it before."""
    async with start_process() as node:
        path = bundle_file("one")
        digest = await node.add(path)
        await node.put("p", digest)
        await node.profiles.delete("p", actor="ops")
        await node.bundles.delete(digest, actor="ops", drain=False, timeout_s=1)
        await node.add(path)
        assert node.engine.resident == {digest}
        await node.bundles.delete(digest, actor="ops", drain=False, timeout_s=1)


async def test_a_running_request_keeps_its_bundle(start_process: Any, bundle_file: Any) -> None:
    async with start_process() as node:
        digest = await node.add(bundle_file("one"))
        await node.put("p", digest)
        pin = node.pins.hold([digest])
        await node.profiles.delete("p", actor="ops")
        error = await refused(node.bundles.delete(digest, actor="ops", drain=False, timeout_s=0))
        assert error.code == ErrorCode.BUNDLE_IN_USE
        assert digest in node.engine.resident
        assert not node.registry.snapshot().bundles[digest].is_draining, "as it was before"
        draining = asyncio.create_task(node.bundles.delete(digest, actor="ops", drain=True, timeout_s=10))
        await asyncio.sleep(0.3)
        assert not draining.done()
        pin.release()
        await draining
        assert node.engine.resident == set()


async def test_what_only_the_engine_knows_to_be_in_use(start_process: Any, bundle_file: Any) -> None:
    async with start_process() as node:
        digest = await node.add(bundle_file("one"))
        await node.put("p", digest)
        node.engine.busy[digest] = 1
        await node.profiles.delete("p", actor="ops")
        await asyncio.sleep(0.5)
        assert digest in node.engine.resident
        assert node.engine.calls["unload"] == 0, "it is asked first"
        node.engine.busy.clear()
        await eventually(lambda: digest not in node.engine.resident)


async def test_an_engine_that_fails_to_unload(start_process: Any, bundle_file: Any) -> None:
    async with start_process() as node:
        first, second = await node.add(bundle_file("one")), await node.add(bundle_file("two", 2))
        await node.put("p", first)
        await node.put("p", second)
        node.engine.unload_error = SteeringEngineError("no answer")
        third = await node.add(bundle_file("three", 3))
        generation = await node.put("p", third)
        assert node.registry.snapshot().current("p").generation == generation, "committed, so it is acknowledged"
        node.engine.unload_error = None
        await eventually(lambda: first not in node.engine.resident)
        await eventually(lambda: node.reconciler.is_ready)
        assert node.resolve("p") == [third]


async def test_a_full_pool_changes_nothing(start_process: Any, bundle_file: Any) -> None:
    async with start_process() as node:
        first = await node.add(bundle_file("one"))
        await node.put("p", first)
        generation = node.registry.generation()
        node.engine.load_error = SteeringEngineError("full", EngineErrorCode.NO_ROOM)
        error = await refused(node.add(bundle_file("two", 2)))
        assert (error.code, error.status) == (ErrorCode.CAPACITY, 409)
        error = await refused(node.profiles.put("q", ProfileSpec(first, layers=(2,)), actor="ops"))
        assert error.code == ErrorCode.REQUEST_INVALID
        assert node.registry.generation() == generation
        assert node.engine.resident == {first}
        assert len(list((node.registry.directory / "bundles").iterdir())) == 1
        assert list((node.registry.directory / "incoming").iterdir()) == []


async def test_adding_again_repairs_a_damaged_file(start_process: Any, bundle_file: Any) -> None:
    async with start_process() as node:
        path = bundle_file("one", 1, 2)
        digest = await node.add(path)
        stored = node.registry.store.path(digest)
        stored.chmod(0o600)
        stored.write_bytes(b"damaged")
        error = await refused(node.profiles.put("p", ProfileSpec(digest, layers=(2,)), actor="ops"))
        assert error.code == ErrorCode.NOT_STAGED
        generation = node.registry.generation()
        assert await node.add(path) == digest
        assert node.registry.generation() == generation
        assert load_bundle(stored).digest == digest
        await node.put("p", digest, layers=(2,))
        assert node.resolve("p") == [f"{digest}+2"]


async def test_spans_that_the_engine_does_not_know(start_process: Any, bundle_file: Any) -> None:
    engine = Engine()
    async with start_process(engine=engine, spans=("reasoning",)) as node:
        digest = await node.add(bundle_file("one"))
        await node.put("p", digest, exclude=("reasoning",))
        await node.put("p", digest, exclude=())
    async with start_process(engine=engine) as node:
        error = await refused(node.profiles.rollback("p", actor="ops"))
        assert error.code == ErrorCode.UNSUPPORTED
        assert node.registry.snapshot().current("p").settings.exclude == ()
        assert node.reconciler.is_ready


async def test_two_processes_of_one_server(start_process: Any, bundle_file: Any) -> None:
    engine = Engine()
    async with start_process(engine=engine) as one, start_process(engine=engine) as two:
        digest = await one.add(bundle_file("one"))
        await one.put("p", digest)
        assert two.resolve("p") == [digest], "acknowledged means: every process shows it"
        pin = two.pins.hold([digest])
        await one.profiles.delete("p", actor="ops")
        with pytest.raises(SteeringRequestError):
            two.resolve("p")
        assert (await refused(one.bundles.delete(digest, actor="ops", drain=False, timeout_s=0))).code == (
            ErrorCode.BUNDLE_IN_USE
        )
        pin.release()
        await two.bundles.delete(digest, actor="ops", drain=True, timeout_s=5)
        assert engine.resident == set()


async def test_idle_processes_leave_each_other_alone(start_process: Any, bundle_file: Any) -> None:
    engine = Engine()
    async with start_process(engine=engine) as one, start_process(engine=engine) as two:
        await one.put("p", await one.add(bundle_file("one")))
        beats = Counter[str]()
        for name, node in (("one", one), ("two", two)):
            beat = node.registry.members.beat

            def counted(*args: Any, _name: str = name, _beat: Any = beat, **kwargs: Any) -> Any:
                beats[_name] += 1
                return _beat(*args, **kwargs)

            node.registry.members.beat = counted
        started_s = time.monotonic()
        await asyncio.sleep(3)
        await eventually(lambda: beats["one"] > 0 and beats["two"] > 0)
        # Once a second, and not once for each beat of the other.
        most = 2 + 1.5 * (time.monotonic() - started_s)
        assert beats["one"] <= most and beats["two"] <= most
        assert engine.calls["load"] == 1


async def test_two_servers_on_one_registry(start_process: Any, bundle_file: Any) -> None:
    async with start_process("a") as one, start_process("b") as two:
        digest = await one.add(bundle_file("one"))
        await one.put("p", digest)
        assert (one.resolve("p"), two.resolve("p")) == ([digest], [digest])
        assert digest in two.engine.resident
        two.engine.load_error = SteeringEngineError("broken", EngineErrorCode.FAILED)
        generation = one.registry.generation()
        adding = asyncio.create_task(one.add(bundle_file("two", 2)))
        await asyncio.sleep(0.5)
        assert not adding.done(), "one server waits until the other has loaded it"
        assert one.registry.generation() == generation
        two.engine.load_error = None
        second = await adding
        assert second in two.engine.resident


async def test_an_intent_that_could_not_be_noted_is_none(
    start_process: Any, bundle_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start_process() as node:
        with monkeypatch.context() as patch:

            def fail(*_: Any) -> None:
                raise RegistryError(RegistryErrorCode.IO, "The disk is full.")

            patch.setattr(node.registry.members, "intend", fail)
            refusal = await refused(node.add(bundle_file("one")))
            assert (refusal.code, refusal.status) == (ErrorCode.STORAGE_FAILED, 500)
        digest = await node.add(bundle_file("one"))
        await node.bundles.delete(digest, actor="ops", drain=False, timeout_s=1)
        assert digest not in node.engine.resident
        log = (node.registry.directory / "audit.jsonl").read_text().splitlines()
        assert [json.loads(line)["outcome"] for line in log] == ["failed", "ok", "ok"]


async def test_the_reason_stays_while_nothing_is_tried(
    start_process: Any, bundle_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler, "_RETRY_S", 600.0)
    monkeypatch.setattr(reconciler, "_AGAIN_S", 0.0)
    async with start_process() as node:
        digest = await node.add(bundle_file("one"))
        await node.put("p", digest)
        await node.put("q", digest)
        node.engine.load_error = SteeringEngineError("No room for it.", EngineErrorCode.NO_ROOM)
        num_loads = node.engine.calls["load"]
        # As if it had never been loaded.
        node.registry.members.release(node.reconciler.instance, digest)
        node.registry.delete_profile("q", actor="cli")
        for _ in range(3):
            await node.reconciler.refresh(is_forced=True)
            assert "No room for it." in str(node.reconciler.problem)
        assert node.engine.calls["load"] == num_loads + 1


async def test_a_delete_that_died(start_process: Any, bundle_file: Any, tmp_path: Path) -> None:
    async with start_process() as node:
        digest = await node.add(bundle_file("one"))
        node.registry.set_draining(digest, True, actor="ops")
        node.registry.end_drains()
        assert node.registry.snapshot().bundles[digest].is_draining, "somebody lives who may be at it"
    registry = Registry.open(tmp_path / "registry")
    registry.end_drains()
    assert not registry.snapshot().bundles[digest].is_draining
    registry.close()


async def test_the_audit_log_holds_no_credentials(start_process: Any) -> None:
    async with start_process() as node:
        uri = "s3://KEY:SECRET@bucket/a.safetensors?token=SECRET"
        REQUEST_ID.set("req-1")
        await refused(node.bundles.add_from_remote(uri, f"sha256:{'0' * 64}", actor="ops"))
        text = (node.registry.directory / "audit.jsonl").read_text()
        assert json.loads(text)["target"] == "s3://bucket/a.safetensors"
        assert json.loads(text)["request_id"] == "req-1"
        assert "SECRET" not in text

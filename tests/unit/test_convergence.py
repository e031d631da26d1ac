"""Convergence of the registry on a file, through the real operations; only the engine is a set of keys in memory."""

import asyncio
import errno
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from one_process import Node, eventually, refused

from server import convergence
from server.convergence import THE_FILE, Convergence
from server.errors import ErrorCode
from server.profile_operations import DECLARATION
from server.registry.store import BundleStore

pytestmark = pytest.mark.usefixtures("quickly")


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "_POLL_S", 0.01)
    monkeypatch.setattr(convergence, "_FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(convergence, "_LAST_RETRY_S", 0.1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "bundles.yaml"


@pytest.fixture
def declare(file: Path) -> Callable[..., None]:
    """Write the file: `declare(medical={"digest": ...})`."""

    def write(prune: bool = True, **profiles: dict[str, Any]) -> None:
        # JSON is YAML.
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps({"schema": 1, "prune": prune, "profiles": profiles}))
        temporary.replace(file)

    return write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def converge(start_process: Any, file: Path, root: Path) -> Callable[..., Any]:
    """A process that follows the file."""

    @asynccontextmanager
    async def run(instance: str = "a", acts: bool = True) -> AsyncIterator[tuple[Node, Convergence]]:
        async with start_process(instance, root=root) as node:
            following = Convergence(file, node.registry, node.bundles, node.profiles, acts=acts)
            following.start()
            try:
                yield node, following
            finally:
                await following.stop()

    return run


@pytest.fixture
def place(bundle_file: Any, root: Path) -> Callable[..., tuple[str, dict[str, str]]]:
    """Put a bundle into the root; its digest, and what a declaration says of it."""

    def make(name: str, *layers: int) -> tuple[str, dict[str, str]]:
        data = bundle_file(name, *layers).read_bytes()
        (root / f"{name}.safetensors").write_bytes(data)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        return digest, {"source": f"root:{name}.safetensors", "digest": digest}

    return make


async def test_start_change_and_prune(converge: Any, declare: Any, place: Any) -> None:
    (one, of_one), (two, of_two) = place("one"), place("two", 2)
    declare(first=of_one, same=of_one | {"strength": 0.25})
    async with converge() as (node, following):
        await eventually(lambda: following.is_applied)
        assert following.applied_generation is not None
        assert node.resolve("first") == node.resolve("same") == [one]
        assert node.registry.snapshot().current("same").settings.strength == 0.25
        assert node.engine.calls["load"] == 1, "fetched and loaded once for both"
        other = await node.add(Path(node.registry.store.path(one)))
        await node.put("others", other)

        declare(first=of_two)
        await eventually(lambda: node.reconciler.table.generation and node.resolve("first") == [two])
        await eventually(lambda: following.is_applied)
        assert set(node.registry.snapshot().profiles) == {"first", "others"}, "pruned, and nobody else's"

        generation = node.registry.generation()
        declare(prune=False)
        await eventually(lambda: "first" not in node.profiles._declared)
        await asyncio.sleep(0.1)
        assert node.registry.generation() == generation, "prune: false"
        declare()
        await eventually(lambda: set(node.registry.snapshot().profiles) == {"others"})


async def test_what_is_so_already_stays_untouched(converge: Any, declare: Any, place: Any) -> None:
    _, of_one = place("one")
    declare(p=of_one)
    async with converge() as (node, following):
        await eventually(lambda: following.is_applied)
        generation = node.registry.generation()
    async with converge() as (node, following):
        await eventually(lambda: following.is_applied)
        assert node.registry.generation() == generation


async def test_declared_profiles_change_only_in_the_file(converge: Any, declare: Any, place: Any, file: Path) -> None:
    one, of_one = place("one")
    declare(p=of_one)
    async with converge() as (node, following):
        await eventually(lambda: following.is_applied)
        for call in (
            node.put("p", one, strength=0.1),
            node.profiles.rollback("p", actor="ops"),
            node.profiles.delete("p", actor="ops"),
        ):
            refusal = await refused(call)
            assert (refusal.code, refusal.status) == (ErrorCode.CONFLICT_STATE, 409)
            assert str(file) in str(refusal)
        await node.put("q", one)
        # As `expertsteer registry` does it, which knows nothing of the file.
        settings = node.registry.snapshot().current("q").settings
        node.registry.delete_profile("p", actor="cli:someone")
        await eventually(lambda: "p" in node.registry.snapshot().profiles)
        assert node.registry.snapshot().current("p").actor == DECLARATION
        assert node.registry.snapshot().current("q").settings == settings


async def test_a_source_that_comes_later(converge: Any, declare: Any, place: Any, root: Path) -> None:
    one, of_one = place("one")
    two, of_two = place("two", 2)
    hidden = root.parent / "hidden"
    (root / "two.safetensors").rename(hidden)
    declare(p=of_one, q=of_two)
    async with converge() as (node, following):
        await eventually(lambda: "q" in following.problems and "p" in node.registry.snapshot().profiles)
        assert "two.safetensors" in following.problems["q"]
        assert following.applied_generation is None
        assert node.resolve("p") == [one], "what can be served is"
        hidden.rename(root / "two.safetensors")
        await eventually(lambda: following.is_applied)
        assert node.resolve("q") == [two]


async def test_another_source_of_the_same_bundle(converge: Any, declare: Any, place: Any) -> None:
    one, of_one = place("one")
    declare(p=of_one | {"source": "root:gone.safetensors"}, q=of_one)
    async with converge() as (node, following):
        await eventually(lambda: following.is_applied)
        assert node.resolve("p") == node.resolve("q") == [one]


async def test_a_slow_source_is_in_nobodys_way(
    converge: Any, declare: Any, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, of_one = place("one")
    _, of_two = place("two", 2)
    declare(p=of_one)
    async with converge() as (node, following):
        await eventually(lambda: following.is_applied)
        add, was_cancelled = node.bundles.add_from_root, asyncio.Event()

        async def add_slowly(name: str, **fields: Any) -> Any:
            if name != "two.safetensors":
                return await add(name, **fields)
            try:
                await asyncio.Event().wait()
            finally:
                was_cancelled.set()

        monkeypatch.setattr(node.bundles, "add_from_root", add_slowly)
        declare(p=of_one | {"strength": 0.25}, q=of_two)
        await eventually(lambda: node.registry.snapshot().current("p").settings.strength == 0.25)
        assert node.registry.snapshot().current("q") is None
        declare(p=of_one)
        await eventually(lambda: following.is_applied and following.num_profiles == 1)
        assert was_cancelled.is_set()
        assert node.resolve("p") == [one]


async def test_pruning_spares_what_somebody_else_has_just_made(
    converge: Any, declare: Any, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, of_one = place("one")
    declare(p=of_one, q=of_one)
    async with converge() as (node, following):
        await eventually(lambda: following.is_applied)
        delete = node.profiles.delete

        async def delete_late(name: str, **fields: Any) -> None:
            await node.put("q", one, strength=0.125)
            await delete(name, **fields)

        monkeypatch.setattr(node.profiles, "delete", delete_late)
        declare(p=of_one)
        await eventually(lambda: following.num_profiles == 1 and following.is_applied)
        assert node.registry.snapshot().current("q").settings.strength == 0.125


async def test_wrong_digest(converge: Any, declare: Any, place: Any) -> None:
    _, of_one = place("one")
    declare(p=of_one | {"digest": f"sha256:{'0' * 64}"})
    async with converge() as (node, following):
        await eventually(lambda: "p" in following.problems and "digest" in following.problems["p"])
        assert node.registry.snapshot().bundles == {}
        assert node.engine.resident == set()


async def test_a_bundle_without_source(converge: Any, declare: Any, bundle_file: Any) -> None:
    path = bundle_file("one")
    digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    declare(p={"digest": digest})
    async with converge() as (node, following):
        await eventually(lambda: "give its source" in following.problems.get("p", ""))
        await node.add(path)
        await eventually(lambda: following.is_applied)


async def test_settings_that_the_bundle_refuses(converge: Any, declare: Any, place: Any) -> None:
    _, of_one = place("one")
    declare(p=of_one | {"maximum_strength": 500.0}, q=of_one)
    async with converge() as (node, following):
        await eventually(lambda: "maximum_strength" in following.problems.get("p", ""))
        assert set(node.registry.snapshot().profiles) == {"q"}


async def test_a_broken_file_leaves_what_there_is(converge: Any, declare: Any, place: Any, file: Path) -> None:
    one, of_one = place("one")
    declare(p=of_one)
    async with converge() as (node, following):
        await eventually(lambda: following.is_applied)
        file.write_text("profiles: [")
        await eventually(lambda: THE_FILE in following.problems)
        file.unlink()
        await eventually(lambda: "cannot be read" in following.problems[THE_FILE])
        assert following.applied_generation is not None
        assert not following.is_applied
        assert node.resolve("p") == [one]
        declare(p=of_one)
        await eventually(lambda: following.is_applied)


async def test_other_processes_watch(converge: Any, declare: Any, place: Any) -> None:
    _, of_one = place("one")
    declare(p=of_one)
    async with converge("a", acts=False) as (node, watching):
        await eventually(lambda: watching.problems.keys() == {"p"})
        assert node.registry.snapshot().bundles == {}
        assert (await refused(node.put("p", of_one["digest"]))).code == ErrorCode.CONFLICT_STATE
        async with converge("b") as (_, following):
            await eventually(lambda: following.is_applied and watching.is_applied)


async def test_a_file_that_is_broken_at_the_start(start_process: Any, file: Path) -> None:
    file.write_text("schema: 1\nprofiles: {p: {}}")
    async with start_process() as node:
        with pytest.raises(ValueError, match=r"profiles\.p\.digest"):
            Convergence(file, node.registry, node.bundles, node.profiles, acts=True)


async def test_a_full_disk_is_not_in_the_way_of_the_others(
    converge: Any, declare: Any, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one, of_one), (_, of_two) = place("one"), place("two", 2)
    declare(p=of_one, q=of_two)
    num_tries = 0
    keep = BundleStore.keep

    def fill(store: BundleStore, path: Path, digest: str) -> None:
        nonlocal num_tries
        if digest == of_two["digest"]:
            num_tries += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        keep(store, path, digest)

    monkeypatch.setattr(BundleStore, "keep", fill)
    monkeypatch.setattr(convergence, "_FIRST_RETRY_S", 100.0)
    async with converge() as (node, following):
        await eventually(lambda: following.problems.keys() == {"q"})
        assert "No space left" in following.problems["q"]
        assert node.resolve("p") == [one]
        await asyncio.sleep(0.2)
        assert num_tries == 1, "not again at once"


async def test_an_upload_is_seen_soon(
    converge: Any, declare: Any, bundle_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle_file("one")
    declare(p={"digest": f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"})
    async with converge() as (node, following):
        await eventually(lambda: "p" in following.problems)
        # As after many attempts.
        following._retry_at = float("inf")
        await node.add(path)
        await eventually(lambda: following.is_applied)


async def test_a_profile_may_be_called_file(converge: Any, declare: Any, place: Any, file: Path) -> None:
    _, of_one = place("one")
    declare(file=of_one | {"maximum_strength": 500.0})
    async with converge() as (_, following):
        await eventually(lambda: "file" in following.problems)
        file.write_text("-")
        await eventually(lambda: following.problems.keys() == {"file", THE_FILE})

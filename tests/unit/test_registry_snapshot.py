"""The snapshot that follows changes one by one equals the one that is read from nothing."""

import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from artifacts.bundle import Bundle, load_bundle
from artifacts.manifest import Scope
from server.registry.errors import RegistryError
from server.registry.records import ProfileSettings, Snapshot
from server.registry.registry import Registry

NAMES = ["c", "a", "b"]
HISTORY = 3


@pytest.fixture(scope="module")
def files(make_bundle: Callable[..., Path]) -> list[Path]:
    return [make_bundle(f"snapshot-{seed}", [1], seed) for seed in range(3)]


def change(registry: Registry, draw: random.Random, bundles: list[tuple[Path, Bundle]]) -> None:
    """Some change, which may be refused."""
    name, (path, bundle) = draw.choice(NAMES), draw.choice(bundles)
    match draw.choice(["put"] * 6 + ["add"] * 3 + ["delete", "roll back", "remove", "drain", "keep"]):
        case "put":
            strength = draw.choice([0.25, 0.5, 1.0])
            settings = ProfileSettings(bundle.digest, strength, 4.0, Scope.ALL)
            registry.put_profile(name, settings, actor="tester")
        case "delete":
            registry.delete_profile(name, actor="tester")
        case "roll back":
            target = registry.rollback_target(name, None)
            assert target.settings is not None
            registry.put_profile(name, target.settings, actor="tester", action="rollback")
        case "add":
            copy = registry.store.incoming()
            shutil.copyfile(path, copy)
            registry.store.keep(copy, bundle.digest)
            registry.add_bundle(bundle, actor="tester", source="test")
        case "remove":
            registry.remove_bundle(bundle.digest, actor="tester")
        case "drain" | "keep" as action:
            registry.set_draining(bundle.digest, action == "drain", actor="tester")


def from_nothing(directory: Path, history: int) -> Snapshot:
    registry = Registry.open(directory)
    try:
        return registry.snapshot(history)
    finally:
        registry.close()


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_whole_state(tmp_path: Path, files: list[Path], seed: int) -> None:
    draw = random.Random(seed)
    bundles = [(path, load_bundle(path)) for path in files]
    mine, other = Registry.open(tmp_path / "registry"), Registry.open(tmp_path / "registry")
    try:
        generations = []
        for _ in range(80):
            # From none to several changes between two looks, by this process and by another one.
            for _ in range(draw.randrange(4)):
                with suppress(RegistryError):
                    change(draw.choice([mine, other]), draw, bundles)
            for history in (HISTORY, HISTORY + 2):
                found, whole = mine.snapshot(history), from_nothing(tmp_path / "registry", history)
                assert found == whole
                assert list(found.profiles) == list(whole.profiles) and list(found.bundles) == list(whole.bundles)
            generations.append(mine.generation())
        assert generations[-1] > 30, "too many changes were refused to tell anything"
    finally:
        mine.close()
        other.close()


def test_a_change_of_one_profile_reads_no_other(tmp_path: Path, files: list[Path]) -> None:
    bundle = load_bundle(files[0])
    registry = Registry.open(tmp_path / "registry")
    try:
        copy = registry.store.incoming()
        shutil.copyfile(files[0], copy)
        registry.store.keep(copy, bundle.digest)
        registry.add_bundle(bundle, actor="tester", source="test")
        for name in ("a", "b"):
            registry.put_profile(name, ProfileSettings(bundle.digest, 1.0, 4.0, Scope.ALL), actor="tester")
        before = registry.snapshot()
        registry.put_profile("a", ProfileSettings(bundle.digest, 0.5, 4.0, Scope.ALL), actor="tester")
        after = registry.snapshot()
        assert after.bundles is before.bundles and after.profiles["b"] is before.profiles["b"]
        assert len(after.profiles["a"]) == 2
    finally:
        registry.close()

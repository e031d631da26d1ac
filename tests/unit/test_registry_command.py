"""`expertsteer registry`: what people and scripts get to see, with and without running servers."""

import argparse
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from artifacts.bundle import load_bundle
from artifacts.manifest import Scope
from server import cli
from server.commands import registry as command
from server.registry.records import ProfileSettings
from server.registry.registry import Registry


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser(prog="expertsteer registry")
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def files(make_bundle: Callable[..., Path]) -> list[Path]:
    return [make_bundle(f"command-{seed}", [1, 2], seed) for seed in range(3)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@contextmanager
def opened(directory: Path) -> Iterator[Registry]:
    registry = Registry.open(directory)
    try:
        yield registry
    finally:
        registry.close()


def listed(directory: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert run("list", directory, "--json") == 0
    return json.loads(capsys.readouterr().out)


def audit(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "audit.jsonl").read_text().splitlines()]


@contextmanager
def server(directory: Path, load: bool) -> Iterator[str]:
    """A running server named in the registry, which loads what is wanted, or never does."""
    with opened(directory) as registry:
        member, stop = registry.members.join("server-1", 1), threading.Event()
        registry.members.beat(member, observed=registry.generation(), pins=(), state="ready")

        def follow() -> None:
            with opened(directory) as mine:
                while load and not stop.wait(0.01):
                    for key in mine.snapshot().keys_wanted(1):
                        mine.members.hold("server-1", key, f"checksum of {key}")

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield "server-1"
        finally:
            stop.set()
            thread.join()


def test_add_and_list(directory: Path, files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    digest = load_bundle(files[0]).digest
    assert run("add", directory, files[0]) == 0
    assert f"{digest} added" in capsys.readouterr().out
    assert run("add", directory, files[0], "--profile", "calm", "--strength", "-0.5") == 0
    assert f"{digest} was there already" in capsys.readouterr().out
    report = listed(directory, capsys)
    assert report["generation"] == 2
    assert [bundle["digest"] for bundle in report["bundles"]] == [digest]
    (version,) = report["profiles"]["calm"]
    assert (version["generation"], version["action"]) == (2, "put")
    assert version["settings"]["bundle"] == digest
    assert version["settings"]["strength"] == -0.5
    assert version["actor"].startswith("cli:")
    assert run("list", directory) == 0
    text = " ".join(capsys.readouterr().out.split())
    for shown in ("Generation 2", "Bundles", "Profiles", "Versions", "calm", "command-0", "-0.5", "present"):
        assert shown in text
    entries = [(entry["action"], entry["target"], entry["outcome"], entry["after"]) for entry in audit(directory)]
    assert entries[-1] == ("profile.put", "calm", "ok", 2)
    assert {entry["digest"] for entry in audit(directory)} == {digest}


def test_a_profile_that_moves_stays_with_its_users(
    directory: Path, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run("add", directory, files[0])
    with opened(directory) as registry:
        wanted = ProfileSettings(load_bundle(files[0]).digest, 1.0, 4.0, Scope.ALL, allowed_keys=("team",))
        registry.put_profile("calm", wanted, actor="tester")
    assert run("add", directory, files[1], "--profile", "calm") == 0
    settings = listed(directory, capsys)["profiles"]["calm"][0]["settings"]
    assert settings["bundle"] == load_bundle(files[1]).digest
    assert settings["allowed_keys"] == ["team"]


def test_rollback(directory: Path, files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for path in files:
        assert run("add", directory, path, "--profile", "calm") == 0
    digests = [load_bundle(path).digest for path in files]

    def current() -> str:
        return listed(directory, capsys)["profiles"]["calm"][0]["settings"]["bundle"]

    assert run("rollback", directory, "calm") == 0
    assert current() == digests[1]
    assert run("rollback", directory, "calm") == 0
    assert current() == digests[0]
    assert run("rollback", directory, "calm") == 1
    assert "no older version" in capsys.readouterr().err
    assert run("rollback", directory, "calm", "--to", "6") == 0
    assert current() == digests[2]
    assert audit(directory)[-1]["action"] == "profile.rollback"
    assert [entry["outcome"] for entry in audit(directory)[-4:]] == ["ok", "ok", "not_found", "ok"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("list", "{none}"), "is no directory"),
        (("gc", "{none}"), "is no directory"),
        (("verify", "{none}"), "is no directory"),
        (("export", "{none}", "-o", "{none}/x.tar"), "is no directory"),
        (("rollback", "{directory}", "other"), "'other' does not exist"),
        (("rollback", "{directory}", "calm", "--to", "77"), "no version 77"),
        (("add", "{directory}", "{none}"), "cannot be read"),
        (("add", "{directory}", "{none}.tar"), "no export"),
        (("add", "{directory}", "/dev/zero"), "not a regular file"),
        (("add", "{directory}", "{directory}"), "no export"),
        (("add", "{directory}", "{fresh}", "--strength", "1"), "name it with --profile"),
        (("add", "{directory}", "{fresh}", "--profile", "new", "--strength", "4.5"), "at most 4"),
        (("add", "{directory}", "{fresh}", "--profile", "new", "--strength", "nan"), "at most 4"),
        (("add", "{directory}", "{directory}", "--profile", "new"), "single bundle"),
        (("export", "{directory}", "-o", "{none}/x.tar"), "No such file"),
    ],
)
def test_mistakes_are_one_sentence(
    directory: Path,
    files: list[Path],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    says: str,
) -> None:
    run("add", directory, files[0], "--profile", "calm")
    before = listed(directory, capsys)
    places = {"none": directory / "none", "directory": directory, "fresh": files[1]}
    assert run(*(argument.format(**places) for argument in arguments)) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith(f"expertsteer registry {arguments[0]}: ")
    assert streams.err.count("\n") == 1
    assert says in streams.err
    assert listed(directory, capsys) == before


@pytest.mark.parametrize("arguments", [("--profile", "Calm"), ("--profile", "a@b"), ("--timeout", "0")])
def test_bad_options_are_usage_errors(directory: Path, files: list[Path], arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("add", directory, files[0], *arguments)
    assert stopped.value.code == 2
    assert not directory.exists()


def test_gc(directory: Path, files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for path in files[:2]:
        run("add", directory, path, "--profile", "calm")
    run("add", directory, files[2])
    digests = [load_bundle(path).digest for path in files]
    capsys.readouterr()
    assert run("gc", directory, "--keep", "1", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [f"{digests[each]} would be removed" for each in (0, 2)]
    assert run("gc", directory) == 0
    assert capsys.readouterr().out.splitlines() == [f"{digests[2]} removed"]
    assert run("gc", directory, "--keep", "1") == 0
    assert [bundle["digest"] for bundle in listed(directory, capsys)["bundles"]] == [digests[1]]
    assert audit(directory)[-1]["after"] == [digests[0]]
    assert run("gc", directory) == 0
    assert "No bundle" in capsys.readouterr().out


def test_verify(directory: Path, files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for path in files[:2]:
        run("add", directory, path)
    capsys.readouterr()
    assert run("verify", directory) == 0
    digest = load_bundle(files[1]).digest
    (directory / "bundles" / f"{digest.removeprefix('sha256:')}.safetensors").unlink()
    capsys.readouterr()
    assert run("verify", directory) == 1
    assert (
        capsys.readouterr().out
        == f"{digest}: Bundle {digest} in the store is damaged: its file is missing; add it again.\n"
    )
    assert run("add", directory, files[1]) == 0
    assert run("verify", directory) == 0


def test_an_export_is_added_elsewhere(
    directory: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in files[:2]:
        run("add", directory, path, "--profile", "calm")
    run("add", directory, files[2], "--profile", "bright", "--strength", "2")
    archive, folder = tmp_path / "export.tar", tmp_path / "unpacked"
    assert run("export", directory, "-o", archive) == 0
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    source = listed(directory, capsys)
    for number, export in enumerate((archive, folder)):
        target = tmp_path / f"copy-{number}"
        assert run("add", target, export) == 0
        copy = listed(target, capsys)
        assert {each["digest"] for each in copy["bundles"]} == {each["digest"] for each in source["bundles"]}
        for name, versions in source["profiles"].items():
            assert copy["profiles"][name][0]["settings"] == versions[0]["settings"]
        assert run("add", target, export) == 0
        assert listed(target, capsys) == copy
        assert run("verify", target) == 0


def test_an_export_that_lies_is_refused(
    directory: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("add", directory, files[0], "--profile", "calm")
    folder = tmp_path / "unpacked"
    assert run("export", directory, "-o", tmp_path / "export.tar") == 0
    with tarfile.open(tmp_path / "export.tar") as tar:
        tar.extractall(folder, filter="data")
    (file,) = (folder / "bundles").iterdir()
    sound, state = file.read_bytes(), json.loads((folder / "state.json").read_text())
    profile = state["profiles"]["calm"]

    def refused(says: str) -> None:
        capsys.readouterr()
        assert run("add", tmp_path / "copy", folder) == 1
        assert says in capsys.readouterr().err

    file.chmod(0o600)
    file.write_bytes(files[1].read_bytes())
    refused("in place of")
    file.write_bytes(sound[:-1])
    refused("bytes")
    file.write_bytes(sound)
    for change, says in (
        ({"strength": 100.0}, "strength"),
        ({"maximum_strength": 100.0}, "maximum strength"),
        ({"layers": [5]}, "layer 5"),
        ({"scope": "none"}, "scope"),
        ({"bundle": f"sha256:{'0' * 64}"}, "not in the registry"),
    ):
        (folder / "state.json").write_text(json.dumps(state | {"profiles": {"calm": profile | change}}))
        refused(says)
    (folder / "state.json").write_text(json.dumps(state | {"profiles": {"../calm": profile}}))
    refused("state.json")
    assert listed(tmp_path / "copy", capsys)["profiles"] == {}


def test_running_servers_load_before_the_profile_moves(
    directory: Path, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in files:
        run("add", directory, path, "--profile", "calm")
    with server(directory, load=True) as name:
        # Too old to be held for a rollback: it is loaded because the command says that it is about to name it.
        assert run("rollback", directory, "calm", "--to", "2", "--timeout", "20") == 0
        assert run("add", directory, files[1], "--profile", "calm", "--timeout", "20") == 0
        report = listed(directory, capsys)
        assert [row["instance"] for row in report["servers"]] == [name]
    digests = [version["settings"]["bundle"] for version in report["profiles"]["calm"]]
    assert digests == [load_bundle(files[each]).digest for each in (1, 0, 2, 1, 0)]


def test_a_server_that_does_not_load_is_named(
    directory: Path, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run("add", directory, files[0], "--profile", "calm")
    with server(directory, load=False) as name:
        capsys.readouterr()
        assert run("add", directory, files[1], "--profile", "calm", "--timeout", "0.3") == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2
        assert lines[0].startswith(f"waiting until {name} holds ")
        assert f"Server {name} did not load" in lines[1]
        report = listed(directory, capsys)
        assert [version["settings"]["bundle"] for version in report["profiles"]["calm"]] == [
            load_bundle(files[0]).digest
        ]
        with opened(directory) as registry:
            assert registry.snapshot().intents == frozenset()
    assert audit(directory)[-1]["outcome"] == "not_held"


def test_the_command_is_one_of_expertsteer(
    directory: Path, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["registry", "add", str(directory), str(files[0])]) == 0
    assert cli.main(["registry", "verify", str(directory)]) == 0
    assert "in order" in capsys.readouterr().out

"""`expertsteer push` and `expertsteer profile` against a running application."""

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from server.commands import profile, push
from server.commands.connection import KEY_VARIABLE


def call(module: ModuleType, *arguments: str | Path) -> int:
    """Run a command as `expertsteer` does."""
    parser = argparse.ArgumentParser(prog="expertsteer")
    module.add_arguments(parser)
    status: int = module.run(parser.parse_args([str(each) for each in arguments]))
    return status


@pytest.fixture(autouse=True)
def key(admin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write key where commands look for it, and a terminal that is wide enough."""
    monkeypatch.setenv(KEY_VARIABLE, admin.write_key)
    monkeypatch.setenv("COLUMNS", "200")


class TestPush:
    def test_serves(self, admin: Any, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        options = ("--strength", "0.5", "--maximum-strength", "2", "--scope", "response", "--layers", "5")
        options += ("--exclude", "reasoning,tool_calls", "--allowed-keys", "doctor", "--description", "For doctors.")
        assert call(push, bundle, "--profile", "doctors", "--server", admin.url, *options) == 0
        out = capsys.readouterr().out
        assert "is added" in out and "Profile doctors is served." in out and "response" in out
        current = admin.registry.snapshot().current("doctors")
        asked = current.settings
        assert (asked.strength, asked.maximum_strength, asked.scope, asked.layers) == (0.5, 2.0, "response", (5,))
        assert asked.exclude == ("reasoning", "tool_calls") and asked.allowed_keys == ("doctor",)
        assert asked.description == "For doctors." and asked.bundle in out and current.actor == "admin"

    def test_name_and_defaults_of_the_bundle(
        self, admin: Any, bundle: Path, other_bundle: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert call(push, bundle, "--server", admin.url, "--strength", "0.5") == 0
        assert call(push, other_bundle, "--server", admin.url, "--profile", "medical", "--exclude", "none") == 0
        out = capsys.readouterr().out
        assert "at strength 0.5" in out and admin.registry.snapshot().current("medical").settings.strength == 1
        assert call(push, other_bundle, "--server", admin.url, "--profile", "medical") == 0
        out = capsys.readouterr().out
        assert "was there already" in out and "is unchanged" in out

    def test_dry_run(self, admin: Any, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert call(push, bundle, "--server", admin.url, "--dry-run") == 0
        out = capsys.readouterr().out
        assert "would be added" in out and "digest" in out and not admin.registry.snapshot().bundles
        assert call(push, bundle, "--server", admin.url, "--profile", "a") == 0
        assert call(push, bundle, "--server", admin.url, "--profile", "b", "--dry-run") == 0
        assert "Profile b would be" in capsys.readouterr().out and admin.registry.snapshot().current("b") is None

    def test_if_match(self, admin: Any, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert call(push, bundle, "--server", admin.url) == 0
        generation = str(admin.registry.snapshot().current("medical").generation)
        changed = ("--server", admin.url, "--strength", "2", "--if-match", generation)
        assert call(push, bundle, *changed) == 0
        capsys.readouterr()
        assert call(push, bundle, *changed[:-3], "3", "--if-match", generation) == 1
        error = capsys.readouterr().err
        assert error.startswith("expertsteer push: ") and "profile was not changed" in error and error.count("\n") == 1

    def test_observed_late(self, admin: Any, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        admin.profiles.observed = False
        assert call(push, bundle, "--server", admin.url) == 0
        assert "Some processes" in capsys.readouterr().err

    def test_signature(self, admin: Any, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        signature = tmp_path / "a.sig"
        signature.write_bytes(b"signed")
        assert call(push, bundle, "--server", admin.url, "--signature", signature) == 0
        assert admin.calls[0][1]["signature"] == b"signed"
        signature.write_bytes(bytes(65537))
        assert call(push, bundle, "--server", admin.url, "--signature", signature) == 1
        assert "no signature" in capsys.readouterr().err

    def test_many_profiles(self, admin: Any, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        digest = admin.add(bundle)
        for number in range(21):
            assert admin.call("PUT", f"/profiles/p{number}", json={"bundle": digest}).status_code == 201
        assert call(push, bundle, "--server", admin.url) == 0
        out = capsys.readouterr().out
        assert "and 21 more" in out and "p20" not in out

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (["--strength", "nan"], "--strength"),
            (["--strength", "3", "--maximum-strength", "2"], "over maximum_strength"),
            (["--scope", "some"], "--scope"),
            (["--layers", "2,2"], "--layers"),
            (["--exclude", "answers"], "--exclude"),
            (["--profile", "Medical"], "name"),
            (["--signature", "/none.sig"], "/none.sig"),
        ],
    )
    def test_refused(
        self, admin: Any, bundle: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert call(push, bundle, "--server", admin.url, *options) == 1
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1 and not admin.registry.snapshot().profiles

    def test_no_bundle(self, admin: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "text").write_text("This is no bundle.")
        for path in (tmp_path / "text", tmp_path / "none", tmp_path):
            assert call(push, path, "--server", admin.url) == 1
            assert capsys.readouterr().err.startswith("expertsteer push: ")

    @pytest.mark.parametrize("layers", ["", "a", "1,", "-1", "1.5", "123456"])
    def test_usage(self, admin: Any, bundle: Path, layers: str) -> None:
        with pytest.raises(SystemExit) as stop:
            call(push, bundle, "--server", admin.url, f"--layers={layers}")
        assert stop.value.code == 2


class TestKeys:
    def test_from_another_variable(self, admin: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(KEY_VARIABLE)
        assert call(push, bundle, "--server", admin.url) == 1
        monkeypatch.setenv("OTHER", admin.write_key)
        assert call(push, bundle, "--server", admin.url, "--key-env", "OTHER") == 0

    def test_from_a_file(
        self,
        admin: Any,
        bundle: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.delenv(KEY_VARIABLE)
        path = tmp_path / "key"
        path.write_text(f"{admin.write_key}\n")
        assert call(push, bundle, "--server", admin.url, "--key-file", path) == 0
        capsys.readouterr()
        for text in ("", "two words", "x" * 5000, "käy"):
            path.write_text(text)
            assert call(push, bundle, "--server", admin.url, "--key-file", path) == 1
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and "words" not in error.replace(" words;", "") and "xxx" not in error

    def test_reading_key_may_not_push(
        self, admin: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv(KEY_VARIABLE, admin.read_key)
        assert call(push, bundle, "--server", admin.url) == 1
        assert "role read" in capsys.readouterr().err


class TestProfile:
    def test_list(self, admin: Any, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        admin.call("PUT", "/profiles/medical", json={"bundle": admin.add(bundle)})
        assert call(profile, "list", "--server", admin.url) == 0
        assert "2, 5" in capsys.readouterr().out
        assert call(profile, "list", "--server", admin.url, "--json") == 0
        assert json.loads(capsys.readouterr().out)["profiles"][0]["name"] == "medical"

    def test_show(self, admin: Any, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        digest = admin.add(bundle)
        for strength in (1, 2):
            spec = {"bundle": digest, "strength": strength, "description": "[red]a\nb"}
            admin.call("PUT", "/profiles/medical", json=spec)
        assert call(profile, "show", "medical", "--server", admin.url) == 0
        out = capsys.readouterr().out
        assert digest in out and "[red]a\\nb" in out and out.count(" put ") == 2
        assert call(profile, "show", "medical", "--server", admin.url, "--json") == 0
        assert len(json.loads(capsys.readouterr().out)["history"]) == 2

    def test_rollback_and_delete(self, admin: Any, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        digest = admin.add(bundle)
        made = [
            admin.call("PUT", "/profiles/medical", json={"bundle": digest, "strength": strength}).json()["generation"]
            for strength in (1, 2, 3)
        ]
        server = ("--server", admin.url)
        assert call(profile, "rollback", "medical", *server) == 0
        assert admin.registry.snapshot().current("medical").settings.strength == 2
        assert call(profile, "rollback", "medical", *server, "--to", str(made[0])) == 0
        assert admin.registry.snapshot().current("medical").settings.strength == 1
        assert call(profile, "delete", "medical", *server, "--if-match", str(made[0])) == 1
        assert call(profile, "delete", "medical", *server, "--drain", "1") == 0
        assert admin.registry.snapshot().current("medical") is None
        assert admin.calls[-1][1]["drain"] and admin.calls[-1][1]["timeout_s"] == 1
        capsys.readouterr()
        for action in ("show", "delete"):
            assert call(profile, action, "medical", *server) == 1
            assert capsys.readouterr().err.startswith(f"expertsteer profile {action}: ")

    def test_bad_address(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert call(profile, "list", "--server", "nowhere") == 1
        assert "no address" in capsys.readouterr().err

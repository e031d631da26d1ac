"""Changes of a registry made by a command on its machine, whether servers run on it or not."""

import getpass
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from artifacts.bundle import Bundle, load_bundle
from artifacts.errors import BundleError, quoted
from artifacts.manifest import Manifest
from server.auth.audit import AuditLog
from server.profiles import checked_layers, recommended_settings
from server.registry.errors import NotHeld, RegistryError, RegistryErrorCode
from server.registry.export import open_export
from server.registry.records import Action, BundleRecord, ProfileSettings, ProfileVersion
from server.registry.registry import Registry

_WAIT_STEP_S = 0.1


class SettingsError(ValueError):
    """Settings that a bundle does not allow. `str(error)` is one sentence."""


class OfflineChanges:
    """Changes in the name of a user of this machine, each with its line in the audit log.

    A profile moves only when every running server holds what it is to mean, as with the admin API.
    """

    def __init__(self, registry: Registry, timeout_s: float, say: Callable[[str], None]) -> None:
        """Take what is needed.

        Args:
            registry: what to change.
            timeout_s: how long running servers may take to load a program.
            say: told what is being waited for.

        Raises:
            OSError, ValueError: the audit log cannot be written.
        """
        self._registry = registry
        self._timeout_s = timeout_s
        self._say = say
        self._audit = AuditLog(registry.directory / "audit.jsonl")
        self._actor = f"cli:{_user()}"

    def add(self, path: Path) -> tuple[BundleRecord, bool]:
        """Add a bundle file; see `Registry.add_bundle` for what is returned.

        Raises:
            BundleError: it is no valid bundle.
            OSError, RegistryError: it cannot be stored.
        """
        # Before it is copied: a pipe or a directory must not be read.
        load_bundle(path)
        with open(path, "rb") as file:
            return self._add(file, str(path), None)

    def point(self, name: str, path: Path, strength: float | None) -> tuple[BundleRecord, bool, ProfileVersion]:
        """Add a bundle file and make a profile mean what it recommends. Who may use the profile stays.

        Args:
            name: of the profile.
            path: the file.
            strength: default one; None for the recommended one.

        Raises:
            BundleError, OSError: see `add`.
            SettingsError: the strength is over the bundle's maximum; nothing was added.
            RegistryError: see `Registry.put_profile`; code not_held after the time is over.
        """
        bundle = load_bundle(path)
        settings = recommended_settings(bundle.digest, bundle.manifest)
        if strength is not None:
            settings = replace(settings, strength=strength)
        _check(settings, bundle.manifest)
        record, is_new = self.add(path)
        current = self._registry.snapshot(1).current(name)
        if current is not None and current.settings is not None:
            settings = replace(settings, allowed_keys=current.settings.allowed_keys)
        return record, is_new, self.put(name, replace(settings, bundle=record.digest))

    def restore(self, path: Path) -> tuple[list[tuple[BundleRecord, bool]], list[ProfileVersion]]:
        """Add the bundles of an export, then make its profiles mean what they meant.

        Args:
            path: the .tar file, or the folder that it was unpacked to.

        Returns:
            Bundles as `add` returns them, and the current versions of the profiles.

        Raises:
            BundleError, RegistryError, SettingsError, OSError: it is damaged, or cannot be stored. What was done before
                that stays.
        """
        with open_export(path) as exported:
            added = []
            for digest in exported.state.bundles:
                with exported.open_bundle(digest) as file:
                    added.append(self._add(file, str(path), digest))
            versions = [self.put(name, settings) for name, settings in exported.state.profiles.items()]
        return added, versions

    def put(self, name: str, settings: ProfileSettings, action: Action = "put") -> ProfileVersion:
        """Make a profile mean something.

        Args:
            name: of the profile.
            settings: what it shall mean.
            action: kind of change.

        Raises:
            RegistryError: see `Registry.put_profile`; code not_held after the time is over.
            SettingsError: the bundle does not allow the settings.
        """
        _check(settings, self._manifest(settings.bundle))
        with self._audited("profile.put", name, settings.bundle) as entry:
            entry["before"] = self._generation(name)
            version = self._commit(
                settings.key,
                lambda: self._registry.put_profile(name, settings, actor=self._actor, action=action),
            )
            entry["after"] = version.generation
            return version

    def roll_back(self, name: str, to: int | None) -> ProfileVersion:
        """Make an earlier version of a profile the current one; see `Registry.rollback_target`.

        Raises:
            RegistryError: there is none; its bundle is gone; or code not_held after the time is over.
        """
        with self._audited("profile.rollback", name, None) as entry:
            entry["before"] = before = self._generation(name)
            target = self._registry.rollback_target(name, to)
            settings = target.settings
            assert settings is not None
            entry["digest"] = settings.bundle
            version = self._commit(
                settings.key,
                lambda: self._registry.put_profile(
                    name,
                    settings,
                    actor=self._actor,
                    action="rollback",
                    if_match=before,
                    restored_from=target.restored_from or target.generation,
                ),
            )
            entry["after"] = version.generation
            return version

    def gc(self, keep_history: int) -> list[str]:
        """Remove what nobody goes back to; see `Registry.gc`."""
        with self._audited("registry.gc", str(self._registry.directory), None) as entry:
            entry["after"] = removed = self._registry.gc(keep_history=keep_history, actor=self._actor)
            return removed

    def _add(self, file: Any, source: str, expected: str | None) -> tuple[BundleRecord, bool]:
        store = self._registry.store
        with self._audited("bundle.add", source, expected) as entry:
            copy = store.incoming()
            try:
                with open(copy, "xb") as target:
                    shutil.copyfileobj(file, target)
                bundle: Bundle = load_bundle(copy)
                if expected not in (None, bundle.digest):
                    raise RegistryError(
                        RegistryErrorCode.STORE_DAMAGED,
                        f"{quoted(source, 200)} holds {bundle.digest} in place of {expected}; export it anew.",
                    )
                entry["digest"] = bundle.digest
                store.keep(copy, bundle.digest)
            finally:
                copy.unlink(missing_ok=True)
            return self._registry.add_bundle(bundle, actor=self._actor, source=source)

    def _commit(self, key: str, change: Callable[[], ProfileVersion]) -> ProfileVersion:
        """Make a change as soon as every running server holds a program; they load it because of the intent."""
        members = self._registry.members
        deadline = time.monotonic() + self._timeout_s
        member = members.join(f"command-{secrets.token_hex(4)}", os.getpid())
        is_said = False
        try:
            members.intend(member, key)
            while True:
                try:
                    return change()
                except NotHeld as error:
                    if time.monotonic() > deadline:
                        raise NotHeld(
                            f"Server {', '.join(error.instances)} did not load {key} in {self._timeout_s:g} s, so "
                            "the profile stays as it was; see the server's log and /v1/steering/status.",
                            error.instances,
                        ) from None
                    if not is_said:
                        self._say(f"waiting until {', '.join(error.instances)} holds {key}")
                        is_said = True
                time.sleep(_WAIT_STEP_S)
                # "starting": it serves no requests, so nobody waits for it to see a change.
                members.beat(member, observed=self._registry.generation(), pins=(), state="starting")
        finally:
            with suppress(RegistryError):
                members.leave(member)

    def _manifest(self, digest: str) -> Manifest:
        record = self._registry.snapshot(1).bundles.get(digest)
        if record is None:
            raise RegistryError(
                RegistryErrorCode.BUNDLE_MISSING, f"Bundle {quoted(digest)} is not in the registry; add it first."
            )
        return record.manifest

    def _generation(self, name: str) -> int | None:
        current = self._registry.snapshot(1).current(name)
        return None if current is None else current.generation

    @contextmanager
    def _audited(self, action: str, target: str, digest: str | None) -> Iterator[dict[str, Any]]:
        """Write a line when the block ends; it may fill in `digest`, `before` and `after`."""
        entry: dict[str, Any] = {"digest": digest}
        try:
            yield entry
        except (RegistryError, BundleError) as error:
            self._audit.write(self._actor, action, target, **entry, outcome=error.code.value, reason=str(error))
            raise
        except (OSError, KeyboardInterrupt) as error:
            self._audit.write(
                self._actor, action, target, **entry, outcome="failed", reason=str(error) or "interrupted"
            )
            raise
        self._audit.write(self._actor, action, target, **entry, outcome="ok")


def _check(settings: ProfileSettings, manifest: Manifest) -> None:
    """Refuse what the admin API refuses too."""
    maximum = settings.maximum_strength
    if not 0 < maximum <= manifest.maximum_strength:
        raise SettingsError(
            f"The maximum strength is {maximum:g}; bundle {quoted(manifest.name)} allows up to "
            f"{manifest.maximum_strength:g}."
        )
    if not math.isfinite(settings.strength) or abs(settings.strength) > maximum:
        raise SettingsError(f"The strength is {settings.strength:g}; at most {maximum:g} is allowed, either way.")
    try:
        checked_layers(settings.layers, manifest)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())

"""Records of the registry as the admin API shows them."""

from typing import Literal

from artifacts.bundle import Bundle
from artifacts.manifest import Manifest
from artifacts.rows import row_norms
from server.admin_schema import (
    BundleInfo,
    BundleTensors,
    BundleUse,
    ProfileInfo,
    RowInfo,
    SettingsInfo,
    TensorInfo,
    VersionInfo,
)
from server.auth.keys import Identity, Role
from server.profiles import Profile, may_use
from server.registry.records import BundleRecord, ProfileSettings, ProfileVersion, Snapshot

_ROLES: tuple[Literal["read", "write"], ...] = ("read", "write")


def bundle_info(record: BundleRecord, snapshot: Snapshot) -> BundleInfo:
    """A bundle and the versions of live profiles that name it."""
    manifest = record.manifest
    return BundleInfo(
        digest=record.digest,
        name=manifest.name,
        description=manifest.description,
        licence=manifest.licence,
        target=manifest.target.id,
        architecture=manifest.target.architecture,
        hidden_size=manifest.target.hidden_size,
        num_layers=manifest.target.num_layers,
        fingerprint=manifest.target.fingerprint,
        layers=sorted({step.layer for step in manifest.interventions if step.kind != "condition"}),
        kinds=list(dict.fromkeys(step.kind for step in manifest.interventions)),
        strength=manifest.recommended_strength,
        maximum_strength=manifest.maximum_strength,
        scope=manifest.scope,
        exclude=list(manifest.exclude),
        num_bytes=record.num_bytes,
        added_at=record.added_at,
        added_by=record.added_by,
        source=record.source,
        signer=record.signer,
        is_draining=record.is_draining,
        used_by=_uses(record.digest, snapshot),
    )


def bundle_tensors(bundle: Bundle) -> BundleTensors:
    """The tensors of a bundle, by their sizes."""
    rows = [
        RowInfo(name=name, layer=step.layer, kind=step.kind, role=role, norms=row_norms(bundle.rows[name]))
        for step in bundle.manifest.interventions
        for role in _ROLES
        if (name := getattr(step, role)) is not None
    ]
    evidence = [
        TensorInfo(name=entry.name, shape=list(entry.shape), dtype=entry.dtype, num_bytes=entry.num_bytes)
        for entry in bundle.evidence
    ]
    return BundleTensors(digest=bundle.digest, rows=rows, evidence=evidence)


def profile_info(
    version: ProfileVersion, settings: ProfileSettings, manifest: Manifest, viewer: Identity
) -> ProfileInfo:
    """A version of a profile.

    Args:
        version: with these settings.
        settings: of the version.
        manifest: of the bundle that they name.
        viewer: an inference key does not see who else there is.
    """
    is_operator = viewer.role is not Role.INFERENCE
    allowed = settings.allowed_keys
    return ProfileInfo(
        name=version.name,
        description=settings.description,
        bundle=settings.bundle,
        strength=settings.strength,
        maximum_strength=settings.maximum_strength,
        scope=settings.scope,
        layers=sorted(set(Profile(version.name, manifest, settings, version.generation).layers)),
        exclude=list(settings.exclude),
        generation=version.generation,
        changed_at=version.at,
        changed_by=version.actor if is_operator else None,
        allowed_keys=list(allowed) if is_operator and allowed is not None else None,
    )


def version_info(version: ProfileVersion) -> VersionInfo:
    """One line of a profile's history."""
    return VersionInfo(
        generation=version.generation,
        action=version.action,
        actor=version.actor,
        at=version.at,
        restored_from=version.restored_from,
        settings=None if version.settings is None else _settings_info(version.settings),
    )


def may_see(viewer: Identity, name: str, settings: ProfileSettings) -> bool:
    """Whether a profile is in a key's list: inference keys see what they may use."""
    return viewer.role is not Role.INFERENCE or may_use(viewer, name, settings)


def _uses(digest: str, snapshot: Snapshot) -> list[BundleUse]:
    return [
        BundleUse(profile=name, generation=version.generation, is_current=version is versions[0])
        for name, versions in sorted(snapshot.profiles.items())
        for version in versions
        if version.settings is not None and version.settings.bundle == digest
    ]


def _settings_info(settings: ProfileSettings) -> SettingsInfo:
    return SettingsInfo(
        bundle=settings.bundle,
        strength=settings.strength,
        maximum_strength=settings.maximum_strength,
        scope=settings.scope,
        layers=None if settings.layers is None else list(settings.layers),
        exclude=list(settings.exclude),
        allowed_keys=None if settings.allowed_keys is None else list(settings.allowed_keys),
        description=settings.description,
    )

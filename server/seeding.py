"""What becomes of the registry before the server starts: bundles of the command line in, damage found."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from artifacts.bundle import load_bundle
from artifacts.errors import BundleError
from server.declaration import Declaration
from server.profile_operations import DECLARATION
from server.profiles import recommended_settings
from server.programs import Programs
from server.registry.errors import RegistryError
from server.registry.offline import OfflineChanges
from server.registry.registry import Registry
from server.settings import BundleSource, SteeringSettings
from server.sources.signature import SignaturePolicy

logger = logging.getLogger("vllm.expertsteer")

ACTOR = "command line"
_PEERS_TIMEOUT_S = 60.0


def seed(registry: Registry, settings: SteeringSettings, programs: Programs, signatures: SignaturePolicy) -> None:
    """Make a profile of every bundle that the settings name.

    A profile that has had the very same bundle before stays as the registry has it: a restart does not undo a rollback,
    a deletion or other settings.

    Args:
        registry: where to.
        settings: what was named.
        programs: says which bundles the served model takes.
        signatures: a bundle's signature is the file of its name and `.sig`.

    Raises:
        BundleError: a file is damaged or belongs to another model; the message names the file.
        SourceError: a signature is missing or wrong.
        ValueError: two bundles have one name, or --steering-exclude names a profile that no bundle has.
        RegistryError: the registry cannot be written.
    """
    names: set[str] = set()
    for source in settings.bundles:
        name = _seed_one(registry, settings, programs, signatures, source, names)
        names.add(name)
    for exclusion in settings.exclude:
        if exclusion.profile is not None and exclusion.profile not in names:
            raise ValueError(
                f"--steering-exclude names profile {exclusion.profile!r}; named by --steering-bundle: "
                f"{', '.join(sorted(names)) or 'none'}."
            )


def retire(registry: Registry, declared: Declaration, programs: Programs) -> None:
    """Take away profiles that an earlier declaration made, this one means otherwise, and the served model cannot take.

    So that a new model together with a new file starts on the registry of the old ones.

    Args:
        registry: where from.
        declared: what the file says now.
        programs: says which bundles the served model takes.

    Raises:
        RegistryError: the registry cannot be read or written.
    """
    for name, (version, *_) in registry.snapshot(1).profiles.items():
        settings, wanted = version.settings, declared.profiles.get(name)
        if settings is None or version.actor != DECLARATION:
            continue
        if wanted is not None and wanted.bundle == settings.bundle:
            continue
        try:
            programs.check(registry.store.load(settings.bundle))
        except (BundleError, RegistryError, ValueError) as error:
            registry.delete_profile(name, actor=DECLARATION, if_match=version.generation)
            logger.warning("Profile %s of an earlier declaration is gone: %s", name, error)


def require_servable(registry: Registry, programs: Programs) -> None:
    """Read what the current profiles mean, before a model is loaded that could not serve them.

    Args:
        registry: that names the profiles.
        programs: says which bundles the served model takes.

    Raises:
        RegistryError: a bundle is missing or damaged.
        BundleError: a bundle belongs to another model; the message names a profile.
        ValueError: a trigger fits no token of the model; likewise.
    """
    names = {
        version.settings.bundle: version.name
        for version, *_ in registry.snapshot(1).profiles.values()
        if version.settings is not None
    }
    for digest, name in names.items():
        bundle = registry.store.load(digest)
        try:
            programs.check(bundle)
        except BundleError as error:
            raise BundleError(error.code, f"Profile {name!r} of the registry: {error}") from error
        except ValueError as error:
            raise ValueError(f"Profile {name!r} of the registry: {error}") from error


def _seed_one(
    registry: Registry,
    settings: SteeringSettings,
    programs: Programs,
    signatures: SignaturePolicy,
    source: BundleSource,
    names: set[str],
) -> str:
    try:
        # Before it is copied: a pipe or a directory must not be read.
        load_bundle(source.path)
        copy = registry.store.incoming()
        try:
            shutil.copyfile(source.path, copy)
            bundle = load_bundle(copy)
            programs.check(bundle)
            signer = signatures.check(copy, _signature_of(source.path))
            name = source.name or bundle.manifest.name
            if name in names:
                raise ValueError(f"Two bundles are named {name!r}; rename one with --steering-bundle NAME=FILE.")
            if registry.has_ever_named(name, bundle.digest):
                logger.info("Profile %s has had %s before; it stays as the registry has it.", name, bundle.digest)
                return name
            registry.store.keep(copy, bundle.digest)
        finally:
            copy.unlink(missing_ok=True)
    except BundleError as error:
        raise BundleError(error.code, f"{source.path}: {error}") from error
    registry.add_bundle(bundle, actor=ACTOR, source=str(source.path), signer=signer)
    recommended = recommended_settings(bundle.digest, bundle.manifest)
    exclude = settings.exclude_of(name, recommended.exclude)
    # Other servers may run on this registry: they load it first.
    changes = OfflineChanges(registry, _PEERS_TIMEOUT_S, logger.info)
    changes.put(name, replace(recommended, exclude=exclude), "seed")
    return name


def _signature_of(path: Path) -> bytes | None:
    try:
        return path.with_name(f"{path.name}.sig").read_bytes()
    except FileNotFoundError:
        return None

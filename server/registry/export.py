"""A registry's desired state as one .tar file, or as the folder that it unpacks to."""

import io
import os
import secrets
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from artifacts.bundle import MAX_FILE_BYTES
from artifacts.errors import quoted
from artifacts.part import Digest, Name
from server.registry.errors import RegistryError, RegistryErrorCode
from server.registry.records import ProfileSettings, Snapshot
from server.registry.store import BundleStore

_STATE = "state.json"
_MAX_STATE_BYTES = 64 << 20


class ExportedState(BaseModel):
    """What `state.json` of an export holds.

    Attributes:
        format: what kind of file this is.
        schema_version: of this kind.
        generation: of the registry when it was exported.
        bundles: digests; the file of each is bundles/<64 hex>.safetensors.
        profiles: settings by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal["expertsteer-registry"] = "expertsteer-registry"
    schema_version: Literal[1] = 1
    generation: int
    bundles: tuple[Digest, ...]
    profiles: dict[Name, ProfileSettings]


@dataclass(frozen=True)
class Exported:
    """An export that is open for reading.

    Attributes:
        state: what it holds.
        open_bundle: opens the file of a bundle by digest, not checked; raises RegistryError, code store_damaged.
    """

    state: ExportedState
    open_bundle: Callable[[str], IO[bytes]]


def write_export(path: Path, state: Snapshot, store: BundleStore) -> None:
    """Write the bundles and the current profiles of a snapshot. Equal states give equal files.

    Args:
        path: where to; it appears complete or not at all.
        state: what to write.
        store: where the files of its bundles lie.

    Raises:
        RegistryError: code store_damaged; a file is missing.
        OSError: the file cannot be written.
    """
    profiles = {name: versions[0].settings for name, versions in state.profiles.items()}
    exported = ExportedState(
        generation=state.generation,
        bundles=tuple(sorted(state.bundles)),
        profiles={name: settings for name, settings in profiles.items() if settings is not None},
    )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                text = exported.model_dump_json(indent=2).encode()
                archive.addfile(_entry(_STATE, len(text)), io.BytesIO(text))
                for digest in exported.bundles:
                    _add_bundle(archive, store, digest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def open_export(path: Path) -> Iterator[Exported]:
    """Open an export. Nothing is unpacked, so the names in it lead nowhere.

    Args:
        path: the .tar file, or the folder that it was unpacked to.

    Raises:
        RegistryError: code store_damaged; it is none.
    """
    if path.is_dir():
        yield _exported(path, lambda name: _open_plain(path / name))
        return
    with _open_archive(path) as archive:
        yield _exported(path, lambda name: _open_member(archive, name))


def _open_archive(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _damaged(path, str(error)) from None


def _exported(path: Path, open_file: Callable[[str], IO[bytes]]) -> Exported:
    def open_bundle(digest: str) -> IO[bytes]:
        try:
            return open_file(_bundle_name(digest))
        except (KeyError, OSError, tarfile.TarError):
            raise _damaged(path, f"bundle {digest} is missing") from None

    try:
        with open_file(_STATE) as file:
            text = file.read(_MAX_STATE_BYTES)
        return Exported(ExportedState.model_validate_json(text), open_bundle)
    except (KeyError, OSError, tarfile.TarError):
        raise _damaged(path, f"{_STATE} is missing") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise _damaged(path, f"{_STATE}: {quoted(field)}: {first['msg'][:200]}") from None


def _open_plain(path: Path) -> IO[bytes]:
    if not path.is_file():
        raise FileNotFoundError(path)
    return open(path, "rb")


def _open_member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    member = archive.getmember(name)
    file = archive.extractfile(member) if member.isreg() and member.size <= MAX_FILE_BYTES else None
    if file is None:
        raise KeyError(name)
    return file


def _add_bundle(archive: tarfile.TarFile, store: BundleStore, digest: str) -> None:
    try:
        with open(store.path(digest), "rb") as file:
            archive.addfile(_entry(_bundle_name(digest), os.fstat(file.fileno()).st_size), file)
    except FileNotFoundError:
        raise RegistryError(
            RegistryErrorCode.STORE_DAMAGED,
            f"The file of bundle {digest} is missing; try again, or run `expertsteer registry verify`.",
        ) from None


def _entry(name: str, num_bytes: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = num_bytes, 0o644
    return entry


def _bundle_name(digest: str) -> str:
    return f"bundles/{digest.removeprefix('sha256:')}.safetensors"


def _damaged(path: Path, what: str) -> RegistryError:
    return RegistryError(
        RegistryErrorCode.STORE_DAMAGED,
        f"{quoted(str(path), 200)} is no export of a registry ({what}); export it anew.",
    )

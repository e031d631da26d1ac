"""Files of a state store: safetensors shards that are there whole or not at all."""

import errno
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from artifacts.jobs.errors import BuildError

StorageDtype = Literal["float32", "bfloat16"]
SHARD_ROWS: Final = 512
# Memory that the states of one shard may take; fewer rows of a large model make a shard.
SHARD_BYTES: Final = 256 * 2**20
PATTERN: Final = "shard-*.safetensors"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


def bytes_per_row(num_layers: int, hidden_size: int, dtype: StorageDtype = "float32") -> int:
    """Size on disk of one row's states: num_layers * hidden_size numbers (headers of the files apart)."""
    return num_layers * hidden_size * torch.finfo(getattr(torch, dtype)).bits // 8


def rows_per_shard(row_bytes: int) -> int:
    """How many rows of `row_bytes` make one shard, at least one."""
    return max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))


def shard_path(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a shard under another name, make it durable and give it its name: under that name it is whole.

    Raises:
        BuildError: the disk is full or a quota is reached.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        save_file(dict(tensors), temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        if _code(error) not in _FULL:
            raise
        needed = sum(tensor.nbytes for tensor in tensors.values())
        raise BuildError(
            f"the disk of {path.parent} is full: this shard needs {_size(needed)}, "
            f"{_size(shutil.disk_usage(path.parent).free)} are free; make room and start again, finished shards stay"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def is_whole(path: Path, shapes: Mapping[str, tuple[int, int]], dtype: StorageDtype) -> bool:
    """Whether a shard exists and holds these tensors [rows, hidden_size]; its length is checked, not its numbers."""
    if not path.is_file():
        return False
    name = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    try:
        with safe_open(path, framework="pt") as shard:
            found = {key: shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118 - it is no mapping
            return {key: (tuple(each.get_shape()), each.get_dtype()) for key, each in found.items()} == {
                key: (shape, name) for key, shape in shapes.items()
            }
    except SafetensorError:
        return False


def check_space(directory: Path, needed: int) -> None:
    """Check that shards of `needed` bytes in all fit on the disk; those that lie in `directory` already count as room.

    Raises:
        BuildError: they do not.
    """
    directory.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(directory).free + sum(path.stat().st_size for path in directory.rglob(PATTERN))
    if needed > room:
        raise BuildError(
            f"the states need {_size(needed)} in {directory} and there is room for {_size(room)}; make room, give "
            "another work directory, fewer layers or fewer rows, or store them as bfloat16"
        )


def _code(error: OSError | SafetensorError) -> int | None:
    """Number of the system's error; safetensors gives it in words only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return None if found is None else int(found[1])


def _size(num_bytes: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.2f} {unit}"
    return f"{num_bytes} bytes"

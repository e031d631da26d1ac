"""The work directory: results of the steps, written whole or not at all, each with a digest of what made it."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

DONE = "done.json"

Value = TypeVar("Value")


def digest_of(value: object) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write atomically: a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_value(path: Path, kind: type[Value], value: Value) -> None:
    """Write a (nested) dataclass or a tuple of them as JSON, atomically."""
    write_json(path, TypeAdapter(kind).dump_python(value, mode="json"))


def read_value(path: Path, kind: type[Value]) -> Value:
    """Read what `write_value` wrote."""
    return TypeAdapter(kind).validate_json(path.read_bytes())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def is_done(directory: Path, digest: str) -> bool:
    """Whether `directory` holds a finished result of these inputs."""
    marker = directory / DONE
    return marker.is_file() and read_json(marker).get("digest") == digest


def mark_done(directory: Path, digest: str, **figures: object) -> None:
    """Declare the result in `directory` finished; the last write of a step."""
    write_json(directory / DONE, {"digest": digest, **figures})


def fresh_directory(directory: Path) -> Path:
    """`directory`, empty."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    return directory

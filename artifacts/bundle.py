"""Bundles on disk: read with every check before any allocation, written deterministically and atomically."""

import hashlib
import io
import json
import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from artifacts.errors import BundleError, BundleErrorCode, quoted
from artifacts.header import METADATA_KEY, PREFIX_BYTES, Header, TensorEntry, read_header
from artifacts.manifest import SCHEMA, Manifest, from_metadata, to_metadata
from artifacts.rows import check_rows

__all__ = ["CHECKS", "Bundle", "BundleError", "BundleErrorCode", "load_bundle", "parse_bundle", "write_bundle"]

MAX_HEADER_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 30
RUNTIME_PREFIX = "runtime."
CHECKS = ("file", "header", "manifest", "tensors", "values", "digest")
_CHUNK_BYTES = 1 << 20
_RUNTIME_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
OnCheck = Callable[[str, str], None]


@dataclass(frozen=True)
class Bundle:
    """A bundle that passed every check.

    Attributes:
        digest: "sha256:<64 hex>" of the whole file, the identity of the bundle.
        manifest: what the file says about itself.
        num_bytes: size of the file.
        rows: runtime tensors by name, [hidden_size] or, for the plane of a rotation, [2, hidden_size]; fp32, CPU.
        evidence: the tensors that were skipped, in file order.
    """

    digest: str
    manifest: Manifest
    num_bytes: int
    rows: dict[str, Tensor]
    evidence: tuple[TensorEntry, ...] = ()

    def additions(self) -> list[tuple[int, Tensor]]:
        """(layer, row [hidden_size] fp32) of every intervention, for what can do nothing but add.

        Raises:
            BundleError: code NOT_PLAIN_ADD; an intervention does something else, or not to every token.
        """
        found = []
        for step in self.manifest.interventions:
            if not step.is_plain_add:
                what = f"of kind '{step.kind}'" if step.kind != "add" else "an addition with a gate or keep_norm"
                raise BundleError(
                    BundleErrorCode.NOT_PLAIN_ADD,
                    f"The intervention at layer {step.layer} is {what}, and this works for plain additions only; "
                    "steer with it through the server.",
                )
            found += [(step.layer, self.rows[name]) for name in step.tensors]
        return found


class _Data(NamedTuple):
    rows: dict[str, Tensor]
    digest: str


def load_bundle(path: Path, on_check: OnCheck | None = None) -> Bundle:
    """Read and check a bundle. Only its runtime tensors are held in memory; evidence is hashed and skipped.

    Args:
        path: a regular file, or a link to one.
        on_check: called with the name of each passed check (`CHECKS`, in order) and what it found.

    Raises:
        BundleError: the file is no valid bundle; nothing else is raised whatever the file holds.
    """
    with _open_regular(path) as file:
        try:
            return _read(file, os.fstat(file.fileno()).st_size, on_check or _ignore)
        except OSError as error:
            raise _unreadable(path, error) from None


def parse_bundle(data: bytes) -> Bundle:
    """Check a bundle held in memory. Same checks, results and errors as `load_bundle`."""
    return _read(io.BytesIO(data), len(data), _ignore)


def write_bundle(path: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> str:
    """Write a bundle and return its digest, "sha256:<64 hex>".

    Equal input gives equal bytes. The file appears at `path` complete and checked by `load_bundle`, or not at all.

    Args:
        path: where to write; an existing file is replaced. The folder must exist.
        manifest: must name exactly the runtime tensors in `tensors`.
        tensors: by name; runtime tensors [hidden_size] or [2, hidden_size], fp32 | fp16 | bf16; evidence of any shape
            and common dtype.

    Raises:
        BundleError: the result would be no valid bundle.
        OSError: the folder cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # wide dtypes first: aligned
    header = _encode_header(manifest, tensors, order)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(header)
            for name in order:
                file.write(_raw_bytes(tensors[name]))
            file.flush()
            os.fsync(file.fileno())
        digest = load_bundle(temporary).digest
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return digest


def _ignore(check: str, found: str) -> None:
    """Listen to no checks."""


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file; directories, pipes and devices are refused without being read."""
    try:
        # Opening a pipe would otherwise block until someone writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise BundleError(
            BundleErrorCode.NOT_A_FILE, f"{quoted(str(path), 200)} is {kind}; name the .safetensors file itself."
        )
    return os.fdopen(descriptor, "rb")


def _unreadable(path: Path, error: Exception) -> BundleError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return BundleError(
        BundleErrorCode.UNREADABLE,
        f"{quoted(str(path), 200)} cannot be read ({reason}); check the path and its permissions.",
    )


def _read(file: BinaryIO, num_bytes: int, on_check: OnCheck) -> Bundle:
    """Run `CHECKS` in order, in one pass over the file, so that what is hashed is what is loaded."""
    if num_bytes > MAX_FILE_BYTES:
        raise BundleError(
            BundleErrorCode.TOO_LARGE,
            f"The file has {num_bytes} bytes, more than the {MAX_FILE_BYTES} a bundle may have; leave evidence out.",
        )
    on_check("file", f"{num_bytes} bytes")
    header = read_header(file, num_bytes, MAX_HEADER_BYTES)
    on_check("header", f"{header.data_start - PREFIX_BYTES} bytes, {len(header.tensors)} tensors, no gap, no overlap")
    manifest = from_metadata(header.metadata)
    kinds = ", ".join(dict.fromkeys(step.kind for step in manifest.interventions))
    on_check("manifest", f"{manifest.name}, schema {SCHEMA}, {len(manifest.interventions)} interventions ({kinds})")
    _check_tensors(header, manifest)
    evidence = tuple(entry for entry in header.tensors if not entry.name.startswith(RUNTIME_PREFIX))
    num_runtime = len(header.tensors) - len(evidence)
    on_check("tensors", f"{num_runtime} runtime of [{manifest.target.hidden_size}], {len(evidence)} evidence")
    data = _read_data(file, header)
    norms = check_rows(manifest.interventions, data.rows)
    on_check("values", f"finite, norms {norms.smallest:.6g} to {norms.largest:.6g}")
    on_check("digest", data.digest)
    return Bundle(data.digest, manifest, num_bytes, data.rows, evidence)


def _check_tensors(header: Header, manifest: Manifest) -> None:
    """Hold the runtime tensors in the header against the manifest: names, dtypes, shapes."""
    runtime = {entry.name: entry for entry in header.tensors if entry.name.startswith(RUNTIME_PREFIX)}
    planes = {step.read for step in manifest.interventions if step.kind == "rotate"}
    named = [name for step in manifest.interventions for name in step.tensors]
    for name in named:
        if name not in runtime:
            raise BundleError(
                BundleErrorCode.MISSING_TENSOR, f"The manifest names {name} and the file lacks it; build it again."
            )
    for name in sorted(runtime.keys() - set(named)):
        raise BundleError(
            BundleErrorCode.UNNAMED_TENSOR,
            f"The file holds {quoted(name)} and no intervention names it; remove it or list it in the manifest.",
        )
    for name, entry in runtime.items():
        if entry.dtype not in _RUNTIME_DTYPES:
            raise BundleError(
                BundleErrorCode.UNSAFE_DTYPE,
                f"{name} has dtype {entry.dtype}; runtime tensors must be F32, F16 or BF16, so convert it.",
            )
        expected = (2,) * (name in planes) + (manifest.target.hidden_size,)
        if entry.shape != expected:
            raise BundleError(
                BundleErrorCode.WRONG_SHAPE,
                f"{name} has shape {list(entry.shape)} and its kind and the target's hidden size ask for "
                f"{list(expected)}; build the bundle for this target.",
            )


def _read_data(file: BinaryIO, header: Header) -> _Data:
    """Read the data section once: hash everything, keep the runtime tensors."""
    digest = hashlib.sha256(header.raw)
    rows: dict[str, Tensor] = {}
    for entry in header.tensors:
        if entry.name.startswith(RUNTIME_PREFIX):
            buffer = bytearray(_read_exactly(file, entry.num_bytes))
            digest.update(buffer)
            flat = torch.frombuffer(buffer, dtype=_RUNTIME_DTYPES[entry.dtype])
            rows[entry.name] = flat.to(torch.float32).reshape(entry.shape)
        else:
            for start in range(0, entry.num_bytes, _CHUNK_BYTES):
                digest.update(_read_exactly(file, min(_CHUNK_BYTES, entry.num_bytes - start)))
    return _Data(rows, f"sha256:{digest.hexdigest()}")


def _read_exactly(file: BinaryIO, num_bytes: int) -> bytes:
    data = file.read(num_bytes)
    if len(data) < num_bytes:  # the size was checked, so someone shortened the file meanwhile
        raise BundleError(
            BundleErrorCode.TRUNCATED, f"The file ended {num_bytes - len(data)} bytes early while read; copy it again."
        )
    return data


def _encode_header(manifest: Manifest, tensors: dict[str, Tensor], order: list[str]) -> bytes:
    """Return length and JSON. Written here because the safetensors library orders metadata at random."""
    root: dict[str, object] = {METADATA_KEY: to_metadata(manifest)}
    position = 0
    for name in order:
        tensor = tensors[name]
        if name == METADATA_KEY or tensor.dtype not in _DTYPE_NAMES:
            raise BundleError(
                BundleErrorCode.UNSAFE_DTYPE,
                f"Tensor {quoted(name)} of {tensor.dtype} cannot be stored; rename it or convert it to float32.",
            )
        end = position + tensor.numel() * tensor.element_size()
        root[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(root, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data section starts aligned
    return len(header).to_bytes(PREFIX_BYTES, "little") + header


def _raw_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's values, row-major and little-endian (as on every machine torch runs on)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

"""Vectors without any metadata: NumPy and plain safetensors files.

* `.npy`: one array, [hidden_size] or [num_layers, hidden_size].
* `.safetensors`: tensors `layer.{l}` [hidden_size], l the 0-based decoder block; or one tensor of any name with a shape
  as above.

Values are fp16, fp32 or fp64 (safetensors: bf16 too) and become fp32. In a matrix a row of zeros is a layer that is not
steered. A single vector does not say where it acts, so its layer must be given.
"""

import io
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from artifacts.bundle import MAX_HEADER_BYTES
from artifacts.errors import BundleError, quoted
from artifacts.header import Header, read_header
from artifacts.interchange.whole_file import check_regular, written_whole
from artifacts.jobs.errors import BuildError
from artifacts.manifest import FORMAT

_LAYER = re.compile(r"layer\.(0|[1-9][0-9]{0,8})")
_DTYPES = ("F64", "F32", "F16", "BF16")


class RawVectors(NamedTuple):
    """What a file without metadata holds.

    Attributes:
        vectors: by 0-based decoder block, [hidden_size], fp32.
        num_rows: rows of the file where it is a matrix with one row per layer, else None.
    """

    vectors: dict[int, Tensor]
    num_rows: int | None


def read_npy(path: Path, layer: int | None) -> RawVectors:
    """Read a `.npy` file; pickled objects are never loaded.

    Args:
        path: of the file.
        layer: where a single vector acts; None when the file is a matrix.

    Raises:
        BuildError: no such file, damaged, another dtype or shape.
    """
    return _from_array(path, read_array(path), layer)


def read_array(path: Path) -> Tensor:
    """Return the array of a `.npy` file, any shape, as fp32. Errors as in `read_npy`, but for the shape."""
    check_regular(path)
    try:
        array = _parse_npy(path.read_bytes())
    except OSError as error:
        raise BuildError(f"{quoted(str(path), 200)} cannot be read ({error.strerror}); check the path") from None
    # NumPy evaluates the header as a Python literal, and the tokenizer behind that raises many things.
    except Exception as error:
        cause = quoted(" ".join(str(error).split()), 160)
        raise BuildError(
            f"{quoted(str(path), 200)} is no .npy file of floats: {cause}; save it with np.save as float32"
        ) from error
    return torch.from_numpy(array)


def read_tensor(path: Path, name: str) -> Tensor:
    """Return one tensor of a `.safetensors` file, any shape, as fp32.

    Raises:
        BuildError: no such file or tensor, damaged, or another dtype.
    """
    num_bytes = check_regular(path)
    try:
        with path.open("rb") as file:
            header = read_header(file, num_bytes, MAX_HEADER_BYTES)
        dtypes = {entry.name: entry.dtype for entry in header.tensors}
        if dtypes.get(name) not in _DTYPES:
            held = quoted(sorted(dtypes)) if name not in dtypes else f"it as {dtypes[name]}"
            raise BuildError(
                f"{quoted(str(path), 200)} holds {held}, and tensor {quoted(name)} as one of {', '.join(_DTYPES)} is "
                "asked for; check the name"
            )
        with safe_open(path, framework="pt") as content:
            tensor: Tensor = content.get_tensor(name).float()
            return tensor
    except (BundleError, SafetensorError) as error:
        raise BuildError(f"{quoted(str(path), 200)}: {error}") from None
    except OSError as error:
        raise BuildError(f"{quoted(str(path), 200)} cannot be read ({error.strerror}); check the path") from None


def read_safetensors(path: Path, layer: int | None) -> RawVectors:
    """Read a plain `.safetensors` file. Arguments and errors as in `read_npy`."""
    num_bytes = check_regular(path)
    try:
        with path.open("rb") as file:
            header = read_header(file, num_bytes, MAX_HEADER_BYTES)
        names = _names_by_layer(path, header)
        with safe_open(path, framework="pt") as content:
            if names is None:
                return _from_array(path, content.get_tensor(header.tensors[0].name).float(), layer)
            return RawVectors({number: content.get_tensor(names[number]).float() for number in sorted(names)}, None)
    except (BundleError, SafetensorError) as error:
        raise BuildError(f"{quoted(str(path), 200)}: {error}") from None
    except OSError as error:
        raise BuildError(f"{quoted(str(path), 200)} cannot be read ({error.strerror}); check the path") from None


def write_npy(path: Path, vectors: Mapping[int, Tensor], num_layers: int) -> None:
    """Write [num_layers, hidden_size], fp32, zeros where no vector is given."""
    width = next(iter(vectors.values())).numel()
    rows = np.zeros((num_layers, width), dtype=np.float32)
    for layer, vector in vectors.items():
        rows[layer] = vector.detach().cpu().float().numpy()
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.save(file, rows, allow_pickle=False)


def write_safetensors(path: Path, vectors: Mapping[int, Tensor]) -> None:
    """Write one tensor `layer.{l}` [hidden_size], fp32, per vector."""
    with written_whole(path) as temporary:
        save_file(
            {f"layer.{layer}": vector.detach().cpu().float().contiguous() for layer, vector in vectors.items()},
            temporary,
        )


def _parse_npy(data: bytes) -> np.ndarray:
    """Return the array as fp32. The size is held against the file before anything is allocated."""
    stream = io.BytesIO(data)
    with warnings.catch_warnings():
        # A header of Python 2 and a value too large for fp32 are warnings to NumPy and refusals here.
        warnings.simplefilter("error")
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} is not 1.0 or 2.0")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, columns_first, dtype = read(stream)
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise ValueError(f"it holds {dtype}, and float16, float32 or float64 is needed")
        needed, given = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
        if needed != given or min(shape, default=0) <= 0:
            raise ValueError(f"its shape {shape} asks for {needed} bytes and {given} follow")
        values = np.frombuffer(data, dtype, offset=stream.tell())
        return values.reshape(shape, order="F" if columns_first else "C").astype(np.float32)


def _names_by_layer(path: Path, header: Header) -> dict[int, str] | None:
    """Return tensor names by layer, or None when the file is one tensor of another name."""
    if header.metadata.get("format") == FORMAT:
        raise BuildError(
            f"{quoted(str(path), 200)} is a bundle already; serve it, or look into it with `bundle inspect`"
        )
    for entry in header.tensors:
        if entry.dtype not in _DTYPES:
            raise BuildError(f"{quoted(entry.name)} has dtype {entry.dtype}; save it as one of {', '.join(_DTYPES)}")
    matches = {entry.name: _LAYER.fullmatch(entry.name) for entry in header.tensors}
    names = {int(match[1]): name for name, match in matches.items() if match}
    if not names and len(header.tensors) == 1:
        return None
    if not names or len(names) < len(matches):
        other = [name for name, match in matches.items() if not match]
        raise BuildError(
            f"{quoted(str(path), 200)} holds {len(matches)} tensors, among them {quoted(other)}; "
            "name them layer.0, layer.1 ..., or store one [num_layers, hidden_size] tensor"
        )
    for entry in header.tensors:
        if len(entry.shape) != 1:
            raise BuildError(f"{quoted(entry.name)} has shape {list(entry.shape)}; one vector [hidden_size] is needed")
    return names


def _from_array(path: Path, array: Tensor, layer: int | None) -> RawVectors:
    """Take a vector at `layer`, or every row of a matrix that is not zero."""
    if array.ndim == 1:
        if layer is None:
            raise BuildError(f"{quoted(str(path), 200)} is one vector and does not say where it acts; give one --layer")
        return RawVectors({layer: array}, None)
    if array.ndim != 2:
        raise BuildError(
            f"{quoted(str(path), 200)} has shape {list(array.shape)}; "
            "[hidden_size] or [num_layers, hidden_size] is needed"
        )
    return RawVectors({number: row for number, row in enumerate(array) if bool(row.any())}, len(array))

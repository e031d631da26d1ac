"""The header of a safetensors file, checked byte by byte before anything is allocated.

Layout: 8 bytes little-endian header length N, N bytes of JSON, then the data section. The JSON maps each tensor name
to `{"dtype", "shape", "data_offsets": [begin, end]}` (offsets into the data section) and `__metadata__` to strings.
"""

import math
from dataclasses import dataclass
from typing import BinaryIO

from artifacts import strict_json
from artifacts.errors import BundleError, BundleErrorCode, quoted

MAX_RANK = 8
METADATA_KEY = "__metadata__"
PREFIX_BYTES = 8
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_FOREIGN_MAGIC = {
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a NumPy array file",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
}
_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
_PICKLE_PROTOCOLS = range(2, 6)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor's place in the file. `begin` and `end` are byte offsets into the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in the file."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A checked header. `tensors` are in file order and fill the data section without gap or overlap."""

    raw: bytes
    metadata: dict[str, str]
    tensors: tuple[TensorEntry, ...]

    @property
    def data_start(self) -> int:
        """Byte offset of the data section in the file."""
        return len(self.raw)


def read_header(file: BinaryIO, num_bytes: int, max_header_bytes: int) -> Header:
    """Read and check the header of a safetensors file of `num_bytes` bytes, from the file's current position.

    Reads at most `8 + max_header_bytes` bytes; the file is left at the start of the data section.

    Raises:
        BundleError: empty, pickle, another format, truncated, header over the limit, or an inconsistent header.
    """
    if num_bytes == 0:
        raise BundleError(BundleErrorCode.EMPTY, "The file is empty (0 bytes); copy or build it again.")
    prefix = file.read(PREFIX_BYTES)
    if len(prefix) < PREFIX_BYTES:
        _refuse_foreign(prefix)
        raise _truncated(f"it ends after {len(prefix)} of the 8 bytes of its header length")
    length = int.from_bytes(prefix, "little")
    if length > max_header_bytes:
        _refuse_foreign(prefix)
        raise BundleError(
            BundleErrorCode.HEADER_TOO_LARGE,
            f"The header claims {length} bytes, more than the {max_header_bytes} allowed; "
            "the file is damaged or no safetensors file.",
        )
    if length > num_bytes - PREFIX_BYTES:
        _refuse_foreign(prefix)
        raise _truncated(f"its header claims {length} bytes and {num_bytes - PREFIX_BYTES} follow")
    text = file.read(length)
    if len(text) < length:
        raise _truncated(f"its header claims {length} bytes and {len(text)} could be read")
    if not text.startswith(b"{"):
        _refuse_foreign(prefix)
        raise _bad(f"it starts with {quoted(text[:8])}, not with '{{'")
    metadata, tensors = _parse(text)
    _check_layout(tensors, num_bytes - PREFIX_BYTES - length)
    return Header(prefix + text, metadata, tensors)


def _refuse_foreign(prefix: bytes) -> None:
    """Name the formats people hand over by mistake. Only called once the bytes have failed as safetensors."""
    remedy = "a bundle is one .safetensors file, as `expertsteer build` writes it."
    if prefix.startswith(_ZIP_MAGIC):
        raise BundleError(
            BundleErrorCode.PICKLE,
            f"This is a zip archive, such as torch.save writes, and pickles inside can run code; {remedy}",
        )
    if len(prefix) >= 2 and prefix[0] == 0x80 and prefix[1] in _PICKLE_PROTOCOLS:
        raise BundleError(
            BundleErrorCode.PICKLE,
            f"This is a Python pickle (protocol {prefix[1]}), which can run code when read; {remedy}",
        )
    for magic, kind in _FOREIGN_MAGIC.items():
        if prefix.startswith(magic):
            raise BundleError(BundleErrorCode.FOREIGN_FORMAT, f"This is {kind}; {remedy}")


def _truncated(what: str) -> BundleError:
    return BundleError(BundleErrorCode.TRUNCATED, f"The file is cut off: {what}; copy or build it again.")


def _bad(what: str) -> BundleError:
    return BundleError(BundleErrorCode.BAD_HEADER, f"The safetensors header is invalid: {what}; build the file again.")


def _parse(text: bytes) -> tuple[dict[str, str], tuple[TensorEntry, ...]]:
    """Return the metadata and the tensors in file order."""
    try:
        root = strict_json.loads(text)
    except ValueError as error:
        raise _bad(f"{quoted(str(error), 120)}") from None
    if not isinstance(root, dict):
        raise _bad("it is not a JSON object")
    metadata = root.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(f"{METADATA_KEY} does not map strings to strings")
    tensors = [_entry(name, fields) for name, fields in root.items()]
    return metadata, tuple(sorted(tensors, key=lambda entry: (entry.begin, entry.end, entry.name)))


def _entry(name: str, fields: object) -> TensorEntry:
    """Check one tensor by itself: known dtype, sane shape, and a byte range of exactly the size both imply."""
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(f"tensor {quoted(name)} does not hold exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _bad(f"tensor {quoted(name)} has unknown dtype {quoted(dtype)}")
    # The rank limit also keeps the product below cheap: without it, one header can ask for a number of megabytes.
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise _bad(f"tensor {quoted(name)} has shape {quoted(shape)}, not at most {MAX_RANK} sizes of 0 to 2^63 - 1")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _bad(f"tensor {quoted(name)} has data_offsets {quoted(offsets)}, not [begin, end]")
    begin, end = offsets
    num_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if num_bits != (end - begin) * 8:
        raise _bad(
            f"tensor {quoted(name)} ({dtype} {shape}) needs {num_bits / 8 if num_bits % 8 else num_bits // 8} bytes "
            f"and data_offsets {offsets} give {end - begin}"
        )
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def _are_sizes(values: object) -> bool:
    """True for a list of integers in [0, 2^63). JSON's true and false are Python integers, so types are compared."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_layout(tensors: tuple[TensorEntry, ...], data_bytes: int) -> None:
    """Refuse overlaps, gaps and left-over bytes, where a second file could hide."""
    position = 0
    for entry in tensors:
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise _bad(f"tensor {quoted(entry.name)} starts at byte {entry.begin}, not {position}: it {what}")
        position = entry.end
    if position > data_bytes:
        raise _truncated(f"its tensors need {position} bytes and {data_bytes} follow the header")
    if position < data_bytes:
        raise _bad(f"{data_bytes - position} bytes follow the last tensor and belong to none")

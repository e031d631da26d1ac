"""The header of a GGUF file, checked within a fixed budget before the `gguf` package walks it.

The package trusts the counts in a file: a claimed array of 2^60 numbers keeps it busy, and growing, for ever. After
this check every count is small and every byte it announces is there. The format is specified in ggml's docs/gguf.md.
"""

import struct

from gguf import GGUFValueType

MAX_HEADER_BYTES = 1 << 20
MAX_KEYS = 1024
MAX_TENSORS = 4096
# Numbers and strings in all arrays together; a control vector needs none.
MAX_ARRAY_ITEMS = 16384
MAX_RANK = 4
MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALAR_BYTES = {
    GGUFValueType.UINT8: 1, GGUFValueType.INT8: 1, GGUFValueType.BOOL: 1, GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2, GGUFValueType.UINT32: 4, GGUFValueType.INT32: 4, GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8, GGUFValueType.INT64: 8, GGUFValueType.FLOAT64: 8,
}  # fmt: skip


def check_gguf_header(data: bytes) -> None:
    """Walk keys and tensor entries of a GGUF file.

    Args:
        data: the first `MAX_HEADER_BYTES` of the file, or all of a shorter one.

    Raises:
        ValueError: not GGUF, another version or byte order, a count over its bound, or a header that runs past `data`.
    """
    cursor = _Cursor(data)
    if cursor.take(len(MAGIC)) != MAGIC:
        raise ValueError(f"it starts with {data[:4]!r}, not with {MAGIC!r}")
    version = cursor.number(4)
    if version not in VERSIONS:
        raise ValueError(f"it has version {version}; little-endian versions 2 and 3 are read")
    num_tensors, num_keys = cursor.number(8), cursor.number(8)
    for what, count, bound in (("tensors", num_tensors, MAX_TENSORS), ("keys", num_keys, MAX_KEYS)):
        if count > bound:
            raise ValueError(f"it claims {count} {what}, more than the {bound} allowed")
    for _ in range(num_keys):
        cursor.text()
        _skip_value(cursor)
    for _ in range(num_tensors):
        cursor.text()
        rank = cursor.number(4)
        if rank > MAX_RANK:
            raise ValueError(f"a tensor claims {rank} dimensions, more than the {MAX_RANK} allowed")
        # Sizes, then the type (4 bytes) and the offset (8 bytes).
        cursor.take(8 * rank + 12)


class _Cursor:
    """Reads forward through bytes and never past their end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self.array_items = 0

    def take(self, num_bytes: int) -> bytes:
        end = self._position + num_bytes
        if end > len(self._data):
            raise ValueError(f"its header runs past byte {len(self._data)}, where the file or the allowance ends")
        part = self._data[self._position : end]
        self._position = end
        return part

    def number(self, num_bytes: int) -> int:
        value: int = struct.unpack("<I" if num_bytes == 4 else "<Q", self.take(num_bytes))[0]
        return value

    def text(self) -> None:
        self.take(self.number(8))


def _skip_value(cursor: _Cursor) -> None:
    kind = cursor.number(4)
    if kind != GGUFValueType.ARRAY:
        _skip_items(cursor, kind, 1)
        return
    kind, count = cursor.number(4), cursor.number(8)
    cursor.array_items += count
    if cursor.array_items > MAX_ARRAY_ITEMS:
        raise ValueError(f"its arrays claim {cursor.array_items} items, more than the {MAX_ARRAY_ITEMS} allowed")
    _skip_items(cursor, kind, count)


def _skip_items(cursor: _Cursor, kind: int, count: int) -> None:
    if kind == GGUFValueType.STRING:
        for _ in range(count):
            cursor.text()
    elif kind in _SCALAR_BYTES:
        cursor.take(count * _SCALAR_BYTES[GGUFValueType(kind)])
    else:
        raise ValueError(f"a value has type {kind}, which is no number, string or flat array of those")

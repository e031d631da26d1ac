"""Damaged bundle files, as Hypothesis strategies over the bytes of a good one."""

import copy
import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

_LENGTH_BYTES = 8
_NANS = (math.nan, math.inf, -math.inf)
# Beyond what any bundle may declare, and beyond what a file system or an integer holds.
_LENGTHS = (0, 1, 7, 2**20, 100 * 2**20, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)

JSON_VALUES: SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**400, -1, 0])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["\ud800", "\x00", "\x1b[2J", "add", "runtime.2.0.write", "sha256:" + "0" * 64]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


def file_of(header: Any, data: bytes) -> bytes:
    """A safetensors file of a header, as JSON or in bytes, and the bytes of its tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text + data


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in children for place in [(*path, key), *places_in(child, (*path, key))]]


def replaced(root: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy of a JSON value with the value at one place replaced."""
    root = inner = copy.deepcopy(root)
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return root


def mutations(good: bytes) -> SearchStrategy[bytes]:
    """Files that a careless or hostile sender might send in place of a good bundle; a few are good as well.

    Args:
        good: a bundle file.
    """
    length = int.from_bytes(good[:_LENGTH_BYTES], "little")
    text, data = good[_LENGTH_BYTES : _LENGTH_BYTES + length], good[_LENGTH_BYTES + length :]
    header = json.loads(text)
    manifest = json.loads(header["__metadata__"]["manifest"])
    names = [name for name in header if name != "__metadata__"]

    def with_manifest(changed: Any) -> bytes:
        metadata = {**header["__metadata__"], "manifest": json.dumps(changed)}
        return file_of({**header, "__metadata__": metadata}, data)

    def with_field(name: str, field: str, value: Any) -> bytes:
        return file_of({**header, name: {**header[name], field: value}}, data)

    offsets = st.tuples(st.integers(-1, 2 * len(data)), st.integers(-1, 2 * len(data))).map(list)
    shapes = st.lists(st.sampled_from([0, 1, 2, 127, 128, 129, 2**31, 2**62]), max_size=3)
    damages = (
        # Bytes: cut off, flipped, spliced, made up.
        st.integers(0, len(good) - 1).map(lambda end: good[:end]),
        st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(1, 255)), min_size=1, max_size=8).map(
            lambda flips: _flipped(good, flips)
        ),
        st.builds(
            lambda start, width, new: good[:start] + new + good[start + width :],
            st.integers(0, len(good)),
            st.integers(0, 64),
            st.binary(max_size=64),
        ),
        st.binary(max_size=200) | st.binary(max_size=200).map(lambda some: file_of(b"{" + some, data)),
        st.sampled_from(_LENGTHS).map(lambda wrong: wrong.to_bytes(_LENGTH_BYTES, "little") + text + data),
        # Header: any value anywhere, tensors that overlap, of other shapes or types, named twice.
        st.builds(
            lambda place, value: file_of(replaced(header, place, value), data),
            st.sampled_from(places_in(header)),
            JSON_VALUES,
        ),
        st.builds(with_field, st.sampled_from(names), st.just("data_offsets"), offsets),
        st.builds(with_field, st.sampled_from(names), st.just("shape"), shapes),
        st.builds(
            with_field, st.sampled_from(names), st.just("dtype"), st.sampled_from(["F16", "F64", "I8", "F8_E4M3"])
        ),
        st.sampled_from(names).map(lambda name: file_of(_named_twice(text, name, header[name]), data)),
        # Manifest: any value anywhere, a key twice.
        st.builds(
            lambda place, value: with_manifest(replaced(manifest, place, value)),
            st.sampled_from(places_in(manifest)),
            JSON_VALUES,
        ),
        st.sampled_from(sorted(manifest)).map(
            lambda name: file_of(_with_manifest_text(header, _named_twice_text(manifest, name)), data)
        ),
        # Tensors: values that are no numbers.
        st.builds(
            lambda place, value: _with_value(good, length, len(data), place, value),
            st.integers(0),
            st.sampled_from(_NANS),
        ),
        # Something else in disguise, alone or behind a good header.
        st.sampled_from([_zip(good), pickle.dumps(_Evil()), b"GIF89a", b"\x1f\x8b\x08" + bytes(20)]).flatmap(
            lambda other: st.sampled_from([other, file_of(other, data), good + other, good[:64] + other])
        ),
    )
    return st.one_of(*damages)


def run(good: bytes, num_files: int, check: Callable[[bytes], None], number: int = 0) -> None:
    """Call a check with so many damaged files; the first that fails is made small and raised.

    Args:
        good: bundle file to damage.
        num_files: how many.
        check: raises AssertionError for a file that is not treated as it should be.
        number: of the run; another one draws other files.
    """

    @seed(number)
    @settings(
        max_examples=num_files,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(good))
    def every(data: bytes) -> None:
        check(data)

    every()


class _Evil:
    """Does harm where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit",))


def _flipped(good: bytes, flips: list[tuple[int, int]]) -> bytes:
    data = bytearray(good)
    for position, mask in flips:
        data[position] ^= mask
    return bytes(data)


def _named_twice(text: bytes, name: str, entry: Any) -> bytes:
    return b"{" + json.dumps(name).encode() + b": " + json.dumps(entry).encode() + b"," + text.lstrip()[1:]


def _named_twice_text(manifest: Any, name: str) -> str:
    return _named_twice(json.dumps(manifest).encode(), name, manifest[name]).decode()


def _with_manifest_text(header: Any, text: str) -> Any:
    return {**header, "__metadata__": {**header["__metadata__"], "manifest": text}}


def _with_value(good: bytes, length: int, num_bytes: int, place: int, value: float) -> bytes:
    position = _LENGTH_BYTES + length + place % (num_bytes // 4) * 4
    return good[:position] + struct.pack("<f", value) + good[position + 4 :]


def _zip(good: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("bundle.safetensors", good)
    return file.getvalue()

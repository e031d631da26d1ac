"""The one property of the bundle loader: any bytes give a valid Bundle or a BundleError, never anything else."""

import copy
import json
import math
import random
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.bundle import BundleError, parse_bundle

HIDDEN_SIZE = 8
ROW = "runtime.2.0.write"
DATA = struct.pack("<8f", *range(1, 9))
MANIFEST: dict[str, Any] = {
    "name": "careful",
    "target": {"id": "target", "architecture": "LlamaForCausalLM", "hidden_size": HIDDEN_SIZE, "num_layers": 4},
    "expert": {"id": "expert", "architecture": "Qwen2ForCausalLM", "hidden_size": 12, "num_layers": 3},
    "layer_pairs": [{"expert": 1, "target": 2, "scores": {"held_out": 0.5}}],
    "interventions": [{"layer": 2, "kind": "add", "write": ROW, "parameters": {}}],
    "recommended_strength": 0.5,
    "maximum_strength": 1.0,
    "scope": "all",
    "evaluation": {"accuracy": {"off": 0.1, "on": 0.8}},
    "tool_versions": {"torch": "2"},
    "seed": 0,
}


def header_of(manifest: Any, dtype: str = "F32", num_bytes: int = len(DATA)) -> dict[str, Any]:
    metadata = {"format": "expertsteer-bundle", "schema": "1", "manifest": json.dumps(manifest)}
    return {"__metadata__": metadata, ROW: {"dtype": dtype, "shape": [HIDDEN_SIZE], "data_offsets": [0, num_bytes]}}


def file_of(header: Any, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


GOOD = file_of(header_of(MANIFEST))


def check_outcome(data: bytes) -> bool:
    """Assert the property; True when the bytes were accepted."""
    try:
        bundle = parse_bundle(data)
    except BundleError as error:
        assert str(error).isprintable(), str(error)
        assert len(str(error)) < 900
        return False
    manifest = bundle.manifest
    assert 0 < manifest.maximum_strength < math.inf
    assert abs(manifest.recommended_strength) <= manifest.maximum_strength
    assert {step.write for step in manifest.interventions} == bundle.writes.keys()
    assert all(0 <= step.layer < manifest.target.num_layers for step in manifest.interventions)
    for row in bundle.writes.values():
        assert row.shape == (manifest.target.hidden_size,)
        assert torch.isfinite(row).all()
        assert row.any()
    json.dumps(manifest.model_dump(mode="json"), ensure_ascii=False, allow_nan=False).encode()
    return True


def test_the_seed_of_all_mutations_is_good() -> None:
    assert check_outcome(GOOD)


def test_every_truncation_is_refused() -> None:
    for length in range(len(GOOD)):
        assert not check_outcome(GOOD[:length]), length


def test_every_single_bit_flip() -> None:
    for position in range(len(GOOD)):
        for bit in range(8):
            data = bytearray(GOOD)
            data[position] ^= 1 << bit
            check_outcome(bytes(data))


@given(flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(1, 255)), min_size=2, max_size=8))
@settings(max_examples=500, deadline=None)
def test_several_flipped_bytes(flips: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for position, mask in flips:
        data[position] ^= mask
    check_outcome(bytes(data))


@given(start=st.integers(0, len(GOOD)), length=st.integers(0, 64), replacement=st.binary(max_size=64))
@settings(max_examples=500, deadline=None)
def test_spliced_bytes(start: int, length: int, replacement: bytes) -> None:
    check_outcome(GOOD[:start] + replacement + GOOD[start + length :])


@given(data=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes(data: bytes) -> None:
    check_outcome(data)
    check_outcome(file_of(data))
    check_outcome(file_of(b"{" + data))


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**400, -1, 0])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["\ud800", "\x00", "\x1b[2J", "add", ROW, "sha256:" + "0" * 64]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


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


@given(place=st.sampled_from(places_in(MANIFEST)), value=JSON_VALUES)
@settings(max_examples=1000, deadline=None)
def test_any_value_anywhere_in_the_manifest(place: tuple[Any, ...], value: Any) -> None:
    check_outcome(file_of(header_of(replaced(MANIFEST, place, value))))


@given(place=st.sampled_from(places_in(header_of(MANIFEST))), value=JSON_VALUES)
@settings(max_examples=1000, deadline=None)
def test_any_value_anywhere_in_the_header(place: tuple[Any, ...], value: Any) -> None:
    check_outcome(file_of(replaced(header_of(MANIFEST), place, value)))


@pytest.mark.parametrize("depth", [50, 150, 190, 200, 210, 255, 500, *range(880, 1001, 5), 2000])
def test_nesting_of_every_depth(depth: int) -> None:
    nest = "[" * depth + "]" * depth
    for field in ('"off": 0.1', '"seed": 0'):
        name = field.partition(":")[0]
        header = header_of(MANIFEST)
        text = json.dumps(MANIFEST)
        header["__metadata__"]["manifest"] = text.replace(field, f"{name}: {nest}")
        check_outcome(file_of(header))
    text = json.dumps(header_of(MANIFEST))
    for change in (nest, "[" * depth, '{"a":' * depth + "1" + "}" * depth):
        assert not check_outcome(file_of(text.replace("[8]", change).encode()))


def test_random_values_are_finite_or_refused() -> None:
    generator = random.Random(0)
    accepted = 0
    for _ in range(300):
        for dtype, num_bytes in (("F32", 32), ("F16", 16), ("BF16", 16)):
            data = generator.randbytes(num_bytes)
            accepted += check_outcome(file_of(header_of(MANIFEST, dtype, num_bytes), data))
    assert 0 < accepted < 900

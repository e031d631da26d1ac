"""The one property of the bundle loader: any bytes give a valid Bundle or a BundleError, never anything else.

Valid means that the engine can run it: whatever is accepted lowers to a program that stays inside its rows and gates.
"""

import json
import math
import random
import struct
from collections import Counter
from typing import Any

import mutations
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import JSON_VALUES, places_in, replaced

from artifacts.bundle import Bundle, BundleError, parse_bundle
from server.lowering import lower
from steering_kernels import MAX_OPS, NUM_GATES, Kind

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
    return mutations.file_of(header, data)


GOOD = file_of(header_of(MANIFEST))


def step(layer: int, kind: str, *roles: str, **fields: Any) -> dict[str, Any]:
    return {"layer": layer, "kind": kind, **{role: f"runtime.{layer}.0.{role}" for role in roles}, **fields}


GATE = {"threshold": 0.5, "slope": -2.0}
GATE_OF_FEATURE = {"bias": -1.0, "activation": "jump_relu", "threshold": 0.5, "edit": "add", "value": 2.0}
# One of each kind, all at layers of their own.
EVERY_KIND: dict[str, Any] = {
    "name": "kinds",
    "target": {"id": "target", "architecture": "LlamaForCausalLM", "hidden_size": HIDDEN_SIZE, "num_layers": 9},
    "interventions": [
        step(0, "condition", "read", sets="open", parameters={"threshold": 1.0, "below": True}),
        step(1, "add", "write", gate="open", keep_norm=True),
        step(2, "add_relative", "write", gate="early"),
        step(3, "project", "read", gate="blank"),
        step(4, "clamp", "read", parameters={"minimum": -1.0, "maximum": 2.0}),
        step(5, "gated_add", "read", "write", parameters=GATE | {"cosine": True}),
        step(6, "feature", "read", "write", parameters=GATE_OF_FEATURE),
        step(7, "rotate", "read", parameters={"angle": 1.5, "mode": "absolute"}),
        step(8, "affine", "read", "write"),
    ],
    "triggers": {"early": {"token_ids": [7, 9]}, "blank": {"text_contains": "\n\n"}},
    "recommended_strength": 0.5,
    "maximum_strength": 1.0,
    "exclude": ["tool_calls", "reasoning"],
}


def every_kind_header(manifest: Any) -> dict[str, Any]:
    """Every tensor but the plane is the first unit vector; the plane is the first two."""
    metadata = {"format": "expertsteer-bundle", "schema": "1", "manifest": json.dumps(manifest)}
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for each in EVERY_KIND["interventions"]:
        for role in ("read", "write"):
            if role in each:
                shape = [2, HIDDEN_SIZE] if each["kind"] == "rotate" else [HIDDEN_SIZE]
                end = position + 4 * math.prod(shape)
                header[each[role]] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
                position = end
    return header


def unit(place: int) -> bytes:
    return struct.pack(f"<{HIDDEN_SIZE}f", *(float(index == place) for index in range(HIDDEN_SIZE)))


NUM_UNITS = sum(len(each.keys() & {"read", "write"}) for each in EVERY_KIND["interventions"])
# The plane is the last but two.
UNITS = unit(0) * (NUM_UNITS - 2) + unit(1) + unit(0) * 2
GOOD_KINDS = file_of(every_kind_header(EVERY_KIND), UNITS)


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
    assert {name for each in manifest.interventions for name in each.tensors} == bundle.rows.keys()
    assert all(0 <= each.layer < manifest.target.num_layers for each in manifest.interventions)
    for row in bundle.rows.values():
        assert row.shape in ((manifest.target.hidden_size,), (2, manifest.target.hidden_size))
        assert torch.isfinite(row).all()
    check_program(bundle)
    json.dumps(manifest.model_dump(mode="json"), ensure_ascii=False, allow_nan=False).encode()
    return True


def check_program(bundle: Bundle) -> None:
    """Assert that the engine would stay inside its tables, and that every number in them is one."""
    manifest = bundle.manifest
    program = lower(bundle, {gate: trigger.token_ids or () for gate, trigger in manifest.triggers.items()})
    num_rows = program.rows.shape[0]
    assert program.rows.shape[1] == manifest.target.hidden_size
    assert program.num_gates <= NUM_GATES
    assert max(Counter(step.layer for step in program.steps).values()) <= MAX_OPS
    ready = set(program.triggers)
    for each in sorted(program.steps, key=lambda entry: entry.layer):
        assert all(-1 <= row < num_rows for row in (each.read, each.write, each.read2, each.write2))
        assert each.gate == -1 or each.gate in ready
        assert -1 <= each.gate_out < program.num_gates
        ready.add(each.gate_out)
        assert each.kind is Kind.CLAMP or all(map(math.isfinite, (each.a, each.b, each.c)))
        assert not any(map(math.isnan, (each.a, each.b, each.c)))


def test_the_seeds_of_all_mutations_are_good() -> None:
    assert check_outcome(GOOD)
    assert check_outcome(GOOD_KINDS)


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


@given(flips=st.lists(st.tuples(st.integers(0, len(GOOD_KINDS) - 1), st.integers(1, 255)), min_size=1, max_size=4))
@settings(max_examples=1000, deadline=None)
def test_several_flipped_bytes_of_every_kind(flips: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD_KINDS)
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


@given(place=st.sampled_from(places_in(MANIFEST)), value=JSON_VALUES)
@settings(max_examples=1000, deadline=None)
def test_any_value_anywhere_in_the_manifest(place: tuple[Any, ...], value: Any) -> None:
    check_outcome(file_of(header_of(replaced(MANIFEST, place, value))))


KIND_VALUES = JSON_VALUES | st.sampled_from(
    [
        *(kind.name.lower() for kind in Kind),
        "open",
        "early",
        "jump_relu",
        "relu",
        "set",
        "absolute",
        0.0,
        1e6,
        1e-9,
        7,
        [],
    ]
)


@given(place=st.sampled_from(places_in(EVERY_KIND)), value=KIND_VALUES)
@settings(max_examples=2000, deadline=None)
def test_any_value_anywhere_in_a_manifest_of_every_kind(place: tuple[Any, ...], value: Any) -> None:
    check_outcome(file_of(every_kind_header(replaced(EVERY_KIND, place, value)), UNITS))


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


@given(data=mutations.mutations(GOOD) | mutations.mutations(GOOD_KINDS))
@settings(max_examples=2000, deadline=None)
def test_what_is_sent_to_a_server(data: bytes) -> None:
    """The same damages as `test_admin_uploads.py` sends, by far more of them."""
    check_outcome(data)


def test_random_values_are_finite_or_refused() -> None:
    generator = random.Random(0)
    accepted = 0
    for _ in range(300):
        for dtype, num_bytes in (("F32", 32), ("F16", 16), ("BF16", 16)):
            data = generator.randbytes(num_bytes)
            accepted += check_outcome(file_of(header_of(MANIFEST, dtype, num_bytes), data))
    assert 0 < accepted < 900

"""A folder of attacks on the bundle loader. Every one ends in a BundleError with its reason, and nothing else."""

import argparse
import copy
import gzip
import io
import json
import math
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from artifacts.bundle import MAX_FILE_BYTES, MAX_HEADER_BYTES, BundleError, load_bundle, parse_bundle
from artifacts.bundle import BundleErrorCode as Code
from artifacts.commands import bundle as command

HIDDEN_SIZE = 8
ROW = "runtime.2.0.write"
Change = Callable[[dict[str, Any]], None]


def f32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


GOOD_ROW = f32(*range(1, HIDDEN_SIZE + 1))
MANIFEST: dict[str, Any] = {
    "name": "careful",
    "description": "States sums right.",
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


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_of(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with any header and any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def header_of(manifest: dict[str, Any] | str = MANIFEST, **tensors: Any) -> dict[str, Any]:
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    metadata = {"format": "expertsteer-bundle", "schema": "1", "manifest": text}
    return {"__metadata__": metadata} | (tensors or {ROW: entry("F32", [HIDDEN_SIZE], 0, len(GOOD_ROW))})


def with_row(row: bytes, dtype: str = "F32", shape: list[Any] | None = None) -> bytes:
    """A bundle that is right but for its one runtime tensor."""
    shape = [HIDDEN_SIZE] if shape is None else shape
    return file_of(header_of(**{ROW: entry(dtype, shape, 0, len(row))}), row)


def with_manifest(change: Change) -> bytes:
    """A bundle that is right but for a change of its manifest."""
    manifest = copy.deepcopy(MANIFEST)
    change(manifest)
    return file_of(header_of(manifest), GOOD_ROW)


def put(*path: Any) -> Change:
    """put("target", "id", value): set one field of the manifest."""

    def change(manifest: dict[str, Any]) -> None:
        *parents, last, value = path
        for key in parents:
            manifest = manifest[key]
        manifest[last] = value

    return change


def two_rows(second: dict[str, Any], data: bytes) -> bytes:
    """A bundle with a second, evidence tensor."""
    first = entry("F32", [HIDDEN_SIZE], 0, len(GOOD_ROW))
    return file_of(header_of(**{ROW: first, "rfm.1.vector": second}), data)


def with_metadata(**changes: str) -> bytes:
    header = header_of()
    header["__metadata__"] |= changes
    return file_of(header, GOOD_ROW)


def manifest_text(text: str) -> bytes:
    return file_of(header_of(text), GOOD_ROW)


def spliced(old: str, new: str) -> bytes:
    """A bundle with the manifest's text changed, for what json.dumps would not write."""
    text = json.dumps(MANIFEST)
    assert old in text
    return manifest_text(text.replace(old, new, 1))


def torch_file(new_format: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({ROW: torch.ones(HIDDEN_SIZE)}, buffer, _use_new_zipfile_serialization=new_format)
    return buffer.getvalue()


def numpy_file() -> bytes:
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.ones(HIDDEN_SIZE))
    return buffer.getvalue()


def zip_file() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"")
    return buffer.getvalue()


GOOD = file_of(header_of(), GOOD_ROW)
TWICE = json.dumps(header_of())[:-1] + f', "{ROW}": {json.dumps(entry("F32", [HIDDEN_SIZE], 0, 32))}}}'
DEEP = json.loads("[" * 900 + "]" * 900)
LENGTH = len(GOOD_ROW)
MILLION = 1_000_000
NAN, INF = math.nan, math.inf

ATTACKS: dict[str, tuple[Code, bytes]] = {
    # Not a safetensors file.
    "empty": (Code.EMPTY, b""),
    "one byte": (Code.TRUNCATED, b"\x00"),
    "eight zero bytes": (Code.BAD_HEADER, bytes(8)),
    "zeros": (Code.BAD_HEADER, bytes(4096)),
    "text": (Code.HEADER_TOO_LARGE, b"name: careful\nvector: [1, 2, 3]\n"),
    "pickle": (Code.PICKLE, pickle.dumps({ROW: [1.0] * HIDDEN_SIZE})),
    "short pickle": (Code.PICKLE, pickle.dumps(None)),
    "pickle protocol 2": (Code.PICKLE, pickle.dumps({ROW: 1.0}, protocol=2)),
    "pickle protocol 0": (Code.HEADER_TOO_LARGE, pickle.dumps({ROW: [1.0] * HIDDEN_SIZE}, protocol=0)),
    "torch zip file": (Code.PICKLE, torch_file(new_format=True)),
    "old torch file": (Code.PICKLE, torch_file(new_format=False)),
    "zip file": (Code.PICKLE, zip_file()),
    "empty zip file": (Code.PICKLE, b"PK\x05\x06" + bytes(18)),
    "GGUF": (Code.FOREIGN_FORMAT, b"GGUF" + struct.pack("<IQQ", 3, 0, 0)),
    "NumPy": (Code.FOREIGN_FORMAT, numpy_file()),
    "HDF5": (Code.FOREIGN_FORMAT, b"\x89HDF\r\n\x1a\n" + bytes(64)),
    "gzip": (Code.FOREIGN_FORMAT, gzip.compress(GOOD)),
    # Header length.
    "header of 2^63 bytes": (Code.HEADER_TOO_LARGE, (2**63).to_bytes(8, "little") + GOOD[8:]),
    "header of 2^64 - 1 bytes": (Code.HEADER_TOO_LARGE, b"\xff" * 8 + GOOD[8:]),
    "header of 1 MiB + 1": (Code.HEADER_TOO_LARGE, file_of(b"{" + b" " * (MAX_HEADER_BYTES - 1) + b"}")),
    "header longer than the file": (Code.TRUNCATED, (MAX_HEADER_BYTES).to_bytes(8, "little") + GOOD[8:]),
    "header of no bytes": (Code.BAD_HEADER, file_of(b"", GOOD_ROW)),
    # Header text.
    "header not JSON": (Code.BAD_HEADER, file_of(b"{]", GOOD_ROW)),
    "header a list": (Code.BAD_HEADER, file_of(b"[]", GOOD_ROW)),
    "header with a space first": (Code.BAD_HEADER, file_of(b" {}", GOOD_ROW)),
    "header with text after it": (Code.BAD_HEADER, file_of(b"{} {}", GOOD_ROW)),
    "header not UTF-8": (Code.BAD_HEADER, file_of(b'{"\xff": 1}', GOOD_ROW)),
    "header with a NUL": (Code.BAD_HEADER, file_of(b"{}\x00", GOOD_ROW)),
    "header with a lone surrogate": (Code.BAD_HEADER, file_of(b'{"\\ud800": 1}', GOOD_ROW)),
    "deep lists": (Code.BAD_HEADER, file_of(b'{"a":' + b"[" * 500_000, GOOD_ROW)),
    "deep closed lists": (Code.BAD_HEADER, file_of(b'{"a":' + b"[" * 400_000 + b"]" * 400_000 + b"}")),
    "deep objects": (Code.BAD_HEADER, file_of(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)),
    "number of a million digits": (Code.BAD_HEADER, file_of(b'{"a": ' + b"9" * MILLION + b"}")),
    "shape of 2^64": (Code.BAD_HEADER, with_row(GOOD_ROW, shape=[2**64])),
    "exponent out of range": (Code.BAD_HEADER, file_of(b'{"a": 1e999}')),
    "key twice": (Code.BAD_HEADER, file_of(b'{"__metadata__": {}, "__metadata__": {}}')),
    "metadata a list": (Code.BAD_HEADER, file_of({"__metadata__": []})),
    "metadata of numbers": (Code.BAD_HEADER, file_of({"__metadata__": {"schema": 1}})),
    # Tensor entries.
    "entry a number": (Code.BAD_HEADER, file_of(header_of(**{ROW: 7}), GOOD_ROW)),
    "entry without dtype": (Code.BAD_HEADER, file_of(header_of(**{ROW: {"shape": [8], "data_offsets": [0, 32]}}))),
    "entry with a key too many": (Code.BAD_HEADER, two_rows(entry("F32", [0], 32, 32) | {"file": "/etc"}, GOOD_ROW)),
    "dtype unknown": (Code.BAD_HEADER, with_row(GOOD_ROW, "F31")),
    "dtype a list": (Code.BAD_HEADER, two_rows(entry([], [1], LENGTH, LENGTH + 4), GOOD_ROW + f32(1))),
    "shape negative": (Code.BAD_HEADER, with_row(GOOD_ROW, shape=[-8])),
    "shape twice negative": (Code.BAD_HEADER, with_row(GOOD_ROW, shape=[-2, -4])),
    "shape true": (Code.BAD_HEADER, with_row(f32(1), shape=[True])),
    "shape a float": (Code.BAD_HEADER, with_row(GOOD_ROW, shape=[8.0])),
    "shape a string": (Code.BAD_HEADER, with_row(GOOD_ROW, shape=["8"])),
    "shape null": (Code.BAD_HEADER, two_rows(entry("F32", None, 32, 36), GOOD_ROW)),
    "shape that overflows 64 bits": (Code.BAD_HEADER, with_row(GOOD_ROW, shape=[2**62, 2**62])),
    "shape that wraps to the right size": (Code.BAD_HEADER, with_row(GOOD_ROW, shape=[2**61 + 8, 8])),
    "shape of 2^63": (Code.BAD_HEADER, with_row(GOOD_ROW, shape=[2**63, 0])),
    "shape of 100000 axes": (Code.BAD_HEADER, with_row(GOOD_ROW, shape=[9] * 100_000)),
    "shape of nested lists": (Code.BAD_HEADER, with_row(GOOD_ROW, shape=DEEP)),
    "shape larger than the bytes": (Code.BAD_HEADER, with_row(GOOD_ROW, shape=[HIDDEN_SIZE + 1])),
    "offsets reversed": (Code.BAD_HEADER, file_of(header_of(**{ROW: entry("F32", [8], 32, 0)}), GOOD_ROW)),
    "offsets negative": (Code.BAD_HEADER, file_of(header_of(**{ROW: entry("F32", [8], -32, 0)}), GOOD_ROW)),
    "offsets a float": (Code.BAD_HEADER, file_of(header_of(**{ROW: entry("F32", [8], 0, 32.0)}), GOOD_ROW)),
    "offsets of three": (
        Code.BAD_HEADER,
        two_rows({"dtype": "F32", "shape": [1], "data_offsets": [32, 36, 40]}, GOOD_ROW + f32(1)),
    ),
    "offsets overlapping": (Code.BAD_HEADER, two_rows(entry("F32", [8], 16, 48), GOOD_ROW + f32(1, 2, 3, 4))),
    "offsets the same": (Code.BAD_HEADER, two_rows(entry("F32", [8], 0, 32), GOOD_ROW)),
    "offsets with a gap": (Code.BAD_HEADER, two_rows(entry("F32", [1], 36, 40), GOOD_ROW + f32(1, 2))),
    "offsets with a gap first": (Code.BAD_HEADER, file_of(header_of(**{ROW: entry("F32", [8], 4, 36)}), bytes(36))),
    "offsets past the end": (Code.TRUNCATED, two_rows(entry("F32", [8], 32, 64), GOOD_ROW)),
    "tensor of 2^62 bytes": (Code.TRUNCATED, two_rows(entry("U8", [2**62], 32, 32 + 2**62), GOOD_ROW)),
    "bytes after the last tensor": (Code.BAD_HEADER, GOOD + b"\x00"),
    "a second file after the first": (Code.BAD_HEADER, GOOD + GOOD),
    "half a byte": (Code.BAD_HEADER, two_rows(entry("F4", [3], 32, 33), GOOD_ROW + b"\x00")),
    # Metadata.
    "no metadata": (Code.WRONG_FORMAT, file_of({ROW: entry("F32", [8], 0, 32)}, GOOD_ROW)),
    "a model's weights": (Code.WRONG_FORMAT, with_metadata(format="pt")),
    "schema of tomorrow": (Code.UNKNOWN_SCHEMA, with_metadata(schema="2")),
    "schema with a space": (Code.UNKNOWN_SCHEMA, with_metadata(schema="1 ")),
    "metadata with a key too many": (Code.WRONG_FORMAT, with_metadata(manifest2="{}")),
    # Manifest.
    "manifest empty": (Code.BAD_MANIFEST, manifest_text("")),
    "manifest a list": (Code.BAD_MANIFEST, manifest_text("[]")),
    "manifest null": (Code.BAD_MANIFEST, manifest_text("null")),
    "manifest nested deeply": (Code.BAD_MANIFEST, manifest_text("[" * 400_000)),
    "manifest with a deep evaluation": (Code.BAD_MANIFEST, with_manifest(put("evaluation", DEEP))),
    "manifest key unknown": (Code.BAD_MANIFEST, with_manifest(put("on_load", "import os"))),
    "manifest key twice": (Code.BAD_MANIFEST, spliced('"seed": 0', '"seed": 0, "seed": 1')),
    "target key unknown": (Code.BAD_MANIFEST, with_manifest(put("target", "path", "/etc/passwd"))),
    "name with a path": (Code.BAD_MANIFEST, with_manifest(put("name", "../../etc/passwd"))),
    "name with an escape sequence": (Code.BAD_MANIFEST, with_manifest(put("name", "a\x1b[2J"))),
    "strength NaN": (Code.BAD_MANIFEST, with_manifest(put("recommended_strength", NAN))),
    "strength infinite": (Code.BAD_MANIFEST, with_manifest(put("maximum_strength", INF))),
    "strength 1e999": (Code.BAD_MANIFEST, spliced('"maximum_strength": 1.0', '"maximum_strength": 1e999')),
    "strength of a thousand digits": (Code.BAD_MANIFEST, with_manifest(put("maximum_strength", 10**1000))),
    "strength a string": (Code.BAD_MANIFEST, with_manifest(put("maximum_strength", "1"))),
    "strength over the maximum": (Code.BAD_MANIFEST, with_manifest(put("recommended_strength", 1.5))),
    "strength under the negative maximum": (Code.BAD_MANIFEST, with_manifest(put("recommended_strength", -1.5))),
    "evaluation NaN": (Code.BAD_MANIFEST, with_manifest(put("evaluation", "accuracy", NAN))),
    "score NaN": (Code.BAD_MANIFEST, with_manifest(put("layer_pairs", 0, "scores", "x", NAN))),
    "surrogate in the description": (Code.BAD_MANIFEST, with_manifest(put("description", "\ud800"))),
    "no interventions": (Code.BAD_MANIFEST, with_manifest(put("interventions", []))),
    "kind unknown": (Code.UNKNOWN_KIND, with_manifest(put("interventions", 0, "kind", "exec"))),
    "kind a list": (Code.UNKNOWN_KIND, with_manifest(put("interventions", 0, "kind", ["add"]))),
    "parameter nobody reads": (Code.BAD_MANIFEST, with_manifest(put("interventions", 0, "parameters", "a", 1.0))),
    "parameter of another kind": (
        Code.BAD_MANIFEST,
        with_manifest(put("interventions", 0, "parameters", "threshold", 1.0)),
    ),
    "gate that nothing sets": (Code.BAD_GATE, with_manifest(put("interventions", 0, "gate", "open"))),
    "gate with a path": (Code.BAD_MANIFEST, with_manifest(put("interventions", 0, "gate", "../open"))),
    "read of an addition": (Code.BAD_MANIFEST, with_manifest(put("interventions", 0, "read", ROW))),
    "kind without its tensor": (Code.BAD_MANIFEST, with_manifest(put("interventions", 0, "kind", "project"))),
    "trigger that nobody uses": (Code.BAD_GATE, with_manifest(put("triggers", {"open": {"token_ids": [1]}}))),
    "trigger of a negative token": (Code.BAD_MANIFEST, with_manifest(put("triggers", {"open": {"token_ids": [-1]}}))),
    "trigger of a token past 32 bits": (
        Code.BAD_MANIFEST,
        with_manifest(put("triggers", {"open": {"token_ids": [2**31]}})),
    ),
    "trigger of a long text": (
        Code.BAD_MANIFEST,
        with_manifest(put("triggers", {"open": {"text_contains": "x" * MILLION}})),
    ),
    "a thousand interventions": (
        Code.TOO_MANY_INTERVENTIONS,
        with_manifest(
            put(
                "interventions",
                [{"layer": 2, "kind": "add", "write": f"runtime.2.{index}.write"} for index in range(1000)],
            )
        ),
    ),
    "span unknown": (Code.BAD_MANIFEST, with_manifest(put("exclude", ["everything"]))),
    "layer past the last": (Code.LAYER_OUT_OF_RANGE, with_manifest(put("interventions", 0, "layer", 4))),
    "layer of 2^63": (Code.LAYER_OUT_OF_RANGE, with_manifest(put("interventions", 0, "layer", 2**63))),
    "layer of 2^64": (Code.BAD_MANIFEST, with_manifest(put("interventions", 0, "layer", 2**64))),
    "layer negative": (Code.LAYER_OUT_OF_RANGE, with_manifest(put("interventions", 0, "layer", -1))),
    "layer a float": (Code.LAYER_OUT_OF_RANGE, with_manifest(put("interventions", 0, "layer", 2.5))),
    "layer true": (Code.LAYER_OUT_OF_RANGE, with_manifest(put("interventions", 0, "layer", True))),
    "pair past the last layer": (Code.LAYER_OUT_OF_RANGE, with_manifest(put("layer_pairs", 0, "expert", 3))),
    "layer twice": (Code.DUPLICATE_TENSOR, with_manifest(put("interventions", MANIFEST["interventions"] * 2))),
    "pair twice": (Code.BAD_MANIFEST, with_manifest(put("layer_pairs", MANIFEST["layer_pairs"] * 2))),
    "row of another layer": (Code.BAD_MANIFEST, with_manifest(put("interventions", 0, "layer", 1))),
    # Runtime tensors.
    "tensor twice": (Code.BAD_HEADER, file_of(TWICE.encode(), GOOD_ROW)),
    "tensor missing": (
        Code.MISSING_TENSOR,
        file_of(header_of(**{"rfm.1.vector": entry("F32", [8], 0, 32)}), GOOD_ROW),
    ),
    "tensor nobody names": (
        Code.UNNAMED_TENSOR,
        file_of(
            header_of(**{ROW: entry("F32", [8], 0, 32), "runtime.3.0.write": entry("F32", [8], 32, 64)}), GOOD_ROW * 2
        ),
    ),
    "dtype F64": (Code.UNSAFE_DTYPE, with_row(struct.pack("<8d", *range(1, 9)), "F64")),
    "dtype I32": (Code.UNSAFE_DTYPE, with_row(struct.pack("<8i", *range(1, 9)), "I32")),
    "dtype F8": (Code.UNSAFE_DTYPE, with_row(b"\x38" * 8, "F8_E4M3")),
    "dtype BOOL": (Code.UNSAFE_DTYPE, with_row(b"\x02" * 8, "BOOL")),
    "row too narrow": (Code.WRONG_SHAPE, with_row(GOOD_ROW[:-4], shape=[HIDDEN_SIZE - 1])),
    "row too wide": (Code.WRONG_SHAPE, with_row(GOOD_ROW * 2, shape=[2 * HIDDEN_SIZE])),
    "row of two axes": (Code.WRONG_SHAPE, with_row(GOOD_ROW, shape=[1, HIDDEN_SIZE])),
    "row empty": (Code.WRONG_SHAPE, with_row(b"", shape=[0])),
    "row a scalar": (Code.WRONG_SHAPE, with_row(f32(1), shape=[])),
    "target wider than the row": (Code.WRONG_SHAPE, with_manifest(put("target", "hidden_size", 16))),
    # Values.
    "one NaN": (Code.NON_FINITE, with_row(f32(*[1.0] * 7, NAN))),
    "one infinity": (Code.NON_FINITE, with_row(f32(-INF, *[1.0] * 7))),
    "NaN in F16": (Code.NON_FINITE, with_row(b"\x00\x7e" * 8, "F16")),
    "infinity in BF16": (Code.NON_FINITE, with_row(b"\x80\x7f" * 8, "BF16")),
    "zero": (Code.BAD_NORM, with_row(bytes(LENGTH))),
    "negative zero": (Code.BAD_NORM, with_row(f32(*[-0.0] * 8))),
    "denormal": (Code.BAD_NORM, with_row(f32(*[1e-40] * 8))),
    "huge": (Code.BAD_NORM, with_row(f32(*[1e6] * 8))),
    "huge enough to overflow a float32 norm": (Code.BAD_NORM, with_row(f32(*[3e38] * 8))),
}  # fmt: skip


def test_the_file_that_the_attacks_start_from_is_good() -> None:
    bundle = parse_bundle(GOOD)
    assert bundle.rows[ROW].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert parse_bundle(with_manifest(put("evaluation", {"deep": json.loads("[" * 50 + "]" * 50)})))
    assert parse_bundle(two_rows(entry("F64", [0, 2**40], 32, 32), GOOD_ROW)).evidence[0].shape == (0, 2**40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All attacks as files."""
    path = tmp_path_factory.mktemp("attacks")
    for number, (_, data) in enumerate(ATTACKS.values()):
        (path / f"{number}.safetensors").write_bytes(data)
    return path


@pytest.mark.parametrize("number", range(len(ATTACKS)), ids=list(ATTACKS))
def test_attack_is_refused_with_its_reason(folder: Path, number: int) -> None:
    code, data = list(ATTACKS.values())[number]
    with pytest.raises(BundleError) as from_bytes:
        parse_bundle(data)
    with pytest.raises(BundleError) as from_file:
        load_bundle(folder / f"{number}.safetensors")
    assert (from_bytes.value.code, str(from_bytes.value)) == (from_file.value.code, str(from_file.value))
    assert from_bytes.value.code is code, str(from_bytes.value)
    assert_is_a_sentence(str(from_bytes.value))


def assert_is_a_sentence(message: str) -> None:
    """One printable line of bounded length, whatever the attacker put in."""
    assert message.isprintable(), message
    assert message.endswith(".")
    assert 20 < len(message) < 900, message


def test_the_command_refuses_every_attack_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(ATTACKS):
        path = folder / f"{number}.safetensors"
        assert command.run(argparse.Namespace(action="inspect", file=path, json=False)) == 1, name
        streams = capsys.readouterr()
        assert (streams.out, streams.err.count("\n")) == ("", 1), name
        assert command.run(argparse.Namespace(action="verify", file=path, json=True, model=None)) == 1, name
        report = json.loads(capsys.readouterr().out)
        assert sum(check["status"] == "failed" for check in report["checks"]) == 1, name


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(BundleError):
            parse_bundle(pickle.dumps(Payload(), protocol))
    buffer = io.BytesIO()
    torch.save(Payload(), buffer)
    with pytest.raises(BundleError, match="zip archive"):
        parse_bundle(buffer.getvalue())
    assert not (tmp_path / "owned").exists()


def not_there(path: Path) -> Path:
    return path / "none.safetensors"


def symlink_loop(path: Path) -> Path:
    (path / "a").symlink_to(path / "b")
    (path / "b").symlink_to(path / "a")
    return path / "a"


def dangling_link(path: Path) -> Path:
    (path / "a").symlink_to(path / "none")
    return path / "a"


def below_a_file(path: Path) -> Path:
    (path / "file").write_bytes(GOOD)
    return path / "file" / "bundle.safetensors"


def name_with_nul(path: Path) -> Path:
    return path / "a\0b"


def name_too_long(path: Path) -> Path:
    return path / ("a" * 5000)


def folder_itself(path: Path) -> Path:
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path / "pipe")
    return path / "pipe"


def device(path: Path) -> Path:
    return Path("/dev/zero")


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (not_there, Code.UNREADABLE),
        (symlink_loop, Code.UNREADABLE),
        (dangling_link, Code.UNREADABLE),
        (below_a_file, Code.UNREADABLE),
        (name_with_nul, Code.UNREADABLE),
        (name_too_long, Code.UNREADABLE),
        (folder_itself, Code.NOT_A_FILE),
        (pipe, Code.NOT_A_FILE),
        (device, Code.NOT_A_FILE),
    ],
)
@pytest.mark.timeout(20)
def test_paths_that_are_no_file(tmp_path: Path, make: Callable[[Path], Path], code: Code) -> None:
    with pytest.raises(BundleError) as caught:
        load_bundle(make(tmp_path))
    assert caught.value.code is code
    assert_is_a_sentence(str(caught.value))


def test_a_link_to_a_bundle_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(GOOD)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "blob")
    assert load_bundle(tmp_path / "link.safetensors").digest == parse_bundle(GOOD).digest


def test_a_file_over_the_cap_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    path.write_bytes(GOOD)
    os.truncate(path, MAX_FILE_BYTES + 1)  # sparse: takes no disk
    with pytest.raises(BundleError, match=str(MAX_FILE_BYTES)) as caught:
        load_bundle(path)
    assert caught.value.code is Code.TOO_LARGE


def test_nothing_is_allocated_for_what_a_header_claims() -> None:
    claims = [
        (MAX_HEADER_BYTES).to_bytes(8, "little"),
        (2**40).to_bytes(8, "little"),
        file_of(header_of(**{ROW: entry("F32", [2**28], 0, 2**30)}), GOOD_ROW),
        with_manifest(put("target", "hidden_size", 2**20)),
    ]
    tracemalloc.start()
    try:
        for data in claims:
            with pytest.raises(BundleError):
                parse_bundle(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


@pytest.mark.timeout(60)
def test_a_header_full_of_tensors_is_read_in_reasonable_time() -> None:
    # Just under the header's limit: about 15 000 entries.
    tensors = {f"rfm.{n}.v": entry("U8", [0], LENGTH, LENGTH) for n in range(14_000)}
    data = file_of(header_of(**{ROW: entry("F32", [8], 0, LENGTH)} | tensors), GOOD_ROW)
    assert len(parse_bundle(data).evidence) == 14_000


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    size = 4 << 20
    path.write_bytes(two_rows(entry("U8", [size], LENGTH, LENGTH + size), GOOD_ROW + bytes(size)))

    def shrink(check: str, found: str) -> None:
        if check == "tensors":
            os.truncate(path, size // 2)

    with pytest.raises(BundleError) as caught:
        load_bundle(path, shrink)
    assert caught.value.code is Code.TRUNCATED

"""Files of vectors: what is read and written, and that hostile ones only ever meet the one refusal."""

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file

from artifacts.interchange import gguf_header, whole_file
from artifacts.interchange.control_vector import read_control_vector
from artifacts.interchange.vector_file import read_vectors, write_vectors
from artifacts.jobs.errors import BuildError
from artifacts.manifest import ModelIdentity

HIDDEN_SIZE, NUM_LAYERS = 8, 4
TARGET = ModelIdentity(id="tiny", architecture="LlamaForCausalLM", hidden_size=HIDDEN_SIZE, num_layers=NUM_LAYERS)
VECTORS = {layer: torch.randn(HIDDEN_SIZE, generator=torch.Generator().manual_seed(layer)) for layer in (1, 3)}
Write = Callable[[GGUFWriter], None]


def gguf_file(path: Path, fill: Write, architecture: str = "controlvector") -> Path:
    writer = GGUFWriter(path, architecture)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def direction(name: str, row: np.ndarray) -> Write:
    return lambda writer: writer.add_tensor(name, row)


def test_the_gguf_package_reads_what_llama_cpp_and_repeng_expect(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    write_vectors(path, VECTORS, TARGET)
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
    }
    assert [(tensor.name, tensor.tensor_type.name, tensor.shape.tolist()) for tensor in reader.tensors] == [
        ("direction.1", "F32", [HIDDEN_SIZE]),
        ("direction.3", "F32", [HIDDEN_SIZE]),
    ]
    assert np.array_equal(reader.tensors[1].data, VECTORS[3].numpy())


@pytest.mark.parametrize("ending", ["gguf", "npy", "safetensors"])
def test_what_is_written_is_read_exactly(tmp_path: Path, ending: str) -> None:
    first, second = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    for path in (first, second):
        write_vectors(path, VECTORS, TARGET)
    assert first.read_bytes() == second.read_bytes()
    file = read_vectors(first, ())
    assert (file.format, list(file.vectors)) == (ending, [1, 3])
    assert all(torch.equal(file.vectors[layer], VECTORS[layer]) for layer in VECTORS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{ending}", f"b.{ending}"]
    assert list(read_vectors(first, [3]).vectors) == [3]
    with pytest.raises(BuildError, match="holds vectors of layers 1, 3, and layer 2 is asked for"):
        read_vectors(first, [2, 3])


def test_raw_files_look_as_documented(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v.npy", VECTORS, TARGET)
    array = np.load(tmp_path / "v.npy", allow_pickle=False)
    assert (array.shape, array.dtype) == ((NUM_LAYERS, HIDDEN_SIZE), np.float32)
    assert not array[0].any() and np.array_equal(array[3], VECTORS[3].numpy())
    write_vectors(tmp_path / "v.safetensors", VECTORS, TARGET)
    assert sorted(load_file(tmp_path / "v.safetensors")) == ["layer.1", "layer.3"]


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_any_float_and_order(tmp_path: Path, dtype: str, order: str) -> None:
    matrix = np.zeros((NUM_LAYERS, HIDDEN_SIZE), dtype=dtype, order=order)  # type: ignore[call-overload]
    matrix[2] = np.arange(HIDDEN_SIZE)
    np.save(tmp_path / "v.npy", matrix)
    file = read_vectors(tmp_path / "v.npy", ())
    assert file.num_rows == NUM_LAYERS
    assert {layer: row.tolist() for layer, row in file.vectors.items()} == {2: [float(n) for n in range(HIDDEN_SIZE)]}
    assert file.vectors[2].dtype == torch.float32


def test_a_single_vector_needs_its_layer(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones(HIDDEN_SIZE))
    save_file({"steer": torch.ones(HIDDEN_SIZE, dtype=torch.bfloat16)}, tmp_path / "v.safetensors")
    for path in (tmp_path / "v.npy", tmp_path / "v.safetensors"):
        with pytest.raises(BuildError, match="does not say where it acts; give one --layer"):
            read_vectors(path, ())
        assert list(read_vectors(path, [2]).vectors) == [2]
        assert torch.equal(read_vectors(path, [2]).vectors[2], torch.ones(HIDDEN_SIZE))


def test_safetensors_matrix_and_foreign_names(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    save_file({"any": torch.eye(NUM_LAYERS, HIDDEN_SIZE)[:2].double()}, path)
    assert list(read_vectors(path, ()).vectors) == [0, 1]
    for tensors, refusal in (
        ({"layer.1": torch.ones(4), "bias": torch.ones(4)}, "holds 2 tensors, among them.*bias.*name them layer.0"),
        ({"layer.1": torch.ones(2, 4)}, "shape .2, 4.; one vector"),
        ({"a": torch.ones(2, 2, 2)}, "shape .2, 2, 2.; .hidden_size. or"),
        ({"layer.1": torch.ones(4, dtype=torch.int32)}, "dtype I32; save it as one of F64"),
        ({"a": torch.zeros(2, 4)}, "layers none, and one at least"),
    ):
        save_file(tensors, path)
        with pytest.raises(BuildError, match=refusal):
            read_vectors(path, ())


def test_block_0_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"llama.cpp cannot steer decoder block 0.*export .npy or .safetensors"):
        write_vectors(tmp_path / "v.gguf", {0: torch.ones(HIDDEN_SIZE)}, TARGET)
    assert list(tmp_path.iterdir()) == []
    row = np.ones(HIDDEN_SIZE, dtype=np.float32)
    with pytest.raises(BuildError, match=r"tensor 'direction.0', and llama.cpp takes direction.1 and up only"):
        read_vectors(gguf_file(tmp_path / "v.gguf", direction("direction.0", row)), ())


def test_gguf_files_of_other_content(tmp_path: Path) -> None:
    row, path = np.ones(HIDDEN_SIZE, dtype=np.float32), tmp_path / "v.gguf"

    def number_as_hint(writer: GGUFWriter) -> None:
        writer.add_uint32("controlvector.model_hint", 4)
        writer.add_tensor("direction.1", row)

    cases: list[tuple[Write, str]] = [
        (direction("direction.1", row.astype(np.float16)), "direction.1 has type F16, and llama.cpp takes F32 only"),
        (direction("direction.1", np.ones((2, 4), np.float32)), "direction.1 has shape .2, 4., and one dimension"),
        (direction("direction.1x", row), "tensor 'direction.1x'"),
        (direction("direction.01", row), "tensor 'direction.01'"),
        (direction("token_embd.weight", row), "tensor 'token_embd.weight'"),
        (lambda writer: None, "holds no direction"),
        (number_as_hint, "model_hint is no string"),
    ]
    for fill, refusal in cases:
        with pytest.raises(BuildError, match=refusal):
            read_control_vector(gguf_file(path, fill))
    with pytest.raises(BuildError, match=r"general.architecture is 'llama', not 'controlvector'"):
        read_control_vector(gguf_file(path, direction("direction.1", row), "llama"))
    # ggml takes a trailing dimension of one for none.
    read = read_control_vector(gguf_file(path, direction("direction.2", row[None])))
    assert torch.equal(read.vectors[2], torch.ones(HIDDEN_SIZE))


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def header(num_tensors: int, num_keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, num_tensors, num_keys) + rest


ARRAY = string("general.tags") + struct.pack("<I", 9)


@pytest.mark.parametrize(
    ("data", "refusal"),
    [
        (b"", "has 0 bytes"),
        (b"GGU", "damaged, cut off"),
        (b"\x93NUMPY", "starts with"),
        (header(1, 1, version=1), "version 1; little-endian"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 1, 1), "version 50331648"),
        (header(2**60, 0), f"claims {2**60} tensors"),
        (header(0, 2**63), f"claims {2**63} keys"),
        (header(4096, 0, bytes(24 * 4096)), "damaged, cut off"),
        (header(0, 1, struct.pack("<Q", 2**63)), "runs past byte"),
        (header(0, 1, ARRAY + struct.pack("<IQ", 0, 2**60)), f"claim {2**60} items"),
        (header(0, 1, ARRAY + struct.pack("<IQ", 0, 16384)), "runs past byte"),
        (header(0, 1, ARRAY + struct.pack("<IQ", 9, 1) * 500), "which is no number, string or flat array"),
        (header(0, 1, ARRAY + struct.pack("<IQ", 8, 3) + string("a")), "runs past byte"),
        (header(0, 1, string("x") + struct.pack("<I", 77)), "type 77"),
        (header(1, 0, string("direction.1") + struct.pack("<I", 2**31)), "claims 2147483648 dimensions"),
        (header(1, 0, string("direction.1") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0)), "damaged, cut off"),
        (header(1, 0, string("direction.1") + struct.pack("<IQIQ", 1, 2**40, 0, 0)), "damaged, cut off"),
        (header(1, 0, string("direction.1") + struct.pack("<IQIQ", 1, 8, 0, 2**63)), "damaged, cut off"),
        (header(1, 0, string("direction.1") + struct.pack("<IQIQ", 1, 8, 0, 2**64 - 1)), "damaged, cut off"),
    ],
)
def test_hostile_gguf_headers(tmp_path: Path, data: bytes, refusal: str) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(data)
    with pytest.raises(BuildError, match=refusal) as caught:
        read_vectors(path, ())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def npy_file(shape: str, dtype: str = "'<f4'", body: bytes = bytes(32), magic: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return magic + struct.pack("<H", len(text) + 1) + text + b"\n" + body


@pytest.mark.parametrize(
    ("data", "refusal"),
    [
        (b"", "has 0 bytes"),
        (b"\x80\x04K\x01.", "no .npy file"),
        (npy_file("(8,)", magic=b"\x93NUMPY\x03\x00"), "version .3, 0."),
        (npy_file("(8,)", dtype="'|O'"), "holds object"),
        (npy_file("(8,)", dtype="'<i4'"), "holds int32"),
        (npy_file("(8,)", dtype="[('a', '<f4')]"), "it holds ..*'a'"),
        (npy_file("(9,)"), "asks for 36 bytes and 32 follow"),
        (npy_file("(-8,)"), "asks for -32 bytes"),
        (npy_file("(-2, -4)"), "asks for 32 bytes and 32 follow"),
        (npy_file("(0, 8)", body=b""), "asks for 0 bytes"),
        (npy_file(f"({10**12}, {10**12})"), "asks for 4000000000000"),
        (npy_file("(8L,)"), "no .npy file"),
        (npy_file("(" * 200 + "8" + ",)" * 200), "no .npy file"),
        (npy_file("(2, 2, 2)"), "shape .2, 2, 2."),
        (npy_file("()", body=bytes(4)), "asks for 4 bytes"),
        (npy_file("(1,)", "'<f8'", struct.pack("<d", 1e300)), "overflow"),
    ],
)
def test_hostile_npy_files(tmp_path: Path, data: bytes, refusal: str) -> None:
    path = tmp_path / "v.npy"
    path.write_bytes(data)
    with pytest.raises(BuildError, match=refusal) as caught:
        read_vectors(path, [1])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_no_file_is_opened_that_could_block_or_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_file, "MAX_FILE_BYTES", 100)
    for ending in ("gguf", "npy", "safetensors"):
        os.mkfifo(tmp_path / f"pipe.{ending}")
        (tmp_path / f"folder.{ending}").mkdir()
        (tmp_path / f"large.{ending}").write_bytes(bytes(101))
        for name, refusal in (
            ("pipe", "directory or a device"),
            ("folder", "directory or a device"),
            ("missing", "No such file"),
            ("large", "has 101 bytes, and 1 to 100 are taken"),
        ):
            with pytest.raises(BuildError, match=refusal):
                read_vectors(tmp_path / f"{name}.{ending}", [1])
    with pytest.raises(BuildError, match=r"ends in '.pt'; .gguf, .npy, .safetensors are known"):
        read_vectors(tmp_path / "v.pt", ())


def test_the_largest_allowed_arrays_are_read(tmp_path: Path) -> None:
    """The bounds that guard the package's reader leave what real files hold readable."""

    def fill(writer: GGUFWriter) -> None:
        writer.add_array("general.tags", ["tag"] * 100)
        writer.add_array("numbers", list(range(gguf_header.MAX_ARRAY_ITEMS - 100)))
        writer.add_tensor("direction.1", np.ones(HIDDEN_SIZE, np.float32))

    assert list(read_control_vector(gguf_file(tmp_path / "v.gguf", fill)).vectors) == [1]


def damaged(data: bytes, number: int, source: random.Random) -> bytes:
    """Every truncation first, then bit flips, most of them in the header."""
    if number < len(data):
        return data[:number]
    changed = bytearray(data)
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(data) if source.random() < 0.2 else min(len(data), 260))
        changed[place] ^= 1 << source.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("ending", ["gguf", "npy", "safetensors"])
def test_damaged_files_meet_one_refusal(tmp_path: Path, ending: str) -> None:
    original, path = tmp_path / f"whole.{ending}", tmp_path / f"v.{ending}"
    write_vectors(original, VECTORS, TARGET)
    data, source = original.read_bytes(), random.Random(0)
    refused = 0
    for number in range(len(data) + 600):
        path.write_bytes(damaged(data, number, source))
        try:
            read_vectors(path, ())
        except BuildError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= len(data)

"""Writing and reading bundles: identity, dtypes, atomicity, and what is held in memory."""

import hashlib
import pickle
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from artifacts.bundle import CHECKS, BundleError, BundleErrorCode, load_bundle, parse_bundle, write_bundle
from artifacts.manifest import Intervention, Manifest, ModelIdentity

HIDDEN_SIZE = 16
ROW = "runtime.1.0.write"


def manifest_for(*layers: int) -> Manifest:
    return Manifest(
        name="careful",
        target=ModelIdentity(id="target", architecture="LlamaForCausalLM", hidden_size=HIDDEN_SIZE, num_layers=4),
        interventions=tuple(Intervention(layer=n, kind="add", write=f"runtime.{n}.0.write") for n in layers),
        recommended_strength=0.5,
        maximum_strength=1.0,
    )


def row(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.linspace(-1, 2, HIDDEN_SIZE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_come_back_as_fp32_with_the_stored_values(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "b.safetensors"
    digest = write_bundle(path, manifest_for(1), {ROW: row(dtype)})
    bundle = load_bundle(path)
    assert bundle.digest == digest == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert bundle.manifest == manifest_for(1)
    assert bundle.num_bytes == path.stat().st_size
    assert bundle.rows.keys() == {ROW}
    assert bundle.rows[ROW].dtype == torch.float32
    torch.testing.assert_close(bundle.rows[ROW], row(dtype).float(), rtol=0, atol=0)


def test_bytes_and_file_give_the_same_bundle(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    write_bundle(path, manifest_for(1), {ROW: row(), "rfm.0.vector": torch.ones(3)})
    loaded, parsed = load_bundle(path), parse_bundle(path.read_bytes())
    assert (loaded.digest, loaded.manifest, loaded.num_bytes, loaded.evidence) == (
        parsed.digest,
        parsed.manifest,
        parsed.num_bytes,
        parsed.evidence,
    )
    assert torch.equal(loaded.rows[ROW], parsed.rows[ROW])


def test_evidence_of_any_dtype_and_shape_is_kept_in_the_file_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    evidence = {
        "aligner.0.encoder.weight": torch.randn(3, 5).T,  # not contiguous
        "aligner.0.decoder.bias": torch.tensor(float("nan")),
        "rfm.0.eigenvalues": torch.arange(3, dtype=torch.float64),
        "rfm.0.vector": torch.zeros(0, 4, dtype=torch.bfloat16),
        "rfm.1.vector": torch.tensor([True, False]),
    }
    write_bundle(path, manifest_for(1), {ROW: row()} | evidence)
    bundle = load_bundle(path)
    assert bundle.rows.keys() == {ROW}
    assert {entry.name: entry.shape for entry in bundle.evidence} == {
        name: tuple(tensor.shape) for name, tensor in evidence.items()
    }
    with safe_open(path, framework="pt") as reader:  # the reference implementation agrees with ours
        assert set(reader.keys()) == {ROW} | evidence.keys()
        for name, tensor in evidence.items():
            torch.testing.assert_close(reader.get_tensor(name), tensor, rtol=0, atol=0, equal_nan=True)


def test_several_layers_and_negative_zero_survive(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    rows = {f"runtime.{layer}.0.write": torch.randn(HIDDEN_SIZE) for layer in (0, 1, 3)}
    rows["runtime.0.0.write"][0] = -0.0
    write_bundle(path, manifest_for(3, 0, 1), rows)
    writes = load_bundle(path).rows
    assert all(torch.equal(writes[name], tensor) for name, tensor in rows.items())
    assert torch.signbit(writes["runtime.0.0.write"][0])


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    tensors = {ROW: row(), "rfm.0.vector": torch.ones(3), "rfm.0.eigenvalues": torch.ones(2, dtype=torch.float64)}
    one, other = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    first = write_bundle(one, manifest_for(1), tensors)
    assert write_bundle(other, manifest_for(1), dict(reversed(tensors.items()))) == first
    assert one.read_bytes() == other.read_bytes()
    assert write_bundle(other, manifest_for(1), tensors | {ROW: 2 * row()}) != first


def test_digest_of_a_fixed_bundle_does_not_drift(tmp_path: Path) -> None:
    # The digest is the identity that clients store: a change here is a change of the format.
    tensors = {ROW: torch.arange(HIDDEN_SIZE, dtype=torch.float32), "rfm.0.vector": torch.ones(2)}
    digest = write_bundle(tmp_path / "b.safetensors", manifest_for(1), tensors)
    assert digest == "sha256:1b8ceef17f8ff16f6c2edd545cdcd1f6c2a770a927806851addbf132e4d0f16f"


def test_every_check_is_reported_in_order(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    write_bundle(path, manifest_for(1), {ROW: row()})
    seen: list[str] = []
    load_bundle(path, lambda check, found: seen.append(check) if found else None)
    assert tuple(seen) == CHECKS


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({}, BundleErrorCode.MISSING_TENSOR),
        ({ROW: row(), "runtime.2.0.write": row()}, BundleErrorCode.UNNAMED_TENSOR),
        ({ROW: row(), "runtime.1.0.read": row()}, BundleErrorCode.UNNAMED_TENSOR),
        ({ROW: row(torch.float64)}, BundleErrorCode.UNSAFE_DTYPE),
        ({ROW: row(), "rfm.0.vector": torch.ones(2, dtype=torch.complex64)}, BundleErrorCode.UNSAFE_DTYPE),
        ({ROW: row(), "__metadata__": row()}, BundleErrorCode.UNSAFE_DTYPE),
        ({ROW: row()[1:]}, BundleErrorCode.WRONG_SHAPE),
        ({ROW: row().reshape(1, -1)}, BundleErrorCode.WRONG_SHAPE),
        ({ROW: torch.full((HIDDEN_SIZE,), float("nan"))}, BundleErrorCode.NON_FINITE),
        ({ROW: torch.zeros(HIDDEN_SIZE)}, BundleErrorCode.BAD_NORM),
    ],
)
def test_a_refused_write_leaves_what_was_there(
    tmp_path: Path, tensors: dict[str, torch.Tensor], code: BundleErrorCode
) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(BundleError) as caught:
        write_bundle(path, manifest_for(1), tensors)
    assert caught.value.code is code
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_bundle_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    write_bundle(path, manifest_for(1), {ROW: row()})
    digest = write_bundle(path, manifest_for(1), {ROW: 2 * row()})
    assert load_bundle(path).digest == digest
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_bundle(tmp_path / "none" / "b.safetensors", manifest_for(1), {ROW: row()})


def test_evidence_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    write_bundle(path, manifest_for(1), {ROW: row(), "aligner.0.encoder.weight": torch.zeros(4096, 2048)})
    assert path.stat().st_size > 32 << 20
    tracemalloc.start()
    try:
        load_bundle(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 << 20


def test_errors_cross_process_boundaries() -> None:
    error = BundleError(BundleErrorCode.BAD_NORM, "Too long.")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (copy.code, str(copy)) == (error.code, str(error))

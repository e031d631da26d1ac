"""The Triton kernels without a GPU: interpreted under the tests of every backend, and compiled for GPUs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from steering_kernels import triton_steer  # noqa: E402

HERE = Path(__file__).parent
# The tests that run on `each_backend`. A program sees one token: the longest batch only repeats what shorter ones do.
INTERPRETED = ("test_kinds.py", "test_rows.py", "test_fused.py", "test_properties.py", "test_steer.py")
SELECTED = "triton and not 133"
LINES_SHOWN = 40

POINTERS = {
    **dict.fromkeys(("hidden", "residual", "weight", "pool"), "*bf16"),
    **dict.fromkeys(("codes", "slot_ids"), "*i32"),
    **dict.fromkeys(("params", "strengths", "gates"), "*fp32"),
}
SCALARS = {"epsilon": "fp32", "weight_offset": "fp32"}
# Each kernel and the tensor that it may be called without.
KERNELS = {
    "steer": (triton_steer._steer_kernel, "residual"),
    "fused": (triton_steer._steer_add_rms_norm_kernel, "weight"),
}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_interpreted_kernels_pass_the_tests_of_every_backend() -> None:
    """In a process of its own: the interpreter is chosen once, when the kernels are imported."""
    files = [str(HERE / name) for name in INTERPRETED]
    # NumPy, which the interpreter computes with, warns of infinities that are meant.
    flags = ("-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-k", SELECTED)
    result = run("-m", "pytest", *flags, *files, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    # pytest ends with 5, not 0, when nothing was selected.
    assert result.returncode == 0, "\n".join(result.stdout.splitlines()[-LINES_SHOWN:])


def test_triton_is_not_even_imported_on_a_host_without_the_interpreter() -> None:
    code = "import sys, torch; from steering_kernels import backends; print(*backends.available('cpu', torch.float32))"
    result = run("-c", f"{code}; print('triton' in sys.modules)")
    names, imported = result.stdout.splitlines()
    assert "reference" in names.split()
    assert "triton" not in names.split()
    assert imported == "False"


def compile_for(kernel: Any, architecture: int, hidden_size: int, missing: str | None) -> dict[str, Any]:
    """Every stage of a kernel compiled as a launch would, for bf16 rows, aligned pointers and 8 gates."""
    constants: dict[str, Any] = {**triton_steer.launch_options(hidden_size, num_gates=8), "weight_stride": 1}
    num_warps = constants.pop("num_warps")
    if missing is not None:
        constants[missing] = None
    types = {name: POINTERS.get(name, SCALARS.get(name, "i32")) for name in kernel.arg_names}
    strides = ["hidden_stride", "residual_stride", "pool_stride"] if hidden_size % 16 == 0 else []
    source = triton.compiler.ASTSource(
        kernel,
        {name: "constexpr" if name in constants else type_ for name, type_ in types.items()},
        {name: value for name, value in constants.items() if name in types},
        {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(kernel.arg_names)
            if name in (*POINTERS, *strides) and name not in constants
        },
    )
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    stages: dict[str, Any] = triton.compile(source, target=target, options={"num_warps": num_warps}).asm
    return stages


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="kernels under TRITON_INTERPRET=1 are not compiled")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("hidden_size", "with_optional"), [(4096, True), (2049, False)])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_gpus(
    name: str,
    hidden_size: int,
    with_optional: bool,
    architecture: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, optional = KERNELS[name]
    stages = compile_for(kernel, architecture, hidden_size, missing=None if with_optional else optional)
    assert stages["cubin"].startswith(b"\x7fELF")
    assert f".target sm_{architecture}" in stages["ptx"]
    if hidden_size % 16 == 0:
        # Rows go through memory 16 bytes at a time, never by the element.
        assert "ld.global.v4.b32" in stages["ptx"]
        assert "st.global.v4.b32" in stages["ptx"]
        assert "global.b16" not in stages["ptx"]


@pytest.mark.parametrize(("hidden_size", "num_warps"), [(64, 1), (1024, 2), (4096, 8), (5120, 16), (16384, 16)])
def test_launch_options(hidden_size: int, num_warps: int) -> None:
    options = triton_steer.launch_options(hidden_size, num_gates=8)
    assert options["num_warps"] == num_warps
    assert hidden_size <= options["BLOCK"] < 2 * hidden_size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_runs_on_a_gpu_that_triton_knows() -> None:
    assert triton_steer.supports("cuda", torch.bfloat16)

"""The CUDA sources compile for every target, into kernels that stay in registers and move 16 bytes at a time."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import steering_kernels
from steering_kernels import cuda

NVCC = shutil.which("nvcc")
SOURCE = Path(steering_kernels.__file__).with_name("csrc") / "steer_cuda.cu"
NAMES = ("steer_kernel", "steer_add_rms_norm_kernel")
# Rows in registers (3, 3 and 2 sizes for bf16, fp16 and fp32) and in shared memory (3 dtypes), for both operators.
NUM_IN_REGISTERS, NUM_SHARED = 2 * 8, 2 * 3

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


class Compiled(NamedTuple):
    """What the compiler makes for one target: its report, the PTX of every kernel by mangled name, the machine code."""

    report: str
    ptx: dict[str, str]
    cubin: Path


@pytest.fixture(scope="module", params=cuda.TARGETS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    cubin = folder / "steer.cubin"
    target = f"-gencode=arch=compute_{request.param},code=sm_{request.param}"
    flags = ["-std=c++17", "-O3", "-Werror", "all-warnings", target, "-cubin", "-Xptxas", "-v", "--keep"]
    command = [str(NVCC), *flags, "--keep-dir", str(folder), str(SOURCE), "-o", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    text = next(folder.glob("*.ptx")).read_text()
    bodies = re.split(r"^\s*(?:\.visible |\.weak )?\.entry ", text, flags=re.MULTILINE)[1:]
    return Compiled(result.stderr, {body.split("(")[0].strip(): body for body in bodies}, cubin)


@needs_nvcc
def test_every_kernel_is_there(compiled: Compiled) -> None:
    for row, count in (("RegisterRow", NUM_IN_REGISTERS), ("SharedRow", NUM_SHARED)):
        assert sum(row in name for name in compiled.ptx) == count
    assert all(sum(name in kernel for kernel in compiled.ptx) == len(compiled.ptx) // 2 for name in NAMES)


@needs_nvcc
def test_nothing_spills(compiled: Compiled) -> None:
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.report)
    assert len(found) == len(compiled.ptx)
    assert set(found) == {("0", "0", "0")}, compiled.report
    # 512 threads share the 65536 registers of a multiprocessor.
    assert all(int(registers) <= 128 for registers in re.findall(r"Used (\d+) registers", compiled.report))


@needs_nvcc
def test_loads_and_stores_of_16_bytes(compiled: Compiled) -> None:
    for name, body in compiled.ptx.items():
        if "RegisterRow" in name:
            assert re.search(r"ld\.global(\.\w+)*\.v4\.", body), name
            assert re.search(r"st\.global(\.\w+)*\.v4\.", body), name
            assert not re.search(r"(ld|st)\.global(\.\w+)*\.[bu]16", body), f"{name} moves single elements"


@needs_nvcc
def test_waits_for_the_kernel_before(compiled: Compiled) -> None:
    """Where kernels may overlap, none reads anything before the wait."""
    if "sm_80" in str(compiled.cubin):
        assert not any("griddepcontrol" in body for body in compiled.ptx.values())
        return
    for name, body in compiled.ptx.items():
        assert "griddepcontrol.wait" in body, name
        assert "ld.global" not in body[: body.index("griddepcontrol.wait")], name


@needs_nvcc
@pytest.mark.skipif(shutil.which("cuobjdump") is None, reason="needs cuobjdump")
def test_machine_code(compiled: Compiled) -> None:
    result = subprocess.run(["cuobjdump", "--dump-sass", str(compiled.cubin)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    functions = result.stdout.split("Function : ")[1:]
    assert len(functions) == len(compiled.ptx)
    for function in functions:
        name = function.split()[0]
        assert not re.search(r"\b(LDL|STL)\b", function), f"{name} uses local memory"
        if "RegisterRow" in name:
            assert re.search(r"LDG\.E(\.\w+)*\.128", function) and re.search(r"STG\.E(\.\w+)*\.128", function), name


@needs_nvcc
def test_command_builds_a_library(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "steering_kernels.cuda", "--build", str(tmp_path), "--arch", "80"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stderr) == (0, "")
    library = Path(result.stdout.strip())
    assert library == cuda.built_path(tmp_path) and [library] == list(tmp_path.iterdir())
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"kernels report CUDA error \d+: .*(driver|device)"):
            cuda.Kernels(library, lambda device: 0)


def test_command_without_nvcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("NVCC", raising=False)
    assert cuda.main(["--build", str(tmp_path / "lib")]) == 1
    assert "no nvcc found; put it on PATH" in capsys.readouterr().err
    assert not (tmp_path / "lib").exists()


def test_command_reports_what_the_compiler_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'nvcc fatal: unsupported architecture' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("NVCC", str(compiler))
    assert cuda.main(["--build", str(tmp_path / "lib")]) == 1
    assert "nvcc fatal: unsupported architecture" in capsys.readouterr().err
    assert list((tmp_path / "lib").iterdir()) == []


def test_does_not_run_on_the_host() -> None:
    assert not cuda.supports("cpu", torch.bfloat16)
    assert not cuda.supports("cuda", torch.float64)

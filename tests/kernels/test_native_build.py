"""The CPU kernels built ahead of time: for which processors, and that they are used where no compiler is."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from steering_kernels import native_build

# What an early processor of each level says of itself.
V3 = "flags\t\t: fpu sse2 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"

# Adds a row to one of two; says by which backend, what came out and from which file.
SCRIPT = """
import sys, torch
from pathlib import Path
from steering_kernels import backends, native_build, steer_
native_build.LIBRARY_FOLDER = Path(sys.argv[1])
hidden, codes = torch.ones(2, 40), torch.tensor([[[1, -1, 0, -1, -1, -1, -1, 0]]], dtype=torch.int32)
steer_(hidden, torch.ones(1, 40), codes, torch.ones(1, 1, 4), torch.tensor([0, -1], dtype=torch.int32),
       torch.ones(2), torch.zeros(2, 1))
print(backends.name("cpu", torch.float32), hidden.sum(1).tolist())
"""

needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="libraries are built ahead of time on x86_64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the libraries that the command builds."""
    path = tmp_path_factory.mktemp("lib")
    command = [sys.executable, "-W", "error", "-m", "steering_kernels.native_build", "--build", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert {Path(line) for line in result.stdout.splitlines()} == set(path.iterdir())
    return path


def run(libraries: Path, cache: Path) -> str:
    """What the script says on a machine without a compiler."""
    environment = os.environ | {"CXX": "/nonexistent/c++", "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", SCRIPT, str(libraries)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=120
    ).stdout.strip()


@pytest.mark.parametrize(
    ("processor", "levels"),
    [
        (V4, ["x86-64-v4", "x86-64-v3"]),
        (V3, ["x86-64-v3"]),
        # One that has the wider registers and not all below it runs neither.
        (V4.replace(" movbe", ""), []),
        (V4.replace(" avx512vl", ""), ["x86-64-v3"]),
        ("flags : fpu sse2", []),
        ("Features : fp asimd", []),
    ],
)
def test_a_level_includes_those_below(processor: str, levels: list[str]) -> None:
    assert native_build.levels_of(processor) == levels


@needs_x86
def test_is_used_without_a_compiler(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path) == "cpu [80.0, 40.0]"
    assert list(tmp_path.iterdir()) == []


@needs_x86
@pytest.mark.parametrize("level", native_build.LEVELS)
def test_every_library_computes_the_same(folder: Path, tmp_path: Path, level: str) -> None:
    if level not in native_build.usable_levels():
        pytest.skip(f"this processor is below {level}")
    (tmp_path / "lib").mkdir()
    library = native_build.built_path(folder, level)
    (tmp_path / "lib" / library.name).symlink_to(library)
    assert run(tmp_path / "lib", tmp_path / "cache") == "cpu [80.0, 40.0]"


@needs_x86
def test_a_library_of_other_sources_is_not_used(folder: Path, tmp_path: Path) -> None:
    for library in folder.iterdir():
        other = library.name.rpartition("-")[0]
        (tmp_path / f"{other}-0123456789abcdef.so").symlink_to(library)
    assert run(tmp_path, tmp_path / "cache") == "reference [80.0, 40.0]"


def test_command_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert native_build.main(["--build", str(tmp_path / "lib")]) == 1
    assert "no C++ compiler found; install g++ or set CXX" in capsys.readouterr().err
    assert not (tmp_path / "lib").exists()


def test_command_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert native_build.main(["--build", str(tmp_path / "lib")]) == 1
    assert "on x86_64 only, and this machine is aarch64" in capsys.readouterr().err
    assert not (tmp_path / "lib").exists()

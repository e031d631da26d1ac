"""Building and choosing the compiled backend, and what only it has: conversions of its own and threads."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steering_kernels import CODE_WIDTH, PARAM_WIDTH, Code, Flag, Kind, Param, backends, native, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Steers one row of two twice; says what ran, what came out, and which OpenMP libraries torch and the kernel loaded.
SCRIPT = """
import logging, torch
from pathlib import Path
from steering_kernels import backends, steer_
logging.basicConfig(format="%(message)s")
torch.randn(300, 300) @ torch.randn(300, 300)
hidden, codes = torch.ones(2, 4), torch.tensor([[[1, -1, 0, -1, -1, -1, -1, 0]]], dtype=torch.int32)
for _ in range(2):
    steer_(hidden, torch.ones(1, 4), codes, torch.ones(1, 1, 4), torch.tensor([0, -1], dtype=torch.int32),
           torch.ones(2), torch.zeros(2, 1))
maps = Path("/proc/self/maps")
lines = maps.read_text().splitlines() if maps.exists() else []
print(backends.name("cpu", torch.float32), hidden[:, 0].tolist(), len({l.split()[-1] for l in lines if "omp" in l}))
"""


def run(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def table(*entries: tuple[Kind, int, int, Flag]) -> tuple[Tensor, Tensor]:
    """Codes and parameters of one slot per entry (kind, read, write, flags), all at scale 1."""
    codes = torch.full((len(entries), 1, CODE_WIDTH), -1, dtype=torch.int32)
    for slot, (kind, read, write, flags) in enumerate(entries):
        for column, value in ((Code.KIND, kind), (Code.READ, read), (Code.WRITE, write), (Code.FLAGS, flags)):
            codes[slot, 0, column] = int(value)
    params = torch.zeros(len(entries), 1, PARAM_WIDTH)
    params[:, :, Param.SCALE] = 1.0
    return codes, params


def add_row(hidden: Tensor, row: Tensor) -> None:
    """hidden[0] += row"""
    codes, params = table((Kind.ADD, -1, 0, Flag(0)))
    slots = torch.zeros(1, dtype=torch.int32)
    native.steer_(hidden, row[None], codes, params, slots, torch.ones(1), torch.zeros(1, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_this_machine_runs_the_compiled_kernel(dtype: torch.dtype) -> None:
    assert list(backends.available("cpu", dtype)) == ["cpu", "reference"]
    assert not native.supports("cuda", dtype)


def test_is_built_once(tmp_path: Path) -> None:
    assert run(tmp_path).stdout.startswith("cpu [3.0, 1.0]")
    (library,) = (tmp_path / "expertsteer").iterdir()
    built = library.stat().st_mtime_ns
    assert run(tmp_path).stdout.startswith("cpu [3.0, 1.0]")
    assert library.stat().st_mtime_ns == built


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="loaded libraries are listed on Linux only")
def test_shares_the_threads_of_torch() -> None:
    # A second OpenMP library would start threads of its own beside torch's, on the same cores.
    assert run(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")).stdout.split()[-1] == "1"


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "false"])
def test_falls_back_with_one_warning(tmp_path: Path, compiler: str) -> None:
    result = run(tmp_path, CXX=compiler)
    assert result.stdout.startswith("reference [3.0, 1.0]")
    assert result.stderr.count("Steering falls back to the slower reference kernel") == 1
    assert list((tmp_path / "expertsteer").iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widens_every_value_as_torch_does(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    hidden = torch.zeros(1, len(values))
    add_row(hidden, values)
    torch.testing.assert_close(hidden[0], values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_as_torch_does(dtype: torch.dtype) -> None:
    # Every value of the dtype, the middle between it and the next, and the fp32 neighbours of both.
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float().view(torch.int32)
    half_step = 2 ** (15 if dtype == torch.bfloat16 else 12)
    near = torch.cat([exact + offset for offset in (-1, 0, 1, half_step - 1, half_step, half_step + 1)])
    random = torch.randint(-(2**31), 2**31 - 1, (2**16,), generator=torch.Generator().manual_seed(1))
    values = torch.cat([near, random.int()]).view(torch.float32)
    hidden = torch.zeros(1, len(values), dtype=dtype)
    add_row(hidden, values)
    torch.testing.assert_close(hidden[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "pool_dtype", "weight_dtype"), list(itertools.product(DTYPES, repeat=3)))
def test_mixes_dtypes(dtype: torch.dtype, pool_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, residual, weight = (torch.randn(4, 45, generator=generator).to(dtype) for _ in range(3))
    pool = torch.nn.functional.normalize(torch.randn(2, 45, generator=generator)).to(pool_dtype)
    codes, params = table(
        (Kind.ADD, -1, 1, Flag.KEEP_NORM), (Kind.PROJECT, 0, 0, Flag(0)), (Kind.AFFINE, 1, 0, Flag(0))
    )
    arguments = (pool, codes, params, torch.tensor([0, 1, -1, 2], dtype=torch.int32), torch.ones(4), torch.zeros(4, 1))
    results = []
    for backend in (native, reference):
        out, stream = hidden.clone(), residual.clone()
        backend.steer_add_rms_norm_(out, stream, weight[0].to(weight_dtype), 1e-6, 1.0, *arguments)
        results.append((out, stream))
    # Sums in another order may fall on the other side of a rounding: one unit in the last place.
    torch.testing.assert_close(results[0], results[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_do_not_change_a_bit(num_threads: int) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, residual, pool = (torch.randn(133, 896, generator=generator) for _ in range(3))
    codes, params = table((Kind.PROJECT, 0, 0, Flag(0)), (Kind.ADD_RELATIVE, -1, 1, Flag.KEEP_NORM))
    slots = torch.randint(-1, 2, (133,), generator=generator, dtype=torch.int32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, num_threads):
            torch.set_num_threads(threads)
            out, stream, steered = hidden.clone(), residual.clone(), hidden.clone()
            arguments = (pool, codes, params, slots, torch.ones(133), torch.zeros(133, 1))
            native.steer_add_rms_norm_(out, stream, None, 1e-6, 0.0, *arguments)
            native.steer_(steered, *arguments)
            results.append((out, stream, steered))
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)

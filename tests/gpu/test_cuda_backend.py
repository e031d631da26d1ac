"""The CUDA backend on a real device, against the slow loop of `oracle` and inside CUDA graphs.

Under the sanitizers (each must end with 0 errors; they slow a kernel down a hundred times):
    compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest tests/gpu/test_cuda_backend.py -x
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m pytest tests/gpu/test_cuda_backend.py -x -k sizes
    compute-sanitizer --tool synccheck --error-exitcode 1 python -m pytest tests/gpu/test_cuda_backend.py -x -k sizes
    compute-sanitizer --tool initcheck --error-exitcode 1 python -m pytest tests/gpu/test_cuda_backend.py -x -k sizes
"""

from collections.abc import Callable

import pytest
import torch
from cases import EPSILON, FORMS, Case, bits, make_case
from on_device import OnDevice
from oracle import TOLERANCES, check
from samples import EVERY_KIND, LONG_SLOT, SLOTS
from torch import Tensor

from steering_kernels import Flag, Kind, backends, cuda, reference, steer_, steer_add_rms_norm_
from steering_kernels.entry import Entry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
NAN = float("nan")


@pytest.fixture
def backend() -> OnDevice:
    return OnDevice(cuda)


def test_is_the_backend_of_the_operators() -> None:
    assert next(iter(backends.available("cuda", torch.bfloat16))) == "cuda"


@pytest.mark.parametrize("entry", EVERY_KIND, ids=lambda entry: f"{entry.kind.name} {entry.flags!r}")
@each_dtype
@each_form
def test_kind(form: str, dtype: torch.dtype, entry: Entry, backend: OnDevice) -> None:
    check(backend, make_case([[entry]], [0] * 6, 64, dtype), form)
    kept = entry if entry.kind is Kind.CONDITION else entry._replace(flags=entry.flags | Flag.KEEP_NORM, gate=4)
    check(backend, make_case([[kept]], [0] * 6, 64, dtype), form)


# Every plan: a warp or a block for each row, registers and shared memory.
@pytest.mark.parametrize("hidden_size", [8, 64, 264, 896, 1003, 1032, 2048, 4096, 5120, 8192, 16384, 16392])
@each_dtype
@each_form
def test_sizes_of_rows(form: str, dtype: torch.dtype, hidden_size: int, backend: OnDevice) -> None:
    check(backend, make_case(SLOTS, [0, -1, 1, 0, 2], hidden_size, dtype), form)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 133, 1000])
@pytest.mark.parametrize("slots", ["none", "identical", "mixed"])
@each_form
def test_numbers_of_tokens(form: str, slots: str, num_tokens: int, backend: OnDevice) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    slot_ids = {
        "none": torch.full((num_tokens,), -1),
        "identical": torch.zeros(num_tokens),
        "mixed": torch.randint(-1, len(SLOTS), (num_tokens,), generator=generator),
    }[slots]
    check(backend, make_case(SLOTS, slot_ids, 2048, torch.bfloat16), form)


@each_form
def test_large_batch(form: str) -> None:
    """8192 tokens, against the reference on the same device, a hundred times with the same bits."""
    slot_ids = torch.randint(-1, len(SLOTS), (8192,), generator=torch.Generator().manual_seed(3))
    case = make_case(SLOTS, slot_ids, 4096)
    case = Case(*(value.cuda() if isinstance(value, Tensor) else value for value in case))
    expected, first = case.clone(), case.clone()
    expected.run(reference, form)
    first.run(cuda, form)
    for name in ("hidden", "residual", "gates"):
        torch.testing.assert_close(getattr(first, name), getattr(expected, name), rtol=1e-3, atol=1e-3)
    for _ in range(100):
        again = case.clone()
        again.run(cuda, form)
        assert all(torch.equal(bits(getattr(again, n)), bits(getattr(first, n))) for n in ("hidden", "residual"))


@each_dtype
@each_form
def test_rows_between_poison(form: str, dtype: torch.dtype, backend: OnDevice) -> None:
    """NaN lies between the rows and around them: none gets in, and none is overwritten."""
    for hidden_size, gap in ((2048, 8), (2048, 3), (93, 1)):
        case = make_case(SLOTS, [0, -1, 1, 0], hidden_size, dtype)
        buffers = {}
        for name in ("hidden", "residual", "pool"):
            rows = getattr(case, name)
            buffers[name] = torch.full((len(rows) + 2, hidden_size + gap), NAN, dtype=dtype)
            buffers[name][1:-1, :hidden_size] = rows
        inside = {name: buffer[1:-1, :hidden_size] for name, buffer in buffers.items()}
        poisoned = case._replace(**inside, gates=case.gates.clone())
        poisoned.run(backend, form)
        check(backend, case, form)
        for name, buffer in buffers.items():
            assert torch.equal(bits(inside[name]), bits(getattr(case, name))), name
            assert buffer[:, hidden_size:].isnan().all() and buffer[[0, -1]].isnan().all(), name


@each_dtype
def test_unsteered_rows_stay_bit_identical(dtype: torch.dtype, backend: OnDevice) -> None:
    case = make_case([LONG_SLOT, [], [LONG_SLOT[0]._replace(scale=0.0)]], [-1, 0, 1, 2, -1], 2048, dtype)
    odd = torch.tensor([-0.0, 0.0, NAN, float("inf"), float("-inf")], dtype=dtype)
    unsteered = [0, 2, 3, 4]
    case.hidden[unsteered, : len(odd)] = odd
    case.strengths[[0, 4]] = NAN
    before = case.clone()
    case.run(backend, "in place")
    assert torch.equal(bits(case.hidden[unsteered]), bits(before.hidden[unsteered]))
    assert (case.hidden[1] != before.hidden[1]).any()


def in_place(case: Case) -> None:
    steer_(case.hidden, case.pool, case.codes, case.params, case.slot_ids, case.strengths, case.gates)


def fused(case: Case) -> None:
    tables = (case.pool, case.codes, case.params, case.slot_ids, case.strengths, case.gates)
    steer_add_rms_norm_(case.hidden, case.residual, case.weight, EPSILON, case.weight_offset, *tables)


@pytest.mark.parametrize("operator", [in_place, fused])
def test_graph_reads_tables_anew(operator: Callable[[Case], None]) -> None:
    """Captured twice in a row, so that one of its kernels follows another; replayed after every table was rewritten."""
    case = make_case(SLOTS, [0, -1, 1, 0, 2, 1], 4096, torch.bfloat16)
    other = make_case([LONG_SLOT[::-1], [], LONG_SLOT[2:5]], [2, 0, -1, 1, 2, 0], 4096, torch.bfloat16, seed=23)
    static, fresh = (Case(*(v.cuda() if isinstance(v, Tensor) else v for v in each)) for each in (case, other))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operator(static)
        operator(static)
    for old, new in zip(static, fresh, strict=True):
        if isinstance(old, Tensor):
            old.copy_(new)
    graph.replay()
    operator(fresh)
    operator(fresh)
    for name in ("hidden", "residual", "gates"):
        assert torch.equal(bits(getattr(static, name)), bits(getattr(fresh, name))), name


def test_runs_in_the_current_stream() -> None:
    """It must wait for what its stream does before: here, for a long time."""
    case = make_case(SLOTS, [1] * 6, 2048)
    expected = case.clone()
    expected.run(reference, "in place")
    on_device = Case(*(value.cuda() if isinstance(value, Tensor) else value for value in case))
    rows = on_device.hidden.clone()
    on_device.hidden.fill_(NAN)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        on_device.hidden.copy_(rows)
        in_place(on_device)
    torch.cuda.synchronize()
    torch.testing.assert_close(on_device.hidden.cpu(), expected.hidden)

"""The CUDA kernels, run by an emulation of threads, warps and blocks: every layout of a row, any order of threads."""

import emulation
import pytest
import torch
from cases import FORMS, WRITES, Case, bits, make_case
from oracle import TOLERANCES, check
from samples import EVERY_KIND, SLOTS
from torch import Tensor

from steering_kernels.cuda import Kernels

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="needs a C++ compiler")
each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
SLOT_IDS = [0, -1, 1, 0, 2]


@pytest.fixture
def kernels() -> Kernels:
    return emulation.kernels()


def result(kernels: Kernels, case: Case, form: str) -> list[Tensor]:
    """Bits of everything that the operators write; the case stays as it is."""
    case = case.clone()
    case.run(kernels, form)
    return [bits(case.hidden), bits(case.residual), bits(case.gates)]


@each_dtype
@each_form
def test_every_kind(form: str, dtype: torch.dtype, kernels: Kernels) -> None:
    check(kernels, make_case([[entry] for entry in EVERY_KIND], range(len(EVERY_KIND)), 64, dtype), form)


# A warp for each row with 8, 16, 32 elements in a thread; blocks with as many; registers full; shared memory.
@pytest.mark.parametrize("hidden_size", [8, 264, 1000, 1032, 2048, 5120, 16384, 16392])
@each_dtype
@each_form
def test_sizes_of_rows(form: str, dtype: torch.dtype, hidden_size: int, kernels: Kernels) -> None:
    check(kernels, make_case(SLOTS, SLOT_IDS, hidden_size, dtype), form)


@pytest.mark.parametrize("pool_dtype", list(TOLERANCES), ids=str)
@each_dtype
@each_form
def test_pool_of_another_dtype(form: str, dtype: torch.dtype, pool_dtype: torch.dtype, kernels: Kernels) -> None:
    check(kernels, make_case(SLOTS, SLOT_IDS, 520, dtype, pool_dtype), form)


@pytest.mark.parametrize("hidden_size", [512, 2048])
@each_dtype
@each_form
def test_layout_of_rows_does_not_change_a_bit(
    form: str, dtype: torch.dtype, hidden_size: int, kernels: Kernels
) -> None:
    """Rows that are not aligned take another way through the device, with the same sums."""
    case = make_case(SLOTS, SLOT_IDS, hidden_size, dtype)
    buffer = torch.full((len(SLOT_IDS), hidden_size + 3), 7.0, dtype=dtype)
    inside = buffer[:, 1:-2]
    inside.copy_(case.hidden)
    expected = result(kernels, case, form)
    unaligned = case._replace(hidden=inside, residual=case.residual.clone(), gates=case.gates.clone())
    unaligned.run(kernels, form)
    written = [bits(inside.contiguous()), bits(unaligned.residual), bits(unaligned.gates)]
    assert all(torch.equal(*pair) for pair in zip(written, expected, strict=True))
    assert (buffer[:, 0] == 7.0).all() and (buffer[:, -2:] == 7.0).all()


@pytest.mark.parametrize("hidden_size", [256, 2048])
@each_form
def test_batch_does_not_change_a_bit(form: str, hidden_size: int, kernels: Kernels) -> None:
    case = make_case(SLOTS, SLOT_IDS * 3, hidden_size, torch.bfloat16)
    together = result(kernels, case, form)
    for token in range(3):
        part = slice(token, token + 1)
        names = ("hidden", "residual", "slot_ids", "strengths", "gates")
        alone = case._replace(**{name: getattr(case, name)[part].clone() for name in names})
        for one, all_of_them in zip(result(kernels, alone, form), together, strict=True):
            assert torch.equal(one, all_of_them[part])


@pytest.mark.parametrize("hidden_size", [520, 4096, 97])
@each_form
def test_any_order_of_threads(form: str, hidden_size: int, kernels: Kernels) -> None:
    case = make_case(SLOTS, SLOT_IDS, hidden_size)
    expected = result(kernels, case, form)
    for seed in range(8):
        emulation.draw_order_of_threads(seed)
        assert all(torch.equal(*pair) for pair in zip(result(kernels, case, form), expected, strict=True))


@pytest.mark.parametrize("hidden_size", [8, 9])
def test_more_tokens_than_one_look_at_the_slots(hidden_size: int, kernels: Kernels) -> None:
    """Each team of the in-place operator looks at 32 slots at once; this batch needs three looks."""
    slot_ids = torch.full((20000,), -1)
    slot_ids[[0, 31, 32, 4095, 8191, 8192, 16383, 16384, 19999]] = 1
    case = make_case(SLOTS, slot_ids, hidden_size)
    before = case.clone()
    case.run(kernels, "in place")
    steered = before.hidden + before.strengths[:20000, None] * before.pool[WRITES[0]]
    expected = torch.where(slot_ids[:, None] >= 0, steered, before.hidden)
    torch.testing.assert_close(case.hidden, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(bits(case.hidden[slot_ids < 0]), bits(before.hidden[slot_ids < 0]))


@pytest.mark.parametrize("weight", ["none", "float32", "unaligned"])
@each_dtype
def test_weights_of_the_norm(weight: str, dtype: torch.dtype, kernels: Kernels) -> None:
    case = make_case(SLOTS, SLOT_IDS, 1032, dtype)
    weights = {
        "none": None,
        "float32": torch.linspace(-1, 1, 1032),
        "unaligned": torch.linspace(-1, 1, 1033).to(dtype)[1:],
    }
    check(kernels, case._replace(weight=weights[weight], weight_offset=0.0), "fused")


@pytest.mark.parametrize(("hidden_size", "num_gates"), [(40000, 8), (40, 33)])
@each_form
def test_beyond_what_the_kernels_hold(form: str, hidden_size: int, num_gates: int, kernels: Kernels) -> None:
    """Rows larger than shared memory, and more gates than lanes."""
    case = make_case(SLOTS, SLOT_IDS, hidden_size)
    check(kernels, case._replace(gates=torch.rand(len(SLOT_IDS), num_gates)), form)


@each_form
def test_no_tokens(form: str, kernels: Kernels) -> None:
    case = make_case(SLOTS, SLOT_IDS, 64)
    case._replace(hidden=case.hidden[:0], residual=case.residual[:0]).run(kernels, form)

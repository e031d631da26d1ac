"""The fused operator against steering, residual add and RMSNorm one after the other."""

from types import ModuleType

import pytest
import torch
from cases import EPSILON, READS, SMALL, WRITES, Case, make_case
from oracle import TOLERANCES, check
from torch import Tensor

from steering_kernels import Flag, Kind
from steering_kernels.entry import Entry

SLOTS = [
    [Entry(Kind.ADD, write=WRITES[0])],
    [Entry(Kind.CLAMP, READS[0], READS[0], a=1.0, b=2.0), Entry(Kind.PROJECT, READS[1], READS[1])],
    [Entry(Kind.CONDITION, READS[2], gate_out=0, b=1.0), Entry(Kind.ADD, write=WRITES[1], gate=0)],
    [Entry(Kind.AFFINE, SMALL[0], SMALL[1], flags=Flag.KEEP_NORM)],
    [],
]
SLOT_IDS = [0, 1, 2, 3, 4, -1, 0, 1]


def add_and_norm(case: Case) -> tuple[Tensor, Tensor]:
    """Residual stream and its norm in torch."""
    x = case.hidden.float() + case.residual.float()
    weight = None if case.weight is None else case.weight.float() + case.weight_offset
    return x, torch.nn.functional.rms_norm(x, (x.shape[1],), weight, EPSILON)


@pytest.mark.parametrize("hidden_size", [40, 896, 1003])
@pytest.mark.parametrize("weight", ["none", "same", "float32", "offset 0", "offset 1"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_equals_the_steps_one_by_one(
    dtype: torch.dtype, weight: str, hidden_size: int, each_backend: ModuleType
) -> None:
    case = make_case(SLOTS, SLOT_IDS, hidden_size, dtype)
    if weight == "none":
        case = case._replace(weight=None)
    elif weight == "float32":
        # Values that do not fit into the dtype of hidden.
        case = case._replace(weight=1.0 + torch.linspace(0, 1e-3, hidden_size))
    case = case._replace(weight_offset=1.0 if weight == "offset 1" else 0.0)
    steps = case.clone()
    check(each_backend, case, "fused")
    steps.run(each_backend, "with residual")
    stream, normed = add_and_norm(steps)
    # One by one, hidden is rounded between the steps.
    roundoff = TOLERANCES[dtype][0]
    rounded = 4 * roundoff * (stream.abs() + steps.residual.float().abs()) + 1e-5
    assert ((case.residual.float() - stream).abs() <= rounded).all()
    scale = normed.abs().amax() / stream.abs().amax()
    assert ((case.hidden.float() - normed).abs() <= rounded * scale * 4 + 4 * roundoff * normed.abs()).all()
    assert torch.equal(case.gates, steps.gates)


def test_weight_with_gaps(each_backend: ModuleType) -> None:
    """A weight may be a column of something larger."""
    case = make_case(SLOTS, SLOT_IDS)
    gaps = torch.stack([case.weight, torch.full_like(case.weight, 7.0)], 1)[:, 0]
    check(each_backend, case._replace(weight=gaps), "fused")


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_row_of_zeros(dtype: torch.dtype, each_backend: ModuleType) -> None:
    """Epsilon keeps it finite, also where an entry wants the row's norm or direction."""
    entries = [
        Entry(Kind.GATED_ADD, READS[0], WRITES[0], flags=Flag.COSINE | Flag.HARD, b=1.0),
        Entry(Kind.ADD_RELATIVE, write=WRITES[0]),
        Entry(Kind.PROJECT, READS[0], READS[0], flags=Flag.KEEP_NORM),
        Entry(Kind.ROTATE, READS[0], READS[0], READS[1], READS[1], flags=Flag.ABSOLUTE, a=1.0),
    ]
    case = make_case([entries], [0, -1], dtype=dtype)
    case.hidden.zero_()
    case.residual.zero_()
    case.run(each_backend, "fused")
    assert (case.hidden == 0).all()
    assert (case.residual == 0).all()

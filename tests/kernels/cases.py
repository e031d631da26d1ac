"""Arguments of the operators for tests."""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from steering_kernels import NUM_GATES
from steering_kernels.entry import Entry, pack

EPSILON = 1e-5
# Rows of the pool: unit rows to read, rows as large as a residual stream to write, and small ones.
READS, WRITES, SMALL = range(0, 5), range(5, 9), range(9, 12)
# How an operator is called: steer_, steer_ with a residual, steer_add_rms_norm_.
FORMS = ("in place", "with residual", "fused")


class Case(NamedTuple):
    """Arguments of the operators; the token tables are longer than the batch, as in the runner."""

    hidden: Tensor
    residual: Tensor
    weight: Tensor | None
    pool: Tensor
    codes: Tensor
    params: Tensor
    slot_ids: Tensor
    strengths: Tensor
    gates: Tensor
    weight_offset: float = 1.0

    def run(self, backend: ModuleType, form: str) -> None:
        tables = (self.pool, self.codes, self.params, self.slot_ids, self.strengths, self.gates)
        if form == "fused":
            norm = (self.weight, EPSILON, self.weight_offset)
            backend.steer_add_rms_norm_(self.hidden, self.residual, *norm, *tables)
        elif form == "with residual":
            backend.steer_(self.hidden, *tables, self.residual)
        else:
            backend.steer_(self.hidden, *tables)

    def clone(self) -> "Case":
        return Case(*(value.clone() if isinstance(value, Tensor) else value for value in self))


def make_case(
    slots: Sequence[Sequence[Entry]],
    slot_ids: Sequence[int] | Tensor,
    hidden_size: int = 40,
    dtype: torch.dtype = torch.float32,
    pool_dtype: torch.dtype | None = None,
    seed: int = 17,
) -> Case:
    """Random rows and strengths for given entries; nothing that lies behind the batch's tokens may matter."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, spare = len(slot_ids), 3

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    reads = torch.nn.functional.normalize(normal(len(READS), hidden_size))
    pool = torch.cat([reads, normal(len(WRITES), hidden_size), 0.1 * normal(len(SMALL), hidden_size)])
    return Case(
        (3 * normal(num_tokens, hidden_size)).to(dtype),
        (3 * normal(num_tokens, hidden_size)).to(dtype),
        (0.3 * normal(hidden_size)).to(dtype),
        pool.to(pool_dtype or dtype),
        *pack(slots),
        torch.cat([torch.as_tensor(slot_ids), torch.zeros(spare)]).int(),
        torch.cat([0.5 + normal(num_tokens), torch.full((spare,), float("nan"))]),
        torch.rand(num_tokens + spare, NUM_GATES, generator=generator),
    )


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that NaN equals NaN and 0.0 differs from -0.0."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)

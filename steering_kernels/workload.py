"""What the benchmark times: a batch of rows, steered in every way, beside what the same machine does without."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from steering_kernels.entry import Entry, pack
from steering_kernels.table import NUM_GATES, Flag, Kind
from steering_kernels.timing import Work

NUM_SLOTS = 256
_ROWS_PER_SLOT = 6
_EPSILON = 1e-6
# More than the L2 cache of any GPU in use, and no more sets than a graph should have calls.
_ROTATED_BYTES, _SETS_MAX = 256 << 20, 64
# So small that no number of repetitions in place makes a row overflow; zero would be skipped.
_STRENGTH = 1e-4

# Entries of a slot whose rows of the pool begin at `row`.
KINDS: dict[str, Callable[[int], list[Entry]]] = {
    "add": lambda row: [Entry(Kind.ADD, write=row)],
    "add-keep-norm": lambda row: [Entry(Kind.ADD, write=row, flags=Flag.KEEP_NORM)],
    "add-relative": lambda row: [Entry(Kind.ADD_RELATIVE, write=row)],
    "project": lambda row: [Entry(Kind.PROJECT, row, row)],
    "clamp": lambda row: [Entry(Kind.CLAMP, row, row, a=-0.1, b=0.1)],
    "gated-add": lambda row: [Entry(Kind.GATED_ADD, row, row + 1, b=1.0)],
    "feature": lambda row: [Entry(Kind.FEATURE, row, row + 1, flags=Flag.IDENTITY, c=2.0)],
    "rotate": lambda row: [Entry(Kind.ROTATE, row, row, row + 1, row + 1, a=1.0)],
    "affine": lambda row: [Entry(Kind.AFFINE, row, row + 1)],
    "rank-4": lambda row: [
        Entry(Kind.CONDITION, row, gate_out=0, b=1.0),
        Entry(Kind.GATED_ADD, row + 1, row + 2, gate=0, b=1.0),
        Entry(Kind.CLAMP, row + 3, row + 3, a=-0.1, b=0.1),
        Entry(Kind.ROTATE, row + 4, row + 4, row + 5, row + 5, a=1.0),
    ],
}


@dataclass(frozen=True)
class Shape:
    """A batch of rows on a device, "cpu" or "cuda"."""

    num_tokens: int
    hidden_size: int
    dtype: torch.dtype
    device: str

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    @property
    def num_sets(self) -> int:
        """Sets of buffers that calls go round; the host has no cache to get out of the way."""
        if self.device == "cpu":
            return 1
        return min(_SETS_MAX, max(4, math.ceil(_ROTATED_BYTES / (2 * self.num_tokens * self.row_bytes))))


class Variant(NamedTuple):
    """A way to call a backend.

    Attributes:
        fused: `steer_add_rms_norm_`, or `steer_` without residual.
        slots: "none" (-1 for all tokens), "one" (the same for all) or "256" (all slots in turn).
        kind: key of `KINDS`.
    """

    fused: bool
    slots: str
    kind: str

    def __str__(self) -> str:
        form = "fused" if self.fused else "in place"
        return f"{form}, slots -1" if self.slots == "none" else f"{form}, {self.kind}, slots {self.slots}"

    def moved_rows(self, num_tokens: int) -> int:
        """Rows that a call must read and write at least, each row of the pool counted once."""
        used = {"none": 0, "one": 1, "256": min(num_tokens, NUM_SLOTS)}[self.slots]
        pool_rows = used * len({row for entry in KINDS[self.kind](0) for row in entry[1:5] if row >= 0})
        if self.fused:
            return 4 * num_tokens + 1 + pool_rows
        return pool_rows + (0 if self.slots == "none" else 2 * num_tokens)


FUSED_IDLE, IN_PLACE_IDLE = Variant(True, "none", "add"), Variant(False, "none", "add")


def variants(kinds: Sequence[str]) -> list[Variant]:
    """All variants of some kinds, idle ones first in each form."""
    steered = [(slots, kind) for kind in kinds for slots in ("one", "256")]
    return [Variant(fused, *each) for fused in (True, False) for each in [("none", "add"), *steered]]


class Workload:
    """Buffers of one shape and the calls on them."""

    def __init__(self, shape: Shape, kinds: Sequence[str], vllm_ops: bool) -> None:
        self.shape, self.variants = shape, variants(kinds)
        self.plain: dict[str, Callable[[Tensor, Tensor], object]] = {"plain torch": self._torch_norm}
        if vllm_ops:
            self.plain["plain vLLM"] = self._vllm_norm
        generator = torch.Generator().manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, shape.hidden_size, generator=generator)

        def placed(rows: Tensor) -> Tensor:
            return rows.to(shape.device, shape.dtype)

        self._fresh = placed(normal(2, shape.num_tokens))
        self._sets = [self._fresh.clone() for _ in range(shape.num_sets)]
        self._weight = placed(normal())
        self._pool = placed(torch.nn.functional.normalize(normal(NUM_SLOTS * _ROWS_PER_SLOT), dim=1))
        self._tables = {
            kind: tuple(table.to(shape.device) for table in pack([entries(slot) for slot in _first_rows()], max_ops=8))
            for kind, entries in KINDS.items()
            if kind in {*kinds, "add"}
        }
        tokens = torch.arange(shape.num_tokens)
        slot_ids = {"none": tokens * 0 - 1, "one": tokens * 0, "256": tokens % NUM_SLOTS}
        self._slot_ids = {name: slots.to(shape.device, torch.int32) for name, slots in slot_ids.items()}
        self._strengths = torch.full((shape.num_tokens,), _STRENGTH, device=shape.device)
        self._gates = torch.zeros(shape.num_tokens, NUM_GATES, device=shape.device)

    def works(self, modules: dict[str, ModuleType]) -> dict[str, Work]:
        """Everything that takes turns, by name; a variant's begins with its backend's."""
        num_tokens, row_bytes = self.shape.num_tokens, self.shape.row_bytes
        works = {
            name: Work([partial(norm, *rows) for rows in self._sets], self._reset, (4 * num_tokens + 1) * row_bytes)
            for name, norm in self.plain.items()
        }
        copies = [torch.empty_like(rows) for rows in self._sets]
        pairs = list(zip(copies, self._sets, strict=True))
        for name, half in (("copy, fused's bytes", slice(None)), ("copy, in place's bytes", slice(1))):
            copy_calls = [partial(copy[half].copy_, rows[half]) for copy, rows in pairs]
            works[name] = Work(copy_calls, self._reset, 2 * copies[0][half].numel() * self.shape.dtype.itemsize)
        number = torch.zeros(1, device=self.shape.device)
        # As many as the others, so that what a replay of a graph costs is spread as thinly.
        works["launch"] = Work([partial(number.add_, 1.0)] * self.shape.num_sets, number.zero_, 0)
        for backend, module in modules.items():
            for variant in self.variants:
                call = partial(self._call, module, variant, self._strengths)
                moved = variant.moved_rows(num_tokens) * row_bytes
                works[f"{backend} {variant}"] = Work([partial(call, *rows) for rows in self._sets], self._reset, moved)
        return works

    def require_effect(self, backend: str, module: ModuleType) -> None:
        """A benchmark of steering that does not steer measures nothing.

        Raises:
            RuntimeError: a variant leaves rows as they are that it should change, or the other way round.
        """
        full = torch.ones_like(self._strengths)
        for variant in self.variants:
            ours, plain = self._fresh.clone(), self._fresh.clone()
            self._call(module, variant, full, *ours)
            self._call(module, variant._replace(slots="none"), full, *plain)
            if torch.equal(ours, plain) != (variant.slots == "none"):
                raise RuntimeError(f"{backend}: {variant} does not steer what it should")

    def _call(self, module: ModuleType, variant: Variant, strengths: Tensor, hidden: Tensor, residual: Tensor) -> None:
        codes, params = self._tables[variant.kind]
        tables = (self._pool, codes, params, self._slot_ids[variant.slots], strengths, self._gates)
        if variant.fused:
            module.steer_add_rms_norm_(hidden, residual, self._weight, _EPSILON, 0.0, *tables)
        else:
            module.steer_(hidden, *tables)

    def _reset(self) -> None:
        for rows in self._sets:
            rows.copy_(self._fresh)

    def _torch_norm(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return torch.rms_norm(residual.add_(hidden), (self.shape.hidden_size,), self._weight, _EPSILON)

    def _vllm_norm(self, hidden: Tensor, residual: Tensor) -> None:
        torch.ops._C.fused_add_rms_norm(hidden, residual, self._weight, _EPSILON)


def _first_rows() -> range:
    return range(0, NUM_SLOTS * _ROWS_PER_SLOT, _ROWS_PER_SLOT)

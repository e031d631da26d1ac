"""Bundles of the benchmark, each with a list of interventions at every layer, and how many of them are resident."""

from typing import Any

import torch
from torch import Tensor

from server.engine.program import Program, Step
from steering_kernels import Kind

# Rows of the pool that one layer of a bundle takes. `general` is a rank-4 list: a condition, what it gates, a clamp and
# a rotation.
ROWS_PER_LAYER = {"add": 1, "general": 6}
# Enough to change the generated tokens of any model, by which a turn proves that it was steered.
_VECTOR_NORM = 200.0
_CLAMP, _ANGLE = 0.1, 0.3
# Contents repeat from here on, which nobody notices: every bundle has rows of its own in the pool.
_CONTENTS = 64


class Residents:
    """The bundles that an engine holds: always those numbered from 0.

    Args:
        engine: a steering `LLMEngine`.
        kind: key of `ROWS_PER_LAYER`.
    """

    def __init__(self, engine: Any, kind: str) -> None:
        self._engine = engine
        self._kind = kind
        self._wires: dict[int, tuple[dict[str, Any], bytes]] = {}
        self._count = 0

    def resize(self, count: int) -> None:
        """Load or unload bundles until `count` are resident; call between two batches."""
        for index in range(self._count, count):
            self._engine.collective_rpc("steering_load", args=(digest(index), *self._wire(index % _CONTENTS)))
        for index in range(count, self._count):
            self._engine.collective_rpc("steering_unload", args=(digest(index),))
        self._count = count

    def _wire(self, seed: int) -> tuple[dict[str, Any], bytes]:
        if seed not in self._wires:
            config = self._engine.model_config
            program = _program(self._kind, config.get_total_num_hidden_layers(), config.get_hidden_size(), seed)
            self._wires[seed] = program.to_wire()
        return self._wires[seed]


def digest(index: int) -> str:
    """Digest under which a bundle is resident."""
    return f"bench:{index}"


def _program(kind: str, num_layers: int, hidden_size: int, seed: int) -> Program:
    generator = torch.Generator().manual_seed(seed)
    size = (num_layers, ROWS_PER_LAYER[kind], hidden_size)
    rows = torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=2)
    if kind == "add":
        steps = tuple(Step(layer, Kind.ADD, write=layer) for layer in range(num_layers))
        return Program(rows.flatten(0, 1) * _VECTOR_NORM, steps)
    return _general(rows)


def _general(rows: Tensor) -> Program:
    """A rank-4 list per layer, of [num_layers, 6, hidden_size] rows of norm 1."""
    rows[:, 2] *= _VECTOR_NORM
    # A rotation takes an orthonormal plane.
    inside = (rows[:, 5] * rows[:, 4]).sum(1, keepdim=True) * rows[:, 4]
    rows[:, 5] = torch.nn.functional.normalize(rows[:, 5] - inside, dim=1)
    steps: list[Step] = []
    for layer, row in enumerate(range(0, rows.shape[0] * rows.shape[1], rows.shape[1])):
        steps += [
            Step(layer, Kind.CONDITION, read=row, gate_out=0, b=1.0),
            Step(layer, Kind.GATED_ADD, read=row + 1, write=row + 2, gate=0, b=1.0),
            Step(layer, Kind.CLAMP, read=row + 3, write=row + 3, a=-_CLAMP, b=_CLAMP),
            Step(layer, Kind.ROTATE, read=row + 4, write=row + 4, read2=row + 5, write2=row + 5, a=_ANGLE),
        ]
    return Program(rows.flatten(0, 1), tuple(steps), num_gates=1)

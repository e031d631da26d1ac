"""A program's steps as rows of the operation table, with their places in the row pool filled in."""

from dataclasses import dataclass

import numpy as np

from server.engine.program import Program
from steering_kernels import CODE_WIDTH, Code


@dataclass(frozen=True)
class Entries:
    """Entries of the operation table, in the order of the program's steps.

    Attributes:
        layers: [num_steps], int64; layer of each.
        indices: [num_steps], int64; how many steps of the same layer come before it.
        codes: [num_steps, CODE_WIDTH], int32; gates as the program counts them.
        params: [num_steps, 3], fp32; a, b, c.
    """

    layers: np.ndarray
    indices: np.ndarray
    codes: np.ndarray
    params: np.ndarray

    @staticmethod
    def of(program: Program, places: tuple[int, ...]) -> "Entries":
        """Entries of a program whose rows have these places in the pool."""
        codes = np.zeros((len(program.steps), CODE_WIDTH), dtype=np.int32)
        seen: dict[int, int] = {}
        indices = []
        for number, step in enumerate(program.steps):
            indices.append(seen.get(step.layer, 0))
            seen[step.layer] = indices[-1] + 1
            rows = (places[row] if row >= 0 else -1 for row in (step.read, step.write, step.read2, step.write2))
            # In the order of `Code`.
            codes[number] = [step.kind, *rows, step.gate, step.gate_out, step.flags]
        layers = np.array([step.layer for step in program.steps], dtype=np.int64)
        params = np.array([[step.a, step.b, step.c] for step in program.steps], dtype=np.float32).reshape(-1, 3)
        return Entries(layers, np.array(indices, dtype=np.int64), codes, params)

    def codes_with(self, first_gate: int) -> np.ndarray:
        """The codes, with the program's gates counted from `first_gate`."""
        codes = self.codes.copy()
        gates = codes[:, [Code.GATE, Code.GATE_OUT]]
        codes[:, [Code.GATE, Code.GATE_OUT]] = np.where(gates >= 0, gates + first_gate, -1)
        return codes

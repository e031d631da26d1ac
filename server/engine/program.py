"""What a bundle makes the engine do: pool rows and the steps that use them, as plain data that travels in an RPC."""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steering_kernels import MAX_OPS, NUM_GATES, Kind


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of the operation table, before its rows and gates have places on a device.

    Attributes:
        layer: decoder block (0-based) whose output it acts on.
        kind: what it does, see `steering_kernels.reference.steer_`.
        read, write, read2, write2: rows of the program, -1 for none.
        gate: gate of the program that multiplies its strength, -1 for none.
        gate_out: gate of the program that a CONDITION sets, -1 for the other kinds.
        flags: bits of `steering_kernels.Flag`.
        a, b, c: parameters of the kind.
    """

    layer: int
    kind: Kind
    read: int = -1
    write: int = -1
    read2: int = -1
    write2: int = -1
    gate: int = -1
    gate_out: int = -1
    flags: int = 0
    a: float = 0.0
    b: float = 0.0
    c: float = 0.0


@dataclass(frozen=True)
class Program:
    """Everything that a bundle makes the engine do.

    Attributes:
        rows: [num_rows, hidden_size], fp32, on the host.
        steps: in the order in which they apply at their layer.
        num_gates: gates it uses; each is set by CONDITION steps or by a trigger.
        triggers: gate -> token ids; the gate is 1 for tokens among them and 0 for all others.
    """

    rows: Tensor
    steps: tuple[Step, ...]
    num_gates: int = 0
    triggers: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def require_sound(self, num_layers: int) -> None:
        """Refuse a program that names a row, a gate or a layer that does not exist, or more steps than a layer takes.

        Args:
            num_layers: decoder blocks of the served model.

        Raises:
            ValueError: says what it names and what there is.
        """
        num_rows = self.rows.shape[0] if self.rows.dim() else 0
        if not 0 <= self.num_gates <= NUM_GATES:
            raise ValueError(f"it has {self.num_gates} gates, at most {NUM_GATES} are possible")
        bounds = [("layer", step.layer, 0, num_layers) for step in self.steps]
        for step in self.steps:
            bounds += [("row", row, -1, num_rows) for row in (step.read, step.write, step.read2, step.write2)]
            bounds += [("gate", gate, -1, self.num_gates) for gate in (step.gate, step.gate_out)]
        bounds += [("gate", gate, 0, self.num_gates) for gate in self.triggers]
        for name, number, first, stop in bounds:
            if not first <= number < stop:
                raise ValueError(f"it uses {name} {number}, there are {stop}")
        longest = max(Counter(step.layer for step in self.steps).values(), default=0)
        if longest > MAX_OPS:
            raise ValueError(f"it has {longest} interventions at one layer, at most {MAX_OPS} are possible")

    def require_gates_within(self, layers: Collection[int]) -> None:
        """Refuse a condition and what waits for it in different stages of a pipeline: a gate does not travel.

        Args:
            layers: those that one stage runs.

        Raises:
            ValueError: names the layers.
        """
        for gate in {step.gate_out for step in self.steps if step.gate_out >= 0}:
            places = {step.layer for step in self.steps if gate in (step.gate, step.gate_out)}
            if 0 < len(places.intersection(layers)) < len(places):
                raise ValueError(
                    f"a condition and the interventions that wait for it, at layers {sorted(places)}, are in different "
                    "stages of the pipeline; use fewer stages"
                )

    def to_wire(self) -> tuple[dict[str, Any], bytes]:
        """Plain data and the rows' bytes (fp32, C order, little endian)."""
        spec = {
            "steps": [asdict(step) | {"flags": int(step.flags), "kind": int(step.kind)} for step in self.steps],
            "num_gates": self.num_gates,
            "triggers": [[gate, list(tokens)] for gate, tokens in self.triggers.items()],
            "shape": list(self.rows.shape),
        }
        return spec, self.rows.contiguous().numpy().astype("<f4").tobytes()

    @staticmethod
    def from_wire(spec: Mapping[str, Any], data: bytes) -> "Program":
        """The program that `to_wire` gave away."""
        rows = torch.from_numpy(np.frombuffer(data, dtype="<f4").reshape(spec["shape"]).copy())
        steps = tuple(Step(**(values | {"kind": Kind(values["kind"])})) for values in spec["steps"])
        return Program(rows, steps, spec["num_gates"], {gate: tuple(tokens) for gate, tokens in spec["triggers"]})


def checksum(spec: Mapping[str, Any], data: bytes) -> str:
    """SHA-256 over a program on the wire, for ranks to acknowledge what they received."""
    return hashlib.sha256(repr(sorted(spec.items())).encode() + data).hexdigest()

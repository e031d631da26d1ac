"""Interventions in plain torch, and the same as programs for the engine."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from server.engine.program import Program, Step
from steering_kernels import Kind

KINDS = ("add", "clamp", "rotate")
_EVERY_KIND = "all"
_ANGLE = 2.0
_SEED = 7


@dataclass(frozen=True)
class Edit:
    """One intervention at one layer.

    Attributes:
        kind: what it does.
        layer: decoder block whose output it acts on.
        rows: [1, hidden_size] for add and clamp, [2, hidden_size] for rotate, fp32; orthonormal but for add.
        low, high: bounds of the projection, for clamp.
        angle: radians, for rotate.
    """

    kind: Literal["add", "clamp", "rotate"]
    layer: int
    rows: Tensor
    low: float = 0.0
    high: float = 0.0
    angle: float = 0.0

    def applied(self, stream: Tensor, strength: float) -> Tensor:
        """The edited residual stream, like `stream` [..., hidden_size]; computed in float64."""
        x, rows = stream.double(), self.rows.double()
        if self.kind == "add":
            return (x + strength * rows[0]).to(stream)
        p = x @ rows.T
        if self.kind == "clamp":
            return (x + strength * (p.clamp(self.low, self.high) - p) @ rows).to(stream)
        turn = torch.tensor(strength * self.angle, dtype=torch.float64)
        matrix = torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])
        return (x + (p @ matrix.T - p) @ rows).to(stream)

    def step(self, first_row: int) -> Step:
        """The engine's form of it, with its rows at `first_row` of a program."""
        if self.kind == "add":
            return Step(self.layer, Kind.ADD, write=first_row)
        if self.kind == "clamp":
            return Step(self.layer, Kind.CLAMP, read=first_row, write=first_row, a=self.low, b=self.high)
        second = first_row + 1
        return Step(self.layer, Kind.ROTATE, read=first_row, write=first_row, read2=second, write2=second, a=self.angle)


def bundles_for(norms: list[float], hidden_size: int) -> dict[str, tuple[Edit, ...]]:
    """Every kind alone at the first, a middle and the last layer, and one bundle with all kinds at all layers.

    Args:
        norms: of the residual stream after each layer, to which the edits are proportioned.
        hidden_size: of the model.
    """
    generator = torch.Generator().manual_seed(_SEED)
    layers = range(len(norms))

    def edit(kind: Literal["add", "clamp", "rotate"], layer: int) -> Edit:
        rows = torch.linalg.qr(torch.randn(hidden_size, 2, generator=generator)).Q.T.contiguous()
        norm = norms[layer]
        match kind:
            case "add":
                return Edit(kind, layer, rows[:1] * norm / 2)
            case "clamp":
                return Edit(kind, layer, rows[:1], low=0.4 * norm, high=0.6 * norm)
            case "rotate":
                return Edit(kind, layer, rows, angle=_ANGLE)

    single = {
        f"{kind}:{layer}": (edit(kind, layer),)
        for kind in KINDS
        for layer in (layers[0], layers[len(layers) // 2], layers[-1])
    }
    return single | {_EVERY_KIND: tuple(edit(kind, layer) for layer in layers for kind in KINDS)}


def kind_of(bundle: str) -> str | None:
    """The only kind in one of the bundles of `bundles_for`; None for the one that has all of them."""
    return None if bundle == _EVERY_KIND else bundle.partition(":")[0]


def program_of(edits: Iterable[Edit]) -> Program:
    """The engine's form of a bundle."""
    rows: list[Tensor] = []
    steps = []
    for edit in edits:
        steps.append(edit.step(len(rows)))
        rows.extend(edit.rows)
    return Program(torch.stack(rows), tuple(steps))


def wire_of(bundles: Mapping[str, Iterable[Edit]]) -> dict[str, list[object]]:
    """Bundles as JSON: name -> specification and rows in hexadecimal."""
    wires = {name: program_of(edits).to_wire() for name, edits in bundles.items()}
    return {name: [spec, data.hex()] for name, (spec, data) in wires.items()}

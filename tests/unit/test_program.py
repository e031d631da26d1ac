"""What a bundle makes the engine do, on its way to the workers."""

import json
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest
import torch

from server.engine.program import Program, Step, checksum
from steering_kernels import MAX_OPS, NUM_GATES, Flag, Kind

PROGRAM = Program(
    torch.tensor([[0.1, -1e-30, 3.0], [1.0, 2.0, 3.0]]),
    (
        Step(2, Kind.CLAMP, read=0, write=0, a=-float("inf"), b=0.5, flags=Flag.KEEP_NORM),
        Step(0, Kind.CONDITION, read=1, gate_out=1, b=1.0, flags=Flag.HARD | Flag.COSINE),
        Step(2, Kind.ADD, write=1, gate=1),
    ),
    num_gates=2,
    triggers={0: (5, 7)},
)


def test_survives_the_way_to_the_workers() -> None:
    spec, data = PROGRAM.to_wire()
    for travelled in (msgspec.msgpack.decode(msgspec.msgpack.encode(spec)), json.loads(json.dumps(spec))):
        arrived = Program.from_wire(travelled, data)
        assert torch.equal(arrived.rows, PROGRAM.rows)
        assert (arrived.steps, arrived.num_gates) == (PROGRAM.steps, 2)
        assert dict(arrived.triggers) == {0: (5, 7)}
        assert checksum(travelled, data) == checksum(spec, data)


def test_the_checksum_sees_every_change() -> None:
    spec, data = PROGRAM.to_wire()
    changed = [
        checksum(spec, data[:-1] + b"\x00"),
        checksum(spec | {"num_gates": 3}, data),
        checksum(spec | {"steps": spec["steps"][::-1]}, data),
    ]
    assert len({checksum(spec, data), *changed}) == 4


@pytest.mark.parametrize("layers", [range(0, 3), range(0), range(3, 9), (0, 2), (1, 3)])
def test_gates_within_a_stage(layers: Sequence[int]) -> None:
    PROGRAM.require_gates_within(layers)


@pytest.mark.parametrize("layers", [(0, 1), (2, 3)])
def test_gates_across_stages(layers: Sequence[int]) -> None:
    with pytest.raises(ValueError, match=r"at layers \[0, 2\], are in different stages of the pipeline"):
        PROGRAM.require_gates_within(layers)


def test_a_program_without_rows() -> None:
    empty = Program(torch.zeros(0, 3), ())
    spec, data = empty.to_wire()
    assert Program.from_wire(spec, data).steps == ()


def test_a_sound_program() -> None:
    PROGRAM.require_sound(3)
    Program(torch.zeros(0, 3), ()).require_sound(1)


ADD = Step(0, Kind.ADD, write=0)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (Program(torch.ones(1, 3), (replace(ADD, layer=4),)), "it uses layer 4, there are 4"),
        (Program(torch.ones(1, 3), (replace(ADD, layer=-1),)), "it uses layer -1, there are 4"),
        (Program(torch.ones(1, 3), (replace(ADD, write=1),)), "it uses row 1, there are 1"),
        (Program(torch.ones(1, 3), (replace(ADD, read2=-2),)), "it uses row -2, there are 1"),
        (Program(torch.ones(1, 3), (replace(ADD, gate=0),)), "it uses gate 0, there are 0"),
        (Program(torch.ones(1, 3), (replace(ADD, gate_out=3),), 2), "it uses gate 3, there are 2"),
        (Program(torch.ones(1, 3), (ADD,), 1, {1: (5,)}), "it uses gate 1, there are 1"),
        (Program(torch.ones(1, 3), (ADD,), NUM_GATES + 1), f"at most {NUM_GATES} are possible"),
        (Program(torch.ones(1, 3), (ADD,) * (MAX_OPS + 1)), f"it has {MAX_OPS + 1} interventions at one layer"),
    ],
)
def test_programs_that_name_what_is_not_there(program: Program, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        program.require_sound(4)

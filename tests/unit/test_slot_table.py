"""What each slot applies at each layer."""

from collections.abc import Collection

import numpy as np
import pytest
import torch

from server.engine.program import Program, Step
from server.engine.row_pool import RowPool
from server.engine.slot_table import SlotKey, SlotTable
from server.engine.triggers import TriggerTable
from steering_kernels import MAX_OPS, NUM_GATES, Code, Flag, Kind, Param

CPU = torch.device("cpu")
HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE = 8, 3, 50


def program(*layers: int) -> Program:
    """Adds one row of its own at each of these layers."""
    steps = tuple(Step(layer, Kind.ADD, write=row) for row, layer in enumerate(layers))
    return Program(torch.ones(len(layers), HIDDEN_SIZE), steps)


def make_pool(num_rows: int = 8) -> RowPool:
    return RowPool(num_rows, HIDDEN_SIZE, torch.float32, CPU)


def make_table(pool: RowPool, num_slots: int, num_layers: int = NUM_LAYERS) -> SlotTable:
    return SlotTable(pool, num_layers, num_slots, TriggerTable(num_slots, VOCAB_SIZE, CPU))


def content(table: SlotTable, slot: int, layer: int) -> list[tuple[int, float]]:
    """(row that is written, factor) of every entry up to the end of the list; nothing stands behind the end."""
    codes, params = table.codes[layer, slot], table.params[layer, slot]
    kinds = codes[:, Code.KIND].tolist()
    length = kinds.index(Kind.END) if Kind.END in kinds else MAX_OPS
    assert not any(kinds[length:])
    return list(zip(codes[:length, Code.WRITE].tolist(), params[:length, Param.SCALE].tolist(), strict=True))


def nobody() -> Collection[SlotKey]:
    pytest.fail("asked for the keys in use although a slot was free")


def test_content() -> None:
    pool = make_pool()
    pool.load("a", program(0, 2, 2))
    pool.load("b", program(2))
    table = make_table(pool, 4)
    assert not table.codes.any()
    slot = table.slot_of((("b", -0.5), ("a", 2.0)), nobody)
    a, b = pool["a"].places, pool["b"].places
    assert content(table, slot, 0) == [(a[0], 2.0)]
    assert content(table, slot, 1) == []
    assert content(table, slot, 2) == [(b[0], -0.5), (a[1], 2.0), (a[2], 2.0)]
    others = [other for other in range(4) if other != slot]
    assert not table.codes[:, others].any()


def test_every_column() -> None:
    pool = make_pool()
    pool.load("first", program(0))  # so that places differ from row numbers
    steps = (
        Step(1, Kind.CONDITION, read=2, gate_out=1, flags=Flag.HARD, a=0.25, b=-1.0),
        Step(1, Kind.ROTATE, read=0, write=0, read2=1, write2=1, gate=1, flags=Flag.ABSOLUTE | Flag.KEEP_NORM, a=1.5),
        Step(2, Kind.FEATURE, read=2, write=1, a=1.0, b=2.0, c=3.0),
    )
    pool.load("a", Program(torch.eye(3, HIDDEN_SIZE), steps, num_gates=2, triggers={0: (3,)}))
    table = make_table(pool, 2)
    slot = table.slot_of((("first", 1.0), ("a", 0.5), ("a", 2.0)), nobody)
    x, y, z = pool["a"].places
    # The second use of the bundle has gates of its own.
    for offset, gates, factor in ((0, 0, 0.5), (2, 2, 2.0)):
        assert table.codes[1, slot, offset].tolist() == [Kind.CONDITION, z, -1, -1, -1, -1, gates + 1, Flag.HARD]
        assert table.params[1, slot, offset].tolist() == [factor, 0.25, -1.0, 0.0]
        rotate = [Kind.ROTATE, x, x, y, y, gates + 1, -1, Flag.ABSOLUTE | Flag.KEEP_NORM]
        assert table.codes[1, slot, offset + 1].tolist() == rotate
        assert table.params[1, slot, offset + 1].tolist() == [factor, 1.5, 0.0, 0.0]
        assert table.codes[2, slot, offset // 2].tolist() == [Kind.FEATURE, z, y, -1, -1, -1, -1, 0]
        assert table.params[2, slot, offset // 2].tolist() == [factor, 1.0, 2.0, 3.0]
    gates_of_tokens = torch.full((2, NUM_GATES), 0.5)
    table.triggers.set_gates_(gates_of_tokens, torch.full((2,), slot, dtype=torch.int32), torch.tensor([3, 4]))
    assert gates_of_tokens.tolist() == [[1, 0.5, 1, 0.5, *[0.5] * 4], [0, 0.5, 0, 0.5, *[0.5] * 4]]


def test_a_layer_can_be_full() -> None:
    pool = make_pool()
    pool.load("a", program(*[1] * MAX_OPS))
    table = make_table(pool, 1)
    slot = table.slot_of((("a", 1.0),), nobody)
    assert len(content(table, slot, 1)) == MAX_OPS


def test_equal_keys_share_a_slot() -> None:
    pool = make_pool()
    pool.load("a", program(0))
    table = make_table(pool, 2)
    key = (("a", 1.0),)
    slot = table.slot_of(key, nobody)
    before = table.codes._version
    assert table.slot_of((("a", 1.0),), nobody) == slot
    assert table.codes._version == before, "a resident key was written again"
    assert table.slot_of((("a", 2.0),), nobody) != slot


def test_the_oldest_slot_that_nobody_uses_is_reused() -> None:
    pool = make_pool()
    for bundle in "abcd":
        pool.load(bundle, program(0))
    table = make_table(pool, 3)
    keys = {bundle: ((bundle, 1.0),) for bundle in "abcd"}
    slots = {bundle: table.slot_of(keys[bundle], nobody) for bundle in "abc"}
    table.slot_of(keys["a"], nobody)  # now b is the oldest
    assert table.slot_of(keys["d"], lambda: {keys["b"], keys["d"]}) == slots["c"]
    assert content(table, slots["c"], 0) == [(pool["d"].places[0], 1.0)]
    assert table.slot_of(keys["b"], nobody) == slots["b"]
    assert table.slot_of(keys["a"], nobody) == slots["a"]
    assert table.slot_of(keys["c"], lambda: {keys["b"], keys["c"]}) == slots["c"], "d is the oldest now"


def test_a_slot_in_use_is_never_taken() -> None:
    """Random batches on the smallest table allowed: within a batch, every key keeps its own slot and content."""
    rng = np.random.default_rng(3)
    pool = make_pool(16)
    for number in range(16):
        pool.load(str(number), program(0))
    table = make_table(pool, 5, num_layers=1)
    for _ in range(300):
        batch = [((str(number), 1.0),) for number in rng.choice(16, size=rng.integers(1, 5), replace=False)]
        slots = [table.slot_of(key, lambda batch=batch: set(batch)) for key in batch]
        assert len(set(slots)) == len(batch)
        for slot, key in zip(slots, batch, strict=True):
            assert content(table, slot, 0) == [(pool[key[0][0]].places[0], 1.0)]


def test_forget() -> None:
    """A digest that is unloaded and comes back in other rows: its old slots never come back."""
    pool = make_pool(4)
    pool.load("a", program(0))
    pool.load("b", program(0))
    table = make_table(pool, 3, num_layers=1)
    alone, kept, both = (("a", 1.0),), (("b", 1.0),), (("b", 1.0), ("a", 0.5))
    slots = {key: table.slot_of(key, nobody) for key in (alone, kept, both)}
    old_row = pool["a"].places[0]
    table.forget("a")
    table.forget("unknown")
    pool.unload("a")
    pool.load("c", program(0))
    pool.load("a", program(0))
    new_row = pool["a"].places[0]
    assert new_row != old_row
    assert content(table, table.slot_of(alone, nobody), 0) == [(new_row, 1.0)]
    assert content(table, table.slot_of(both, nobody), 0)[1] == (new_row, 0.5)
    assert table.slot_of(kept, nobody) == slots[kept]

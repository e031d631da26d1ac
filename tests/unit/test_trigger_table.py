"""Gates that follow a token's id."""

import torch

from server.engine.triggers import TriggerTable
from steering_kernels import NUM_GATES

CPU = torch.device("cpu")


def gates(table: TriggerTable, slot_ids: list[int], input_ids: list[int]) -> torch.Tensor:
    values = torch.full((len(slot_ids), NUM_GATES), 0.25)
    table.set_gates_(values, torch.tensor(slot_ids, dtype=torch.int32), torch.tensor(input_ids, dtype=torch.int32))
    return values


def test_only_triggered_gates_of_steered_tokens_are_set() -> None:
    table = TriggerTable(4, 10, CPU)
    table.assign(2, {0: (1, 2), 3: (9,)})
    values = gates(table, [2, 2, 2, 0, -1], [1, 9, 5, 1, 1])
    assert values[:, 0].tolist() == [1, 0, 0, 0.25, 0.25]
    assert values[:, 3].tolist() == [0, 1, 0, 0.25, 0.25]
    assert (values[:, [1, 2, 4, 5, 6, 7]] == 0.25).all()


def test_a_slot_that_is_filled_again() -> None:
    table = TriggerTable(2, 10, CPU)
    table.assign(1, {0: (1,), 1: (2,)})
    table.assign(1, {1: (1,)})
    assert gates(table, [1], [1])[0, :2].tolist() == [0.25, 1]
    table.assign(1, {})
    assert (gates(table, [1], [1]) == 0.25).all()


def test_tokens_outside_the_vocabulary_match_nothing() -> None:
    table = TriggerTable(1, 10, CPU)
    table.assign(0, {0: (0, 9, 12)})
    assert gates(table, [0, 0, 0, 0], [-1, 10, 12, 9])[:, 0].tolist() == [0, 0, 0, 1]


def test_equal_triggers_share_a_mask() -> None:
    table = TriggerTable(64, 10, CPU)
    for slot in range(64):
        table.assign(slot, {0: (1, 2), 1: (3,)})
    assert (table.num_masks, table._masks.shape[0]) == (2, 2)


def test_a_mask_lives_as_long_as_a_slot_uses_it() -> None:
    table = TriggerTable(4, 10, CPU)
    table.assign(0, {0: (1,), 1: (1,)})
    table.assign(1, {0: (1,)})
    table.release(0)
    table.release(0)
    assert table.num_masks == 1
    assert gates(table, [1], [1])[0, 0] == 1
    table.assign(1, {0: (2,)})
    assert table.num_masks == 1
    assert gates(table, [1, 1], [1, 2])[:, 0].tolist() == [0, 1]
    table.release(1)
    assert table.num_masks == 0


def test_rows_are_used_again() -> None:
    """Many slots filled again and again: the table stays as small as what is in use, and every slot keeps its own."""
    table = TriggerTable(3, 50, CPU)
    now: dict[int, int] = {}
    for number in range(300):
        slot, token = number % 3, number % 47
        table.assign(slot, {1: (token,), 2: (token, 48)})
        now[slot] = token
        for other, expected in now.items():
            values = gates(table, [other] * 3, [expected, (expected + 1) % 47, 48])
            assert values[:, 1].tolist() == [1, 0, 0]
            assert values[:, 2].tolist() == [1, 0, 1]
    assert table._masks.shape[0] <= 8

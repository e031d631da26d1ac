"""Slot id and strength of every token of a step."""

import numpy as np
import torch

from server.engine.token_table import TokenTable

CPU = torch.device("cpu")


def test_one_buffer_holds_both() -> None:
    table = TokenTable(6, CPU)
    device = table.slot_ids.untyped_storage().data_ptr()
    assert table.strengths.untyped_storage().data_ptr() == device
    assert table.host_slot_ids.base is not None
    host = table.host_slot_ids.__array_interface__["data"][0]
    assert table.host_strengths.__array_interface__["data"][0] == host + 6 * 4
    assert host != device
    assert (table.slot_ids.dtype, table.strengths.dtype) == (torch.int32, torch.float32)
    assert table.slot_ids.tolist() == [-1] * 6


def test_publish() -> None:
    table = TokenTable(6, CPU)
    address = table.slot_ids.data_ptr()
    table.clear()
    table.host_slot_ids[1:4] = [5, 6, 7]
    table.host_strengths[1:4] = [0.5, -1.5, 3.0]
    assert table.slot_ids.tolist() == [-1] * 6, "the device changed before publish"
    table.publish(4)
    assert table.slot_ids.tolist() == [-1, 5, 6, 7, -1, -1]
    assert table.strengths[1:4].tolist() == [0.5, -1.5, 3.0]
    assert table.slot_ids.data_ptr() == address


def test_nothing_of_the_last_step_is_left() -> None:
    """Steps of random length, also empty ones: the device holds exactly what this step wrote."""
    rng = np.random.default_rng(0)
    table = TokenTable(16, CPU)
    for _ in range(200):
        table.clear()
        expected = np.full(16, -1)
        count = int(rng.integers(0, 17)) * int(rng.integers(0, 2))
        if count:
            start = int(rng.integers(0, count))
            expected[start:count] = rng.integers(0, 9, count - start)
            table.host_slot_ids[start:count] = expected[start:count]
            table.host_strengths[start:count] = 2.0
        table.publish(count)
        assert table.slot_ids.tolist() == expected.tolist()
        assert (table.strengths.numpy()[expected >= 0] == 2.0).all()

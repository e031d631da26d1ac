"""Row pool, slot table and token table."""

from collections.abc import Collection

import numpy as np
import pytest
import torch
from torch import Tensor

from server.engine.slots import MAX_OPS, RowPool, RowPoolFullError, SlotKey, SlotTable, TokenTable

CPU = torch.device("cpu")
HIDDEN_SIZE, NUM_LAYERS = 8, 3


def rows(value: float, count: int = 1) -> Tensor:
    return torch.arange(1, count + 1)[:, None] * torch.full((1, HIDDEN_SIZE), value)


def make_pool(num_rows: int = 8, dtype: torch.dtype = torch.float32) -> RowPool:
    return RowPool(num_rows, HIDDEN_SIZE, dtype, CPU)


def snapshot(pool: RowPool) -> tuple[list[str], int, Tensor]:
    return pool.bundles, pool.num_used, pool.rows.clone()


def assert_unchanged(pool: RowPool, before: tuple[list[str], int, Tensor]) -> None:
    assert (pool.bundles, pool.num_used) == before[:2]
    assert torch.equal(pool.rows, before[2])


def content(table: SlotTable, slot: int, layer: int) -> list[tuple[int, float]]:
    pairs = zip(table.write_rows[layer, slot].tolist(), table.scales[layer, slot].tolist(), strict=True)
    return [(row, scale) for row, scale in pairs if row >= 0]


def nobody() -> Collection[SlotKey]:
    pytest.fail("asked for the keys in use although a slot was free")


class TestRowPool:
    def test_load_and_unload(self) -> None:
        pool = make_pool()
        address = pool.rows.data_ptr()
        pool.load("a", {0: rows(1.0), 2: rows(2.0, 2)})
        pool.load("b", {1: rows(5.0)})
        assert pool.bundles == ["a", "b"]
        assert pool.num_used == 4
        assert "a" in pool
        placed = pool.rows_of("a")
        assert [pool.rows[row, 0].item() for row in placed[2]] == [2.0, 4.0]
        pool.unload("a")
        assert (pool.bundles, pool.num_used, "a" in pool) == (["b"], 1, False)
        pool.load("c", {0: rows(7.0, 7)})
        assert pool.num_used == 8
        assert pool.rows[pool.rows_of("b")[1]].tolist() == rows(5.0).tolist()
        assert len({row for bundle in "bc" for numbers in pool.rows_of(bundle).values() for row in numbers}) == 8
        assert pool.rows.data_ptr() == address

    def test_loading_again_changes_nothing(self) -> None:
        pool = make_pool()
        pool.load("a", {0: rows(1.0)})
        before = snapshot(pool)
        pool.load("a", {0: rows(9.0, 3)})
        assert_unchanged(pool, before)

    def test_unloading_what_is_not_there(self) -> None:
        pool = make_pool()
        pool.unload("a")
        assert pool.num_used == 0
        with pytest.raises(KeyError):
            pool.rows_of("a")

    def test_full(self) -> None:
        pool = make_pool(4)
        pool.load("a", {0: rows(1.0, 3)})
        before = snapshot(pool)
        with pytest.raises(RowPoolFullError, match=r"b needs 2 rows, 1 of 4 are free; raise --steering-rows"):
            pool.load("b", {0: rows(1.0), 1: rows(1.0)})
        assert_unchanged(pool, before)
        pool.load("c", {1: rows(1.0)})
        assert pool.num_used == 4

    @pytest.mark.parametrize("bad", [torch.full((1, HIDDEN_SIZE), 1e5), torch.full((1, HIDDEN_SIZE), float("nan"))])
    def test_overflow_of_the_models_dtype(self, bad: Tensor) -> None:
        pool = make_pool(dtype=torch.float16)
        before = snapshot(pool)
        with pytest.raises(ValueError, match=r"b has values at layer 1 that overflow .*float16"):
            pool.load("b", {0: rows(1.0), 1: bad})
        assert_unchanged(pool, before)

    @pytest.mark.parametrize("shape", [(1, HIDDEN_SIZE + 1), (HIDDEN_SIZE,), (1, 1)])
    def test_rows_of_another_model(self, shape: tuple[int, ...]) -> None:
        pool = make_pool(16)
        before = snapshot(pool)
        with pytest.raises(ValueError, match=rf"at layer 1, the model takes \[num_interventions, {HIDDEN_SIZE}\]"):
            pool.load("b", {0: rows(1.0), 1: torch.ones(shape)})
        assert_unchanged(pool, before)


class TestSlotTable:
    def test_content(self) -> None:
        pool = make_pool()
        pool.load("a", {0: rows(1.0), 2: rows(2.0, 2)})
        pool.load("b", {2: rows(3.0)})
        table = SlotTable(pool, NUM_LAYERS, 4)
        assert (table.write_rows == -1).all()
        slot = table.slot_of((("b", -0.5), ("a", 2.0)), nobody)
        a, b = pool.rows_of("a"), pool.rows_of("b")
        assert content(table, slot, 0) == [(a[0][0], 2.0)]
        assert content(table, slot, 1) == []
        assert content(table, slot, 2) == [(b[2][0], -0.5), (a[2][0], 2.0), (a[2][1], 2.0)]
        others = [other for other in range(4) if other != slot]
        assert (table.write_rows[:, others] == -1).all()

    def test_a_layer_can_be_full(self) -> None:
        pool = make_pool()
        pool.load("a", {1: rows(1.0, MAX_OPS)})
        table = SlotTable(pool, NUM_LAYERS, 1)
        slot = table.slot_of((("a", 1.0),), nobody)
        assert len(content(table, slot, 1)) == MAX_OPS

    def test_equal_keys_share_a_slot(self) -> None:
        pool = make_pool()
        pool.load("a", {0: rows(1.0)})
        table = SlotTable(pool, NUM_LAYERS, 2)
        key = (("a", 1.0),)
        slot = table.slot_of(key, nobody)
        before = table.write_rows._version
        assert table.slot_of((("a", 1.0),), nobody) == slot
        assert table.write_rows._version == before, "a resident key was written again"
        assert table.slot_of((("a", 2.0),), nobody) != slot

    def test_the_oldest_slot_that_nobody_uses_is_reused(self) -> None:
        pool = make_pool()
        for bundle in "abcd":
            pool.load(bundle, {0: rows(1.0)})
        table = SlotTable(pool, NUM_LAYERS, 3)
        keys = {bundle: ((bundle, 1.0),) for bundle in "abcd"}
        slots = {bundle: table.slot_of(keys[bundle], nobody) for bundle in "abc"}
        table.slot_of(keys["a"], nobody)  # now b is the oldest
        assert table.slot_of(keys["d"], lambda: {keys["b"], keys["d"]}) == slots["c"]
        assert content(table, slots["c"], 0) == [(pool.rows_of("d")[0][0], 1.0)]
        assert table.slot_of(keys["b"], nobody) == slots["b"]
        assert table.slot_of(keys["a"], nobody) == slots["a"]
        assert table.slot_of(keys["c"], lambda: {keys["b"], keys["c"]}) == slots["c"], "d is the oldest now"

    def test_a_slot_in_use_is_never_taken(self) -> None:
        """Random batches on the smallest table allowed: within a batch, every key keeps its own slot and content."""
        rng = np.random.default_rng(3)
        pool = make_pool(16)
        for number in range(16):
            pool.load(str(number), {0: rows(float(number))})
        table = SlotTable(pool, 1, 5)
        for _ in range(300):
            batch = [((str(number), 1.0),) for number in rng.choice(16, size=rng.integers(1, 5), replace=False)]
            slots = [table.slot_of(key, lambda batch=batch: set(batch)) for key in batch]
            assert len(set(slots)) == len(batch)
            for slot, key in zip(slots, batch, strict=True):
                assert content(table, slot, 0) == [(pool.rows_of(key[0][0])[0][0], 1.0)]

    def test_forget(self) -> None:
        """A digest that is unloaded and comes back in other rows: its old slots never come back."""
        pool = make_pool(4)
        pool.load("a", {0: rows(1.0)})
        pool.load("b", {0: rows(2.0)})
        table = SlotTable(pool, 1, 3)
        alone, kept, both = (("a", 1.0),), (("b", 1.0),), (("b", 1.0), ("a", 0.5))
        slots = {key: table.slot_of(key, nobody) for key in (alone, kept, both)}
        old_row = pool.rows_of("a")[0][0]
        table.forget("a")
        table.forget("unknown")
        pool.unload("a")
        pool.load("c", {0: rows(3.0)})
        pool.load("a", {0: rows(9.0)})
        new_row = pool.rows_of("a")[0][0]
        assert new_row != old_row
        assert content(table, table.slot_of(alone, nobody), 0) == [(new_row, 1.0)]
        assert content(table, table.slot_of(both, nobody), 0)[1] == (new_row, 0.5)
        assert table.slot_of(kept, nobody) == slots[kept]


class TestTokenTable:
    def test_one_buffer_holds_both(self) -> None:
        table = TokenTable(6, CPU)
        device = table.slot_ids.untyped_storage().data_ptr()
        assert table.strengths.untyped_storage().data_ptr() == device
        assert table.host_slot_ids.base is not None
        host = table.host_slot_ids.__array_interface__["data"][0]
        assert table.host_strengths.__array_interface__["data"][0] == host + 6 * 4
        assert host != device
        assert (table.slot_ids.dtype, table.strengths.dtype) == (torch.int32, torch.float32)
        assert table.slot_ids.tolist() == [-1] * 6

    def test_publish(self) -> None:
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

    def test_nothing_of_the_last_step_is_left(self) -> None:
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

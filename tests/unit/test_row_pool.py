"""Rows of the resident bundles."""

import pytest
import torch
from torch import Tensor

from server.engine.program import Program, Step
from server.engine.row_pool import RowPool, RowPoolFullError
from steering_kernels import Kind

CPU = torch.device("cpu")
HIDDEN_SIZE = 8


def program(value: float, count: int = 1) -> Program:
    rows = torch.arange(1, count + 1)[:, None] * torch.full((1, HIDDEN_SIZE), value)
    return Program(rows, tuple(Step(0, Kind.ADD, write=row) for row in range(count)))


def make_pool(num_rows: int = 8, dtype: torch.dtype = torch.float32) -> RowPool:
    return RowPool(num_rows, HIDDEN_SIZE, dtype, CPU)


def snapshot(pool: RowPool) -> tuple[list[str], int, Tensor]:
    return pool.bundles, pool.num_used, pool.rows.clone()


def assert_unchanged(pool: RowPool, before: tuple[list[str], int, Tensor]) -> None:
    assert (pool.bundles, pool.num_used) == before[:2]
    assert torch.equal(pool.rows, before[2])


def test_load_and_unload() -> None:
    pool = make_pool()
    address = pool.rows.data_ptr()
    pool.load("a", program(2.0, 3))
    pool.load("b", program(5.0))
    assert pool.bundles == ["a", "b"]
    assert pool.num_used == 4
    assert "a" in pool
    assert [pool.rows[row, 0].item() for row in pool["a"].places] == [2.0, 4.0, 6.0]
    pool.unload("a")
    assert (pool.bundles, pool.num_used, "a" in pool) == (["b"], 1, False)
    pool.load("c", program(7.0, 7))
    assert pool.num_used == 8
    assert pool.rows[pool["b"].places[0]].tolist() == [5.0] * HIDDEN_SIZE
    assert len({*pool["b"].places, *pool["c"].places}) == 8
    assert pool.rows.data_ptr() == address


def test_loading_again_changes_nothing() -> None:
    pool = make_pool()
    pool.load("a", program(1.0))
    before = snapshot(pool)
    pool.load("a", program(9.0, 3))
    assert_unchanged(pool, before)


def test_unloading_what_is_not_there() -> None:
    pool = make_pool()
    pool.unload("a")
    assert pool.num_used == 0
    with pytest.raises(KeyError):
        pool["a"]


def test_full() -> None:
    pool = make_pool(4)
    pool.load("a", program(1.0, 3))
    before = snapshot(pool)
    with pytest.raises(RowPoolFullError, match=r"b needs 2 rows, 1 of 4 are free; raise --steering-rows"):
        pool.load("b", program(1.0, 2))
    assert_unchanged(pool, before)
    pool.load("c", program(1.0))
    assert pool.num_used == 4


@pytest.mark.parametrize("value", [1e5, float("nan")])
def test_overflow_of_the_models_dtype(value: float) -> None:
    pool = make_pool(dtype=torch.float16)
    before = snapshot(pool)
    with pytest.raises(ValueError, match=r"b has values that overflow .*float16"):
        pool.load("b", program(value))
    assert_unchanged(pool, before)


@pytest.mark.parametrize("shape", [(1, HIDDEN_SIZE + 1), (HIDDEN_SIZE,), (1, 1)])
def test_rows_of_another_model(shape: tuple[int, ...]) -> None:
    pool = make_pool(16)
    before = snapshot(pool)
    with pytest.raises(ValueError, match=rf"the model takes \[num_rows, {HIDDEN_SIZE}\]"):
        pool.load("b", Program(torch.ones(shape), ()))
    assert_unchanged(pool, before)

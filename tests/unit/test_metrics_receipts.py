"""The check of receipts against the workers' own counts."""

from collections.abc import Sequence

import pytest

from server.engine.ended import Ended
from server.metrics import receipts
from server.metrics.receipts import ReceiptCheck

Told = dict[str, Ended]


class Workers:
    """Final counts as the engine gives them: once."""

    def __init__(self) -> None:
        self.told: Told = {}
        self.asked: list[list[str]] = []

    async def ended(self, ids: Sequence[str]) -> Told:
        self.asked.append(list(ids))
        return {steering_id: self.told.pop(steering_id) for steering_id in ids if steering_id in self.told}


class Clock:
    """Time that stands still unless moved."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def figures(check: ReceiptCheck) -> tuple[int, int, int, int]:
    found = check.to_json()
    return found["checked_tokens"], found["discrepancy_tokens"], found["mismatches"], found["unchecked"]


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def check(clock: Clock) -> ReceiptCheck:
    return ReceiptCheck(clock)


async def test_a_true_receipt(check: ReceiptCheck, workers: Workers) -> None:
    check.claim("one", 2, [10, 16, 2, 0])
    workers.told["one"] = Ended(2, (10, 16, 2, 0), 0)
    await check.reconcile(workers.ended)
    assert figures(check) == (28, 0, 0, 0)
    await check.reconcile(workers.ended)
    assert workers.asked == [["one"]]


@pytest.mark.parametrize(
    ("counted", "discrepancy"),
    [
        ((5, 6), 1),
        ((5, 8), -1),
        # The sum is right and the phases are not.
        ((6, 6), 0),
        # The workers steered a term that the receipt does not know, or none at all.
        ((5, 7, 3, 0), -3),
        ((), 12),
    ],
)
async def test_a_false_receipt(
    check: ReceiptCheck, workers: Workers, counted: tuple[int, ...], discrepancy: int
) -> None:
    check.claim("one", 1, [5, 7])
    workers.told["one"] = Ended(1, counted, 0)
    await check.reconcile(workers.ended)
    assert figures(check) == (12, discrepancy, 1, 0)


async def test_differences_that_cancel_out_still_show(check: ReceiptCheck, workers: Workers) -> None:
    check.claim("one", 1, [5, 7])
    check.claim("two", 1, [5, 7])
    workers.told |= {"one": Ended(1, (5, 8), 0), "two": Ended(1, (5, 6), 0)}
    await check.reconcile(workers.ended)
    assert figures(check) == (24, 0, 2, 0)


async def test_choices_may_end_one_after_the_other(check: ReceiptCheck, workers: Workers) -> None:
    check.claim("one", 3, [15, 10])
    workers.told["one"] = Ended(1, (5, 1), 0)
    await check.reconcile(workers.ended)
    assert figures(check) == (0, 0, 0, 0)
    workers.told["one"] = Ended(2, (10, 9), 0)
    await check.reconcile(workers.ended)
    assert figures(check) == (25, 0, 0, 0)


async def test_what_does_not_come_is_given_up(check: ReceiptCheck, workers: Workers, clock: Clock) -> None:
    check.claim("one", 1, [5, 7])
    clock.now_s += 30
    check.claim("two", 1, [1, 1])
    clock.now_s += 31
    await check.reconcile(workers.ended)
    assert figures(check) == (0, 0, 0, 1)
    await check.reconcile(workers.ended)
    assert workers.asked == [["one", "two"], ["two"]]


async def test_an_aborted_choice_proves_nothing(check: ReceiptCheck, workers: Workers) -> None:
    check.claim("one", 2, [10, 14])
    workers.told["one"] = Ended(2, (10, 15), 1)
    await check.reconcile(workers.ended)
    await check.reconcile(workers.ended)
    assert figures(check) == (0, 0, 0, 1)
    assert workers.asked == [["one"]]


async def test_more_requests_than_claimed_are_no_proof(check: ReceiptCheck, workers: Workers, clock: Clock) -> None:
    check.claim("one", 1, [5, 7])
    workers.told["one"] = Ended(2, (10, 14), 0)
    await check.reconcile(workers.ended)
    clock.now_s += 61
    await check.reconcile(workers.ended)
    assert figures(check) == (0, 0, 0, 1)


async def test_pending_receipts_are_bounded(
    check: ReceiptCheck, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receipts, "_MAX_PENDING", 10)
    monkeypatch.setattr(receipts, "_IDS_PER_CALL", 4)
    for index in range(13):
        check.claim(f"id-{index}", 1, [1, 1])
    await check.reconcile(workers.ended)
    assert figures(check) == (0, 0, 0, 3)
    assert [len(ids) for ids in workers.asked] == [4, 4, 2]
    assert workers.asked[0][0] == "id-3"


async def test_an_engine_that_fails_loses_no_claim(check: ReceiptCheck, workers: Workers) -> None:
    async def broken(ids: Sequence[str]) -> Told:
        raise ConnectionError("gone")

    check.claim("one", 1, [5, 7])
    with pytest.raises(ConnectionError):
        await check.reconcile(broken)
    workers.told["one"] = Ended(1, (5, 7), 0)
    await check.reconcile(workers.ended)
    assert figures(check) == (12, 0, 0, 0)


async def test_nobody_is_asked_for_nothing(check: ReceiptCheck, workers: Workers) -> None:
    await check.reconcile(workers.ended)
    assert workers.asked == []
    assert figures(check) == (0, 0, 0, 0)

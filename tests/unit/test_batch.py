"""Which token of a batch gets which slot and strength, and what is counted, against the definition token by token."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from server.engine.batch import Sizes, SteeredBatch
from server.engine.ended import End
from server.engine.program import Program, Step
from server.engine.spans import SpanTokens
from server.engine.steering import Steering, Term
from server.engine.step_counts import Scheduled
from steering_kernels import Code, Kind, Param

CPU = torch.device("cpu")
SIZES = Sizes(num_rows=8, num_layers=1, hidden_size=4, vocab_size=20, max_num_reqs=3, max_num_tokens=16)
SPANS = {"reasoning": SpanTokens(1, 2), "tool_calls": SpanTokens(3, 4)}


def make_batch(spans: dict[str, SpanTokens] | None = None) -> SteeredBatch:
    batch = SteeredBatch(SIZES, torch.float32, CPU, spans)
    for bundle in "ab":
        batch.pool.load(bundle, Program(torch.ones(1, 4), (Step(0, Kind.ADD, write=0),)))
    return batch


def params(*terms: Term) -> Any:
    return SimpleNamespace(extra_args=Steering("id", terms).to_extra_args() if terms else None)


def effect(batch: SteeredBatch, token: int) -> list[tuple[int, float]]:
    """(row, strength in effect) of every entry that a token gets."""
    slot = int(batch.tokens.slot_ids[token])
    if slot < 0:
        return []
    codes, factors = batch.slots.codes[0, slot], batch.slots.params[0, slot, :, Param.SCALE]
    strength = float(batch.tokens.strengths[token])
    entries = zip(codes.tolist(), factors.tolist(), strict=True)
    return [(code[Code.WRITE], factor * strength) for code, factor in entries if code[Code.KIND] != Kind.END]


def row(batch: SteeredBatch, bundle: str) -> int:
    return batch.pool[bundle].places[0]


def no_text(index: int) -> list[int]:
    pytest.fail(f"asked for the text of request {index}")


def test_every_token_gets_its_own() -> None:
    batch = make_batch()
    batch.add("r", params(Term("a", 0.5, "prompt"), Term("b", -1.0, "response")), 3)
    batch.add("plain", params(), 3)
    batch.fill([Scheduled("plain", 0, 2), Scheduled("r", 1, 4), Scheduled("plain2", 7, 1)], no_text)
    a, b = row(batch, "a"), row(batch, "b")
    expected = [[], [], [(a, 0.5)], [(a, 0.5), (b, -1.0)], [(b, -1.0)], [(b, -1.0)], []]
    assert [effect(batch, token) for token in range(7)] == expected
    counts = batch.counts()
    assert counts is not None
    # Position 0 was in the prefix cache and was made under the same steering.
    assert counts.read({}) == {"r": ("id", (3, 0, 1, 2))}


def test_requests_without_steering_and_unknown_digests_have_no_plan() -> None:
    batch = make_batch()
    batch.add("r", params(), 3)
    batch.add("s", params(Term("gone", 1.0, "all")), 3)
    batch.fill([Scheduled("r", 0, 3), Scheduled("s", 0, 3)], no_text)
    assert (batch.plans, batch.counts(), batch.num_slots_needed) == ({}, None, 0)
    assert (batch.tokens.slot_ids == -1).all()


def test_a_request_that_comes_again_keeps_its_count() -> None:
    batch = make_batch()
    for _ in range(2):
        batch.add("r", params(Term("a", 1.0, "all")), 3)
        batch.fill([Scheduled("r", 0, 3)], no_text)
    assert batch.plans["r"].tokens_steered == [3, 0]
    batch.remove("r")
    batch.remove("r")
    assert (batch.plans, batch.num_slots_needed) == ({}, 0)


@pytest.mark.parametrize(("sampled", "count"), [(1, 1), (2, 2), (3, 3)])
def test_rejected_drafts_are_not_counted(sampled: int, count: int) -> None:
    batch = make_batch()
    batch.add("r", params(Term("a", 1.0, "all")), 4)
    batch.fill([Scheduled("r", 0, 4)], no_text)
    batch.fill([Scheduled("r", 4, 3, num_drafts=2)], no_text)
    assert (batch.tokens.slot_ids[:3] >= 0).all(), "drafts are steered, whether they are accepted or not"
    counts = batch.counts()
    assert counts is not None
    assert counts.read({"r": sampled}) == {"r": ("id", (4, count))}


def test_a_count_is_what_it_was_when_its_step_was_filled() -> None:
    """Asynchronous scheduling reads a step's counts after the next step was filled."""
    batch = make_batch()
    batch.add("r", params(Term("a", 1.0, "all")), 3)
    batch.fill([Scheduled("r", 0, 3)], no_text)
    counts = batch.counts()
    batch.fill([Scheduled("r", 3, 1)], no_text)
    assert counts is not None
    assert counts.read({}) == {"r": ("id", (3, 0))}


def test_spans_that_nobody_configured_leave_no_plan() -> None:
    batch = make_batch({"tool_calls": SPANS["tool_calls"]})
    batch.add("r", params(Term("a", 1.0, "all", ("reasoning",))), 3)
    assert batch.plans == {}


def test_preempted_requests_leave_their_states_to_others() -> None:
    """More requests with spans than run at once, because preempted ones wait; each goes on where it was."""
    batch = make_batch(SPANS)
    excluding = Term("a", 1.0, "all", ("reasoning",))
    for number in range(SIZES.max_num_reqs + 2):
        batch.add(f"r{number}", params(excluding), 2)
        batch.fill([Scheduled(f"r{number}", 0, 2)], lambda index: ())
        batch.finish_fill(torch.tensor([1, 5]))
        batch.pause(f"r{number}")
    batch.fill([Scheduled("r0", 2, 1)], lambda index: [1, 5])
    batch.finish_fill(torch.tensor([6]))
    assert effect(batch, 0) == [], "it is still inside the span"
    for number in range(SIZES.max_num_reqs + 2):
        batch.remove(f"r{number}")
    assert len(batch._free_states) == SIZES.max_num_reqs


TEXT = [0, 1, 5, 2, 6, 3, 7, 1, 8, 4, 9, 2, 0, 3, 3, 4, 0]
TERMS = (
    Term("a", 0.5, "all", ("reasoning",)),
    Term("b", -1.0, "response", ("tool_calls",)),
    Term("a", 2.0, "generation", ("reasoning", "tool_calls")),
    Term("b", 0.25, "prompt"),
)
PROMPT = 8


def inside(position: int) -> set[str]:
    names = set()
    for name, span in SPANS.items():
        delimiters = [token for token in TEXT[: position + 1] if token in span]
        if delimiters and delimiters[-1] == span.open:
            names.add(name)
    return names


def expected(position: int) -> list[int]:
    """Numbers of the terms that steer a position."""
    found = []
    for number, term in enumerate(TERMS):
        bounds = term.positions(PROMPT)
        if bounds.start <= position < bounds.stop and not inside(position).intersection(term.exclude):
            found.append(number)
    return found


def counts_of(positions: range) -> tuple[int, ...]:
    """Prompt and generated tokens of each term among some positions."""
    found = [(number, position >= PROMPT) for position in positions for number in expected(position)]
    return tuple(found.count((number, phase)) for number in range(len(TERMS)) for phase in (False, True))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cached", [0, 5, 8])
def test_spans_over_chunks_neighbours_and_preemption(seed: int, cached: int) -> None:
    """The same tokens in any steps, among others, computed again after a preemption: effects and counts as defined."""
    rng = np.random.default_rng(seed)
    batch = make_batch(SPANS)
    batch.add("r", params(*TERMS), PROMPT)
    batch.add("other", params(Term("b", 3.0, "all")), 2)
    start, seen, preempted = cached, 0, False
    while start < len(TEXT):
        count = int(rng.integers(1, min(6, len(TEXT) - start) + 1))
        before = int(rng.integers(0, 3))
        step = [Scheduled("other", 0, before)] * (before > 0) + [Scheduled("r", start, count)]
        batch.fill(step, lambda index, start=start: TEXT[:start])
        batch.finish_fill(torch.tensor([*[0] * before, *TEXT[start : start + count], *[0] * 3]))
        counts = batch.counts()
        assert counts is not None
        tokens_steered = counts.read({})["r"][1]
        for position in range(start, start + count):
            found = effect(batch, before + position - start)
            wanted = [(row(batch, TERMS[number].bundle), TERMS[number].strength) for number in expected(position)]
            assert found == wanted, position
        start += count
        seen = max(seen, start)
        assert tokens_steered == counts_of(range(seen))
        if start > 11 and not preempted:
            start, preempted = 4, True
    # One token was computed behind the end of the answer, as under asynchronous scheduling.
    batch.remove("r", End(len(TEXT) - 1, is_aborted=False))
    if count == 1:
        assert batch.ended.take(["id"])["id"][1] == counts_of(range(len(TEXT) - 1))
    assert len(batch._free_states) == SIZES.max_num_reqs


def test_what_was_computed_behind_the_end_is_not_counted() -> None:
    batch = make_batch()
    for request_id in ("r", "aborted"):
        batch.add(request_id, params(Term("a", 1.0, "all"), Term("b", 1.0, "response")), 3)
    batch.fill([Scheduled("r", 0, 3), Scheduled("aborted", 0, 3)], no_text)
    for start in range(3, 6):
        batch.fill([Scheduled("r", start, 1), Scheduled("aborted", start, 1)], no_text)
    assert batch.ended.take(["id"]) == {}
    batch.remove("r", End(5, is_aborted=False))
    batch.remove("aborted", End(6, is_aborted=True))
    batch.remove("unknown", End(6, is_aborted=True))
    assert batch.ended.take(["id", "other"]) == {"id": [2, (6, 5, 2, 5), 1]}
    assert batch.ended.take(["id"]) == {}


def test_a_pause_is_no_end() -> None:
    batch = make_batch()
    batch.add("r", params(Term("a", 1.0, "all")), 3)
    batch.fill([Scheduled("r", 0, 3)], no_text)
    batch.pause("r")
    assert batch.ended.take(["id"]) == {}


def test_only_steps_with_steered_requests_are_timed() -> None:
    batch = make_batch(SPANS)
    batch.add("r", params(Term("a", 1.0, "all")), 3)
    for request_id, expected_steps in (("plain", 0), ("r", 1), ("plain", 1)):
        batch.fill([Scheduled(request_id, 0, 3)], no_text)
        batch.finish_fill(torch.tensor([5, 6, 7]))
        times = batch.times.to_wire()
        assert sum(times["counts"]) == expected_steps
        assert (times["sum_s"] > 0) == bool(expected_steps)


def test_many_bundles_and_requests_leave_nothing_behind() -> None:
    batch = make_batch()
    for number in range(500):
        key = f"k{number}"
        batch.pool.load(key, Program(torch.ones(2, 4), (Step(0, Kind.ADD, write=1, gate=0),), 1, {0: (number % 20,)}))
        for strength in (1.0, 2.0):
            batch.add("r", params(Term(key, strength, "all"), Term("a", strength, "prompt")), 3)
            batch.fill([Scheduled("r", 0, 3), Scheduled("r", 3, 1)], no_text)
            batch.finish_fill(torch.tensor([1, 2, 3, 4]))
            batch.remove("r")
        batch.ended.take(["id"])
        batch.slots.forget(key)
        batch.pool.unload(key)
    assert (batch.pool.num_used, batch.slots.triggers.num_masks, batch.plans, batch._triggered) == (2, 0, {}, set())
    assert batch.slots.triggers._masks.shape[0] <= 2
    assert len(batch.slots._free) + len(batch.slots._slots) == batch.slots.codes.shape[1]


def test_triggers_open_gates_only_for_their_tokens() -> None:
    batch = make_batch()
    batch.pool.load("t", Program(torch.ones(1, 4), (Step(0, Kind.ADD, write=0, gate=0),), 1, {0: (7, 9)}))
    batch.add("r", params(Term("t", 1.0, "all")), 3)
    batch.fill([Scheduled("x", 0, 1), Scheduled("r", 0, 3)], no_text)
    batch.finish_fill(torch.tensor([7, 7, 8, 9]))
    assert batch.gates[:4, 0].tolist() == [0, 1, 0, 1]

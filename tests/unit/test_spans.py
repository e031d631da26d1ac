"""Spans that stay unsteered, against a walk over the tokens one by one."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.plan import NUM_STATES
from server.engine.spans import SpanStepBuilder, SpanTable, SpanTokens
from server.engine.steering import SPAN_NAMES

CPU = torch.device("cpu")
SPANS = {"reasoning": SpanTokens(1, 2), "tool_calls": SpanTokens(3, 4)}
texts = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=1, max_size=3)


def walk(text: list[int]) -> list[int]:
    """State of every token by definition: from the opening token up to the one before the closing token."""
    inside = dict.fromkeys(SPAN_NAMES, False)
    states = []
    for token in text:
        for name, span in SPANS.items():
            inside[name] = token == span.open or (inside[name] and token != span.close)
        states.append(sum(1 << bit for bit, name in enumerate(SPAN_NAMES) if inside[name]))
    return states


def run_step(table: SpanTable, parts: dict[int, list[int]], gap: int) -> tuple[list[int], torch.Tensor]:
    """One step with these tokens of each request, after `gap` tokens of somebody else; found states and counts."""
    builder = SpanStepBuilder()
    choice = builder.add_choice(list(range(NUM_STATES)), [0.5 + state for state in range(NUM_STATES)])
    input_ids: list[int] = []
    places: list[int] = []
    for row, part in parts.items():
        input_ids += [1] * gap
        tokens = range(len(input_ids), len(input_ids) + len(part))
        places += tokens
        input_ids += part
        builder.add_request(row, tokens, np.full(len(part), choice), np.ones(len(part), dtype=bool))
    slot_ids = torch.full((len(input_ids),), -7, dtype=torch.int32)
    strengths = torch.full((len(input_ids),), -7.0)
    counts = table.apply_(builder.build(), torch.tensor(input_ids), slot_ids, strengths)
    others = [place for place in range(len(input_ids)) if place not in places]
    assert (slot_ids[others] == -7).all() and (strengths[others] == -7).all()
    assert strengths[places].tolist() == [0.5 + state for state in slot_ids[places].tolist()]
    return slot_ids[places].tolist(), counts


@given(texts, st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 2))
def test_any_chunks_give_the_states_of_the_whole_text(requests: list[list[int]], sizes: list[int], gap: int) -> None:
    table = SpanTable(SPANS, 4, CPU)
    rows = [3, 0, 2][: len(requests)]
    for row in rows:
        assert table.begin(row, []) == []
    found: dict[int, list[int]] = {row: [] for row in rows}
    position = step = 0
    while position < max(map(len, requests)):
        size = sizes[step % len(sizes)]
        parts = {
            row: text[position : position + size]
            for row, text in zip(rows, requests, strict=True)
            if text[position : position + size]
        }
        states, counts = run_step(table, parts, gap)
        assert counts.sum() == len(states)
        assert [int(counts[0, state]) for state in range(NUM_STATES)] == [states.count(s) for s in range(NUM_STATES)]
        for row, part in parts.items():
            found[row] += states[: len(part)]
            states = states[len(part) :]
        position, step = position + size, step + 1
    assert [found[row] for row in rows] == [walk(text) for text in requests]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(0, 20))
def test_a_text_that_begins_in_the_cache(text: list[int], cached: int) -> None:
    table = SpanTable(SPANS, 1, CPU)
    run_step(table, {0: [1, 3]}, 0)  # what the row's last owner left
    assert table.begin(0, text[:cached]) == walk(text)[:cached]
    if text[cached:]:
        assert run_step(table, {0: text[cached:]}, 0)[0] == walk(text)[cached:]


def test_only_fresh_tokens_are_counted() -> None:
    table = SpanTable(SPANS, 1, CPU)
    builder = SpanStepBuilder()
    nothing = builder.add_choice([-1] * NUM_STATES, [0.0] * NUM_STATES)
    choice = builder.add_choice([5] * NUM_STATES, [1.0] * NUM_STATES)
    fresh = np.array([False, False, True, True, True])
    builder.add_request(0, range(0, 5), np.array([nothing, choice, choice, choice, nothing]), fresh)
    slot_ids = torch.zeros(5, dtype=torch.int32)
    counts = table.apply_(builder.build(), torch.tensor([0, 1, 0, 2, 0]), slot_ids, torch.zeros(5))
    assert slot_ids.tolist() == [-1, 5, 5, 5, -1]
    assert counts.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]


def test_a_span_that_the_model_does_not_know() -> None:
    table = SpanTable({"tool_calls": SpanTokens(3, 4)}, 1, CPU)
    table.begin(0, [])
    assert run_step(table, {0: [1, 3, 1, 4, 2]}, 0)[0] == [0, 2, 2, 0, 0]

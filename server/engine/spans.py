"""Spans of a text that stay unsteered, found on the device as the model writes them.

A span begins with the token that opens it and ends before the token that closes it: the opening token's output is the
first token inside, the closing token's output is the first one after. A span that the chat template opens without its
opening token is not seen. Whether a token lies in a span follows from the tokens up to it and nothing else, so the
prefix cache stays right, and a request that is computed again gets the same answer. Under asynchronous scheduling only
the device knows the last token, hence no host code here looks at tokens that were just sampled.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from server.engine.plan import NUM_STATES
from server.engine.steering import SPAN_NAMES


class SpanTokens(NamedTuple):
    """Token ids that open and close a span."""

    open: int
    close: int


class SpanStep(NamedTuple):
    """The tokens of one step whose steering depends on spans, in order, request after request.

    Attributes:
        tokens: [n], int64; place of each token in the batch.
        states: [n], int64; row of the request in the table of states.
        firsts: [n], int64; index in `tokens` of the first token of the same request.
        choices: [n], int64; row of `slots` and `strengths`.
        fresh: [n], bool; whether the token is counted in this step.
        slots: [num_choices, NUM_STATES], int32.
        strengths: [num_choices, NUM_STATES], fp32.
    """

    tokens: Tensor
    states: Tensor
    firsts: Tensor
    choices: Tensor
    fresh: Tensor
    slots: Tensor
    strengths: Tensor

    def to(self, device: torch.device) -> "SpanStep":
        """The same on the device; the sources are pinned and new, so torch keeps them until the copies have run."""
        if device.type == "cpu":
            return self
        return SpanStep(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in self))


class SpanTable:
    """Which spans the last token of every request lies in.

    Args:
        spans: tokens of the spans that the served model writes, by name of `SPAN_NAMES`.
        num_requests: rows of the table.
        device: where the states live.
    """

    def __init__(self, spans: Mapping[str, SpanTokens], num_requests: int, device: torch.device) -> None:
        self._spans = tuple(spans.get(name) for name in SPAN_NAMES)
        self._states = torch.zeros(num_requests, dtype=torch.int64, device=device)

    def begin(self, row: int, tokens: Iterable[int]) -> list[int]:
        """Set a request's state to the one after `tokens`, the part of its text that is in the cache already.

        Returns:
            State of each of these tokens.
        """
        states = []
        state = 0
        for token in tokens:
            for bit, span in enumerate(self._spans):
                if span is not None and token == span.open:
                    state |= 1 << bit
                elif span is not None and token == span.close:
                    state &= ~(1 << bit)
            states.append(state)
        self._states[row].fill_(state)
        return states

    def apply_(self, step: SpanStep, input_ids: Tensor, slot_ids: Tensor, strengths: Tensor) -> Tensor:
        """Give the tokens of a step what their spans leave of their steering.

        Args:
            step: which tokens, and what they get in each state.
            input_ids: [num_tokens], integer; of the whole batch.
            slot_ids: [num_tokens], int32. Changed in place.
            strengths: [num_tokens], fp32. Changed in place.

        Returns:
            [num_choices, NUM_STATES], int64: fresh tokens by what they got.
        """
        states = self._advance(step, input_ids[step.tokens].long())
        slot_ids[step.tokens] = step.slots[step.choices, states]
        strengths[step.tokens] = step.strengths[step.choices, states]
        cells = step.choices * NUM_STATES + states
        counts = torch.zeros(step.slots.numel(), dtype=torch.int64, device=cells.device)
        counts.scatter_add_(0, cells, step.fresh.long())
        return counts.view(-1, NUM_STATES)

    def _advance(self, step: SpanStep, ids: Tensor) -> Tensor:
        """State of every token of the step, [n], int64; the last one of each request is kept for its next step."""
        order = torch.arange(ids.shape[0], device=ids.device)
        carried = self._states[step.states]
        states = torch.zeros_like(carried)
        for bit, span in enumerate(self._spans):
            if span is None:
                continue
            opened = torch.where(ids == span.open, order, -1).cummax(0).values
            closed = torch.where(ids == span.close, order, -1).cummax(0).values
            inside = torch.where(
                torch.maximum(opened, closed) >= step.firsts, opened > closed, (carried >> bit & 1).bool()
            )
            states |= inside.long() << bit
        is_last = torch.ones_like(order, dtype=torch.bool)
        is_last[:-1] = step.firsts[1:] != step.firsts[:-1]
        # Every other token writes its state to a row beyond the table's own.
        rows = torch.where(is_last, step.states, self._states.shape[0])
        widened = torch.cat([self._states, self._states.new_zeros(1)])
        self._states.copy_(widened.scatter_(0, rows, states)[:-1])
        return states


class SpanStepBuilder:
    """Collects the tokens of a `SpanStep` on the host, request by request."""

    def __init__(self) -> None:
        self._columns: list[np.ndarray] = []
        self._slots: list[Sequence[int]] = []
        self._strengths: list[Sequence[float]] = []
        self._num_tokens = 0

    def add_choice(self, slots: Sequence[int], strengths: Sequence[float]) -> int:
        """Add what a token may get by its state, NUM_STATES entries each, and return the row."""
        self._slots.append(slots)
        self._strengths.append(strengths)
        return len(self._slots) - 1

    def add_request(self, row: int, tokens: range, choices: np.ndarray, fresh: np.ndarray) -> None:
        """Add a request's tokens.

        Args:
            row: its row in the table of states.
            tokens: their places in the batch.
            choices: [len(tokens)], integer; row of each as `add_choice` gave it.
            fresh: [len(tokens)], bool; whether each is counted.
        """
        places = np.arange(tokens.start, tokens.stop)
        constants = (np.full_like(places, row), np.full_like(places, self._num_tokens))
        self._columns.append(np.stack([places, *constants, choices, fresh]))
        self._num_tokens += len(tokens)

    def build(self) -> SpanStep:
        """The step, on the host."""
        tokens, states, firsts, choices, fresh = torch.from_numpy(np.concatenate(self._columns, axis=1))
        slots, strengths = torch.tensor(self._slots, dtype=torch.int32), torch.tensor(self._strengths)
        return SpanStep(tokens, states, firsts, choices, fresh.bool(), slots, strengths)

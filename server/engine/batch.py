"""Steering of the requests in a batch: which token gets which slot. Independent of vLLM; the runners drive it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from server.engine.ended import End, EndedRequests
from server.engine.plan import NUM_STATES, RequestPlan, Segment
from server.engine.row_pool import RowPool
from server.engine.slot_table import SlotKey, SlotTable
from server.engine.spans import SpanStepBuilder, SpanTable, SpanTokens
from server.engine.steering import Steering
from server.engine.step_counts import PendingCounts, Scheduled, StepCounts, to_host
from server.engine.step_times import StepTimes
from server.engine.token_table import TokenTable
from server.engine.triggers import TriggerTable
from steering_kernels import NUM_GATES

# Parts of a request that may be steered differently in one step: before, at and after the end of its prompt.
_PARTS = 3


class Sizes(NamedTuple):
    """Bounds of everything that is allocated before CUDA graphs are captured."""

    num_rows: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_num_reqs: int
    max_num_tokens: int


class SteeredBatch:
    """Storage on the device, and what every request of the batch gets.

    Attributes:
        pool: rows of the resident bundles.
        slots: what each slot applies.
        tokens: slot id and strength of every token of the step.
        gates: [max_num_tokens, NUM_GATES], fp32; conditions and triggers of the step's tokens.
        plans: steered requests by id.
        ended: final counts of those that have ended.
        times: what a step with steered requests costs the host.
    """

    def __init__(
        self, sizes: Sizes, dtype: torch.dtype, device: torch.device, spans: Mapping[str, SpanTokens] | None = None
    ) -> None:
        num_slots = _PARTS * (NUM_STATES if spans else 1) * sizes.max_num_reqs + 1
        self.pool = RowPool(sizes.num_rows, sizes.hidden_size, dtype, device)
        self.slots = SlotTable(
            self.pool, sizes.num_layers, num_slots, TriggerTable(num_slots, sizes.vocab_size, device)
        )
        self.tokens = TokenTable(sizes.max_num_tokens, device)
        self.gates = torch.zeros(sizes.max_num_tokens, NUM_GATES, device=device)
        self.plans: dict[str, RequestPlan] = {}
        self.ended = EndedRequests()
        self.times = StepTimes()
        self._span_names = frozenset(spans or {})
        self._spans = SpanTable(spans or {}, sizes.max_num_reqs, device)
        # Requests whose gates depend on token ids.
        self._triggered: set[str] = set()
        self._free_states = list(range(sizes.max_num_reqs))
        # Of requests with spans: row in the table of states, and the position that it stands at.
        self._states: dict[str, tuple[int, int]] = {}
        self._device = device
        self._step: Sequence[Scheduled] = ()
        self._span_step: tuple[SpanStepBuilder, list[tuple[RequestPlan, Segment]]] | None = None
        self._pending: PendingCounts | None = None
        self._fill_ns = 0

    def add(self, request_id: str, sampling_params: Any, num_prompt_tokens: int) -> None:
        """Take up a request that the scheduler sends for the first time, or again after a preemption.

        Engine core lets no request through whose bundles or spans are unknown here. Raising would end the engine;
        without a plan the count stays absent and the API refuses the answer.
        """
        steering = Steering.from_sampling_params(sampling_params)
        if steering is None or not all(
            term.bundle in self.pool and self._span_names.issuperset(term.spans) for term in steering.terms
        ):
            return
        if request_id not in self.plans:
            self.plans[request_id] = RequestPlan(steering, num_prompt_tokens)
            if any(self.pool[term.bundle].program.triggers for term in steering.terms):
                self._triggered.add(request_id)

    def remove(self, request_id: str, end: End | None = None) -> None:
        """Forget a request that has finished; unknown ids are ignored.

        Args:
            request_id: the engine's id.
            end: where it ended, for its final count; without it, with the last token that was computed.
        """
        plan = self.plans.pop(request_id, None)
        if plan is not None:
            counts = tuple(plan.tokens_steered) if end is None else plan.counts_until(end.stop)
            self.ended.add(plan.steering_id, counts, end is not None and end.is_aborted)
        self._triggered.discard(request_id)
        self.pause(request_id)

    def pause(self, request_id: str) -> None:
        """Take a preempted request out of the batch: it keeps its plan and gives its row of states to others."""
        if (state := self._states.pop(request_id, None)) is not None:
            self._free_states.append(state[0])

    def fill(self, step: Sequence[Scheduled], text_before: Callable[[int], Iterable[int]]) -> None:
        """Say on the device what every token of a step gets. Call before the model runs, in the order of the batch.

        Args:
            step: the requests in the order of their tokens.
            text_before: token ids of a request's positions before its `start`, by its index in `step`.
        """
        begun_ns = perf_counter_ns()
        table = self.tokens
        table.clear()
        self._step = [tokens for tokens in step if tokens.request_id in self.plans] if self.plans else ()
        self._span_step = self._pending = None
        if not self._step:
            table.publish(0)
            return
        first = num_tokens = 0
        # Decode steps are most of the tokens of most batches: looked up one by one, written all at once.
        places, slots, strengths = [], [], []
        for index, tokens in enumerate(step):
            plan = self.plans.get(tokens.request_id)
            if plan is None:
                pass
            elif tokens.num_tokens == 1 and (variant := plan.advance_by_one(tokens.start)) is not None:
                places.append(first)
                slots.append(self.slots.slot_of(variant.key, self._keys_in_step))
                strengths.append(variant.strength)
                num_tokens = first + 1
            elif plan.has_spans:
                self._fill_spans(plan, tokens, first, partial(text_before, index))
                num_tokens = first + tokens.num_tokens
            else:
                plan.advance(tokens.start + tokens.num_tokens - tokens.num_drafts)
                num_tokens = self._fill_plain(plan, tokens, first) or num_tokens
            first += tokens.num_tokens
        table.host_slot_ids[places], table.host_strengths[places] = slots, strengths
        table.publish(num_tokens)
        self._fill_ns = perf_counter_ns() - begun_ns

    def _fill_plain(self, plan: RequestPlan, tokens: Scheduled, first: int) -> int:
        stop = 0
        for segment in plan.segments:
            low, high = _overlap(segment, tokens)
            if low < high:
                places = slice(first + low - tokens.start, first + high - tokens.start)
                variant = segment.variants[0]
                self.tokens.host_slot_ids[places] = self.slots.slot_of(variant.key, self._keys_in_step)
                self.tokens.host_strengths[places] = variant.strength
                stop = places.stop
        return stop

    def _fill_spans(
        self, plan: RequestPlan, tokens: Scheduled, first: int, text_before: Callable[[], Iterable[int]]
    ) -> None:
        """Collect a request whose tokens get their slots on the device, from `finish_fill`."""
        row, position = self._states.get(tokens.request_id, (-1, -1))
        if row < 0:
            row = self._free_states.pop()
        if position != tokens.start:
            _count_cached(plan, self._spans.begin(row, text_before()))
        self._states[tokens.request_id] = (row, tokens.start + tokens.num_tokens)
        if self._span_step is None:
            self._span_step = (SpanStepBuilder(), [])
            # Row 0: tokens that no segment holds.
            self._span_step[0].add_choice([-1] * NUM_STATES, [0.0] * NUM_STATES)
        builder, owners = self._span_step
        choices = np.zeros(tokens.num_tokens, dtype=np.int64)
        for segment in plan.segments:
            low, high = _overlap(segment, tokens)
            if low < high:
                variants = segment.variants * (NUM_STATES // len(segment.variants))
                slots = [self.slots.slot_of(each.key, self._keys_in_step) if each.key else -1 for each in variants]
                choice = builder.add_choice(slots, [each.strength for each in variants])
                choices[low - tokens.start : high - tokens.start] = choice
                owners.append((plan, segment._replace(variants=variants)))
        fresh = np.arange(tokens.start, tokens.start + tokens.num_tokens) >= plan.see(tokens.start + tokens.num_tokens)
        builder.add_request(row, range(first, first + tokens.num_tokens), choices, fresh)

    def finish_fill(self, input_ids: Tensor) -> None:
        """Decide on the device what depends on token ids. Call when they are there and before the model runs.

        Args:
            input_ids: [>= num_tokens], integer, on the device.
        """
        if not self._step:
            return
        begun_ns = perf_counter_ns()
        if self._span_step is not None:
            builder, owners = self._span_step
            step = builder.build().to(self._device)
            counts = self._spans.apply_(step, input_ids, self.tokens.slot_ids, self.tokens.strengths)
            self._pending = to_host(counts[1:], owners)
        if not self._triggered.isdisjoint(tokens.request_id for tokens in self._step):
            count = min(input_ids.shape[0], self.gates.shape[0])
            self.slots.triggers.set_gates_(self.gates[:count], self.tokens.slot_ids[:count], input_ids[:count])
        self.times.add(self._fill_ns + perf_counter_ns() - begun_ns)

    def counts(self) -> StepCounts | None:
        """Counts of the step that was filled last; None when it held no steered request."""
        if not self._step:
            return None
        known, late = {}, {}
        for tokens in self._step:
            plan = self.plans[tokens.request_id]
            if plan.has_spans or tokens.num_drafts:
                late[tokens.request_id] = (plan, tokens.start + tokens.num_tokens)
            else:
                known[tokens.request_id] = (plan.steering_id, tuple(plan.tokens_steered))
        drafted = [tokens for tokens in self._step if tokens.num_drafts]
        return StepCounts(known, drafted, self._pending, late)

    def _plans_in_step(self) -> Iterable[RequestPlan]:
        return (self.plans[tokens.request_id] for tokens in self._step)

    def _keys_in_step(self) -> set[SlotKey]:
        return {key for plan in self._plans_in_step() for key in plan.keys}

    @property
    def num_slots_needed(self) -> int:
        """Slots that the requests in flight need."""
        return len({key for plan in self.plans.values() for key in plan.keys})


def _count_cached(plan: RequestPlan, states: Sequence[int]) -> None:
    """Count the tokens that were found in the cache, whose KV was made under the same steering."""
    first = plan.see(len(states))
    for position in range(first, len(states)):
        for segment in plan.segments:
            if segment.start <= position < segment.stop:
                plan.count(segment, segment.variants[states[position] % len(segment.variants)], 1)


def _overlap(segment: Segment, tokens: Scheduled) -> tuple[int, int]:
    return max(segment.start, tokens.start), min(segment.stop, tokens.start + tokens.num_tokens)

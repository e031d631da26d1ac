"""Every backend against the slow loop of `oracle`, over dtypes, shapes and popularity of slots, with random tables."""

import functools
import math
import random
from types import ModuleType

import numpy as np
import pytest
import torch
from cases import FORMS, READS, SMALL, WRITES, Case, make_case
from oracle import TOLERANCES, Steered, check, steered
from torch import Tensor

import steering_kernels
from steering_kernels import NUM_GATES, Flag, Kind, backends
from steering_kernels.entry import Entry

NUM_SLOTS, RANDOM_OPS = 136, 4
TOKEN_COUNTS, POPULARITIES = (0, 1, 7, 133), ("none", "identical", "uniform", "zipf", "distinct")
# Triton without a GPU is interpreted, a token at a time.
INTERPRETED_TOKENS_MAX = 7

each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)


def popularity(kind: str, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Slot of every token, [num_tokens]."""
    if kind == "none":
        return torch.full((num_tokens,), -1)
    if kind == "identical":
        return torch.full((num_tokens,), 3)
    if kind == "distinct":
        return torch.randperm(NUM_SLOTS, generator=generator)[:num_tokens]
    weights = torch.ones(NUM_SLOTS + 1) if kind == "uniform" else 1 / torch.arange(1, NUM_SLOTS + 2)
    return torch.multinomial(weights, max(num_tokens, 1), replacement=True, generator=generator)[:num_tokens] - 1


def random_entry(rng: random.Random, hidden_size: int) -> Entry:
    """Any kind with any of the flags that it knows; magnitudes that change a row visibly and keep it below 1e4."""
    kind = rng.choice([kind for kind in Kind if kind is not Kind.END])
    flags = Flag.KEEP_NORM if rng.random() < 0.3 and kind is not Kind.CONDITION else Flag(0)
    if kind in (Kind.GATED_ADD, Kind.CONDITION):
        flags |= rng.choice([Flag(0), Flag.COSINE]) | rng.choice([Flag(0), Flag.HARD])
    elif kind is Kind.FEATURE:
        flags |= rng.choice([Flag(0), Flag.JUMP_RELU, Flag.IDENTITY])
        flags |= rng.choice([Flag(0), Flag.EDIT_SET, Flag.EDIT_ADD])
    elif kind is Kind.ROTATE:
        flags |= rng.choice([Flag(0), Flag.ABSOLUTE])
    low, high = sorted(rng.gauss(0, 3) for _ in range(2))
    a, b, c = {
        Kind.CLAMP: (low, high, 0.0),
        Kind.ROTATE: (rng.uniform(-math.pi, math.pi), 0.0, 0.0),
        Kind.FEATURE: (rng.gauss(0, 1), abs(rng.gauss(0, 1)), rng.gauss(0, 2)),
    }.get(kind, (0.01, rng.gauss(0, 20), 0.0) if Flag.COSINE in flags else (rng.gauss(0, 1), rng.gauss(0, 1), 0.0))
    read, read2 = rng.sample(READS, 2)
    write, write2 = rng.sample(WRITES, 2)
    if kind is Kind.AFFINE:
        read = rng.choice([-1, *SMALL])
    scale = rng.choice([-1, 1]) * rng.uniform(0.3, 1.2) / (math.sqrt(hidden_size) if kind is Kind.ADD_RELATIVE else 1)
    gate, gate_out = rng.choice([-1, -1, rng.randrange(NUM_GATES)]), rng.randrange(NUM_GATES)
    return Entry(kind, read, write, read2, write2, gate, gate_out, flags, scale, a, b, c)


@functools.cache
def random_slots(hidden_size: int) -> list[list[Entry]]:
    rng = random.Random(hidden_size)
    counts = [rng.randint(0, RANDOM_OPS) for _ in range(NUM_SLOTS)]
    counts[3] = RANDOM_OPS  # the slot of all tokens when they are identical
    return [[random_entry(rng, hidden_size) for _ in range(count)] for count in counts]


@functools.lru_cache(maxsize=2)
def matrix_case(
    dtype: torch.dtype, hidden_size: int, num_tokens: int, kind: str, with_residual: bool
) -> tuple[Case, Steered]:
    slot_ids = popularity(kind, num_tokens, torch.Generator().manual_seed(hidden_size))
    case = make_case(random_slots(hidden_size), slot_ids, hidden_size, dtype, seed=num_tokens)
    return case, steered(case, "with residual" if with_residual else "in place")


@each_form
@pytest.mark.parametrize("kind", POPULARITIES)
@pytest.mark.parametrize("num_tokens", TOKEN_COUNTS)
@pytest.mark.parametrize("hidden_size", [64, 2048, 4096, 5120, 93])
@each_dtype
def test_random_tables(
    dtype: torch.dtype, hidden_size: int, num_tokens: int, kind: str, form: str, each_backend: ModuleType
) -> None:
    if "triton" in each_backend.__name__ and num_tokens > INTERPRETED_TOKENS_MAX and hidden_size != 64:
        pytest.skip("interpreted Triton takes seconds for so many tokens; the smallest rows stand for the others")
    case, expected = matrix_case(dtype, hidden_size, num_tokens, kind, form != "in place")
    check(each_backend, case.clone(), form, expected)


@each_dtype
def test_bounds_of_the_oracle_are_narrow(dtype: torch.dtype) -> None:
    """A bound as large as what steering changes would let any backend pass."""
    case, expected = matrix_case(dtype, 2048, 133, "distinct", False)
    change = [abs(x.value - row.double().numpy()).mean() for x, row in zip(expected.rows, case.hidden, strict=True)]
    bound = [(x.bound + TOLERANCES[dtype][0] * abs(x.value)).mean() for x in expected.rows]
    ratios = [b / c for b, c in zip(bound, change, strict=True) if c > 0]
    assert len(ratios) > 80
    limits = {torch.float32: 0.005, torch.float16: 0.03, torch.bfloat16: 0.1}
    assert np.percentile(ratios, 75) < limits[dtype]


@pytest.mark.parametrize("form", FORMS)
def test_registered_operators_run_the_chosen_backend(form: str) -> None:
    case, expected = matrix_case(torch.bfloat16, 93, 7, "distinct", form != "in place")
    through_operator, direct = case.clone(), case.clone()
    check(steering_kernels, through_operator, form, expected)
    direct.run(backends.chosen("cpu", torch.bfloat16), form)
    for ours, theirs in zip(through_operator[:2], direct[:2], strict=True):
        assert torch.equal(ours, theirs)

"""The steering operator against a slow loop in float64, on its own and inside compiled graphs."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from steering_kernels import steer_
from steering_kernels.reference import _steer_on_device_, steer_reference_

NUM_TOKENS, HIDDEN_SIZE, NUM_ROWS, NUM_SLOTS, MAX_OPS = 24, 40, 9, 24, 3
Steer = Callable[..., None]


class Inputs(NamedTuple):
    """Arguments of `steer_`; token tables are longer than the batch, as in the runner."""

    hidden: Tensor
    pool: Tensor
    write_rows: Tensor
    scales: Tensor
    slot_ids: Tensor
    strengths: Tensor


def device_body_(
    hidden: Tensor, pool: Tensor, write_rows: Tensor, scales: Tensor, slot_ids: Tensor, strengths: Tensor
) -> None:
    """The branch-free body that CUDA graphs capture, on host tensors."""
    num_tokens = hidden.shape[0]
    _steer_on_device_(hidden, pool, write_rows, scales, slot_ids[:num_tokens], strengths[:num_tokens])


each_body = pytest.mark.parametrize("steer", [steer_, steer_reference_, device_body_], ids=["op", "host", "device"])


def popularity(kind: str, generator: torch.Generator) -> Tensor:
    """Slot of every token, [NUM_TOKENS], int64."""
    if kind == "identical":
        return torch.full((NUM_TOKENS,), 3)
    if kind == "distinct":
        return torch.randperm(NUM_SLOTS, generator=generator)[:NUM_TOKENS]
    if kind == "uniform":
        return torch.randint(-1, NUM_SLOTS, (NUM_TOKENS,), generator=generator)
    weights = 1.0 / torch.arange(1, NUM_SLOTS + 2)
    return torch.multinomial(weights, NUM_TOKENS, replacement=True, generator=generator) - 1


def make_inputs(kind: str = "uniform", dtype: torch.dtype = torch.float32, max_ops: int = MAX_OPS) -> Inputs:
    generator = torch.Generator().manual_seed(17)
    slot_ids = torch.full((NUM_TOKENS + 5,), -1, dtype=torch.int32)
    slot_ids[:NUM_TOKENS] = popularity(kind, generator)
    write_rows = torch.randint(-1, NUM_ROWS, (NUM_SLOTS, max_ops), generator=generator)
    scales = torch.randn(NUM_SLOTS, max_ops, generator=generator)
    scales[write_rows < 0] = float("nan")  # an entry that applies nothing must not matter
    return Inputs(
        torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator).mul(4).to(dtype),
        torch.randn(NUM_ROWS, HIDDEN_SIZE, generator=generator).to(dtype),
        write_rows.to(torch.int32),
        scales,
        slot_ids,
        torch.randn(NUM_TOKENS + 5, generator=generator),
    )


def naive(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The documented semantics, token by token, in float64; and the sum of the magnitudes that were added up."""
    exact = inputs.hidden.double()
    magnitude = exact.abs()
    for token in range(exact.shape[0]):
        slot = int(inputs.slot_ids[token])
        for op in range(inputs.write_rows.shape[1]) if slot >= 0 else ():
            row = int(inputs.write_rows[slot, op])
            if row >= 0:
                term = inputs.strengths[token].double() * inputs.scales[slot, op].double() * inputs.pool[row].double()
                exact[token] += term
                magnitude[token] += term.abs()
    return exact, magnitude


def assert_matches(hidden: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """Products and sums in fp32, then one rounding to the dtype of hidden."""
    bound = torch.finfo(torch.float32).eps * 8 * magnitude + torch.finfo(hidden.dtype).eps * exact.abs() + 1e-12
    excess = (hidden.double() - exact).abs() - bound
    assert (excess <= 0).all(), f"{int((excess > 0).sum())} elements off, worst by {float(excess.max())}"


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@each_body
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["identical", "distinct", "uniform", "zipf"])
@pytest.mark.parametrize("max_ops", [1, MAX_OPS])
def test_matches_the_naive_loop(steer: Steer, kind: str, dtype: torch.dtype, max_ops: int) -> None:
    inputs = make_inputs(kind, dtype, max_ops)
    exact, magnitude = naive(inputs)
    before = [tensor.clone() for tensor in inputs[1:]]
    steer(*inputs)
    assert_matches(inputs.hidden, exact, magnitude)
    for old, new in zip(before, inputs[1:], strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True, msg="changed more than hidden")


@each_body
def test_pool_in_fp32_under_bf16_hidden(steer: Steer) -> None:
    inputs = make_inputs(dtype=torch.bfloat16)
    inputs = inputs._replace(pool=inputs.pool.float() + 1e-4)
    exact, magnitude = naive(inputs)
    steer(*inputs)
    assert_matches(inputs.hidden, exact, magnitude)


@each_body
def test_rounds_once(steer: Steer) -> None:
    """Four times 2^-9 is one step of bf16 above 1; rounded one by one, each would be lost."""
    hidden = torch.ones(1, 4, dtype=torch.bfloat16)
    pool = torch.full((1, 4), 2.0**-9, dtype=torch.bfloat16)
    rows = torch.zeros(1, 4, dtype=torch.int32)
    steer(hidden, pool, rows, torch.ones(1, 4), torch.zeros(1, dtype=torch.int32), torch.ones(1))
    assert hidden.tolist() == [[1 + 2.0**-7] * 4]


@each_body
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_unsteered_rows_stay_bit_identical(steer: Steer, dtype: torch.dtype) -> None:
    inputs = make_inputs("identical", dtype)
    odd = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), float("-inf")], dtype=dtype)
    unsteered, empty_slot = [0, 7, NUM_TOKENS - 1], [2, 9]
    inputs.slot_ids[unsteered] = -1
    inputs.slot_ids[empty_slot] = 5
    inputs.write_rows[5] = -1
    inputs.write_rows[3, 0] = 1
    inputs.strengths[unsteered] = float("nan")  # a stale entry must not matter
    for token in unsteered + empty_slot:
        inputs.hidden[token, :5] = odd
    before = inputs.hidden.clone()
    steer(*inputs)
    rows = unsteered + empty_slot
    assert torch.equal(bits(inputs.hidden[rows]), bits(before[rows]))
    others = [token for token in range(NUM_TOKENS) if token not in rows]
    assert (inputs.hidden[others] != before[others]).any(1).all()


@each_body
def test_nan_of_a_steered_row_stays_in_its_row(steer: Steer) -> None:
    inputs = make_inputs("identical")
    inputs.write_rows[3] = 0
    inputs.hidden[4] = float("nan")
    steer(*inputs)
    assert inputs.hidden[4].isnan().all()
    assert inputs.hidden[[token for token in range(NUM_TOKENS) if token != 4]].isfinite().all()


@each_body
def test_strength_zero_changes_no_value(steer: Steer) -> None:
    inputs = make_inputs("distinct")
    inputs.strengths.zero_()
    before = inputs.hidden.clone()
    steer(*inputs)
    assert torch.equal(inputs.hidden, before)


@each_body
def test_zero_tokens(steer: Steer) -> None:
    inputs = make_inputs()
    steer(inputs.hidden[:0], *inputs[1:])


@each_body
def test_rows_of_a_wider_buffer(steer: Steer) -> None:
    inputs = make_inputs()
    buffer = torch.full((NUM_TOKENS, HIDDEN_SIZE + 3), 7.0)
    buffer[:, :HIDDEN_SIZE] = inputs.hidden
    exact, magnitude = naive(inputs)
    steer(buffer[:, :HIDDEN_SIZE], *inputs[1:])
    assert_matches(buffer[:, :HIDDEN_SIZE], exact, magnitude)
    assert (buffer[:, HIDDEN_SIZE:] == 7.0).all()


def test_both_bodies_agree() -> None:
    one, other = make_inputs("zipf"), make_inputs("zipf")
    steer_(*one)
    device_body_(*other)
    torch.testing.assert_close(one.hidden, other.hidden, rtol=1e-6, atol=1e-5)


def layer(inputs: Inputs, hidden: Tensor) -> Tensor:
    """Work around the operator for a compiler to reorder if it missed the mutation."""
    hidden = hidden * 2
    steer_(hidden, *inputs[1:])
    return hidden + hidden[:1]


# torch's own import of its inductor backend.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled(backend: str) -> None:
    inputs = make_inputs()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    torch.testing.assert_close(compiled(inputs, inputs.hidden), layer(inputs, inputs.hidden))
    # Buffers are rewritten in place between steps; compiled code must read them anew, at any number of tokens.
    inputs.slot_ids.copy_(inputs.slot_ids.flip(0))
    inputs.write_rows.copy_(inputs.write_rows.roll(1, 0))
    inputs.scales.copy_(inputs.scales.roll(1, 0))
    for num_tokens in (NUM_TOKENS, 7):
        hidden = inputs.hidden[:num_tokens].clone()
        torch.testing.assert_close(compiled(inputs, hidden), layer(inputs, hidden))


def test_opcheck() -> None:
    inputs = make_inputs()
    result = torch.library.opcheck(torch.ops.expertsteer.steer_.default, tuple(inputs))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden": torch.zeros(3, 4, 5)}, ["hidden (3, 4, 5)", "pool (9, 40)", "[num_tokens, hidden_size]"]),
        ({"hidden": torch.zeros(24, 41)}, ["(24, 41)", "(9, 40)", "one hidden_size"]),
        ({"pool": torch.zeros(40)}, ["pool (40,)", "[num_rows, hidden_size]"]),
        ({"write_rows": torch.zeros(24, 2, dtype=torch.int32)}, ["write_rows (24, 2)", "scales (24, 3)", "num_slots"]),
        ({"write_rows": torch.zeros(24, dtype=torch.int32), "scales": torch.zeros(24)}, ["(24,)", "max_ops"]),
        ({"write_rows": torch.zeros(24, 3)}, ["write_rows is torch.float32", "torch.int32", ".to(torch.int32)"]),
        ({"scales": torch.zeros(24, 3).half()}, ["scales is torch.float16", ".to(torch.float32)"]),
        ({"slot_ids": torch.zeros(29).long()}, ["slot_ids is torch.int64", ".to(torch.int32)"]),
        ({"strengths": torch.zeros(29).double()}, ["strengths is torch.float64", ".to(torch.float32)"]),
        ({"hidden": torch.zeros(24, 40).double()}, ["hidden is torch.float64", "bfloat16, float16 or float32"]),
        ({"pool": torch.zeros(9, 40).int()}, ["pool is torch.int32", "bfloat16, float16 or float32"]),
        ({"slot_ids": torch.zeros(23).int()}, ["slot_ids (23,)", "[>= 24]", "one entry per token"]),
        ({"slot_ids": torch.zeros(29, 1).int()}, ["slot_ids (29, 1)", "[>= 24]"]),
        ({"strengths": torch.zeros(23)}, ["strengths (23,)", "[>= 24]"]),
        ({"strengths": torch.zeros(())}, ["strengths ()", "[>= 24]"]),
    ],
)
def test_refuses_arguments(changes: dict[str, Tensor], words: list[str]) -> None:
    inputs = make_inputs()._replace(**changes)
    before = inputs.hidden.clone()
    with pytest.raises(ValueError) as caught:
        steer_(*inputs)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert torch.equal(inputs.hidden, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_reads_tables_anew() -> None:
    inputs = Inputs(*(tensor.cuda() for tensor in make_inputs()))
    static, original = inputs.hidden.clone(), inputs.hidden.clone()
    steer_(static, *inputs[1:])  # warm-up outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steer_(static, *inputs[1:])
    inputs.slot_ids.copy_(inputs.slot_ids.flip(0))
    static.copy_(original)
    graph.replay()
    assert_matches(static.cpu(), *naive(Inputs(*(tensor.cpu() for tensor in inputs))))

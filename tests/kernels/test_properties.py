"""What each kind of intervention promises, as properties of every backend over random rows, angles and strengths."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from steering_kernels import NUM_GATES, Flag, Kind, backends
from steering_kernels.entry import Entry, pack

# The same examples in every run; the fixture of the backend holds no state that one example could leave to the next.
settings.register_profile(
    "kernels",
    derandomize=True,
    deadline=None,
    # Triton is there only when it is interpreted, which takes tens of milliseconds per row.
    max_examples=4 if "triton" in backends.available("cpu", torch.float32) else 30,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
kernels = settings.get_profile("kernels")

FUSED_EPSILON = 1e-6
# Pool rows: two orthonormal ones, which span the plane of rotations, and two others.
R, R2, W, W2 = range(4)
NUM_TOKENS = 5

# No subnormal strengths: what they add is below the rounding of everything.
strengths = st.floats(-4, 4, width=32, allow_subnormal=False)
angles = st.floats(-3, 3, width=32, allow_subnormal=False)
bounds = st.tuples(strengths, strengths).map(sorted)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


class World(NamedTuple):
    """Rows of a residual stream and a pool for them."""

    hidden: Tensor
    pool: Tensor

    @property
    def plane(self) -> Tensor:
        """Coordinates of the rows in the plane of rotations, [num_tokens, 2]."""
        return self.hidden.float() @ self.pool[[R, R2]].float().T


@st.composite
def worlds(draw: st.DrawFn, dtype: torch.dtype | None = torch.float32) -> World:
    """Random worlds; `dtype` None draws one."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    hidden_size = draw(st.sampled_from([2, 3, 8, 40, 129, 512]))
    dtype = draw(dtypes) if dtype is None else dtype
    plane = torch.linalg.qr(torch.randn(hidden_size, 2, generator=generator)).Q.T
    others = torch.randn(2, hidden_size, generator=generator)
    size = draw(st.sampled_from([0.1, 1.0, 30.0]))
    hidden = size * torch.randn(NUM_TOKENS, hidden_size, generator=generator)
    return World(hidden.to(dtype), torch.cat([plane, others]).to(dtype))


def steered(
    backend: ModuleType,
    world: World,
    slots: Sequence[Entry] | Sequence[Sequence[Entry]],
    strength: float | Tensor = 1.0,
    slot_ids: Sequence[int] | None = None,
) -> World:
    """The world after `steer_`; a flat list of entries is the only slot."""
    listed = [slots] if not slots or isinstance(slots[0], Entry) else slots
    hidden = world.hidden.clone()
    num_tokens = hidden.shape[0]
    codes, params = pack(listed)  # type: ignore[arg-type]
    backend.steer_(
        hidden,
        world.pool,
        codes,
        params,
        torch.tensor(slot_ids or [0] * num_tokens, dtype=torch.int32),
        torch.full((num_tokens,), strength) if isinstance(strength, float) else strength,
        torch.zeros(num_tokens, NUM_GATES),
    )
    return world._replace(hidden=hidden)


def assert_near(actual: Tensor, expected: Tensor, world: World, roundings: float = 64.0) -> None:
    """Equal up to some roundings of numbers as large as the world's rows."""
    atol = roundings * torch.finfo(world.hidden.dtype).eps * (1 + world.hidden.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def entries(kind: Kind) -> list[Entry]:
    """Entries of one kind with each flag that it knows."""
    plain = Entry(kind, R, W, R2, W2, a=-0.5, b=0.75, c=1.5)
    flags = {
        Kind.GATED_ADD: [Flag.COSINE, Flag.HARD, Flag.COSINE | Flag.HARD],
        Kind.FEATURE: [Flag.JUMP_RELU, Flag.IDENTITY, Flag.EDIT_SET, Flag.EDIT_ADD],
        Kind.ROTATE: [Flag.ABSOLUTE],
    }
    return [
        plain._replace(flags=flag | norm)
        for flag in [Flag(0), *flags.get(kind, [])]
        for norm in (Flag(0), Flag.KEEP_NORM)
    ]


EFFECTS = [kind for kind in Kind if kind not in (Kind.END, Kind.CONDITION)]
ALL_ENTRIES = [entry for kind in EFFECTS for entry in entries(kind)]
any_entry = st.sampled_from(ALL_ENTRIES)
any_entries = st.lists(any_entry, max_size=4)
PROJECT = Entry(Kind.PROJECT, R, R)
RELATIVE = Flag(0)


def rotation(angle: float, flags: Flag = RELATIVE) -> Entry:
    return Entry(Kind.ROTATE, R, R, R2, R2, flags=flags, a=angle)


@kernels
@given(worlds(dtype=None), any_entries)
def test_strength_zero_is_bit_identical(each_backend: ModuleType, world: World, listed: list[Entry]) -> None:
    assert torch.equal(steered(each_backend, world, listed, 0.0).hidden, world.hidden)


@kernels
@given(worlds())
def test_project_removes_the_direction_and_is_idempotent(each_backend: ModuleType, world: World) -> None:
    once = steered(each_backend, world, [PROJECT])
    assert_near(once.plane, world.plane * torch.tensor([0.0, 1.0]), world)
    assert_near(steered(each_backend, once, [PROJECT]).hidden, once.hidden, world)


@kernels
@given(worlds())
def test_project_with_strength_two_is_a_reflection(each_backend: ModuleType, world: World) -> None:
    once = steered(each_backend, world, [PROJECT], 2.0)
    assert_near(once.plane, world.plane * torch.tensor([-1.0, 1.0]), world)
    assert_near(steered(each_backend, once, [PROJECT], 2.0).hidden, world.hidden, world)


@kernels
@given(worlds(), bounds)
def test_clamp_bounds_the_coordinate_and_is_idempotent(
    each_backend: ModuleType, world: World, limits: list[float]
) -> None:
    clamp = Entry(Kind.CLAMP, R, R, a=limits[0], b=limits[1])
    once = steered(each_backend, world, [clamp])
    assert_near(once.plane[:, 0], world.plane[:, 0].clamp(*limits), world)
    assert_near(once.plane[:, 1], world.plane[:, 1], world)
    assert_near(steered(each_backend, once, [clamp]).hidden, once.hidden, world)


@kernels
@given(worlds(), st.floats(-4, 4, width=32))
def test_clamp_of_equal_bounds_sets_the_coordinate(each_backend: ModuleType, world: World, value: float) -> None:
    once = steered(each_backend, world, [Entry(Kind.CLAMP, R, R, a=value, b=value)])
    assert_near(once.plane[:, 0], torch.full((NUM_TOKENS,), value), world)


@kernels
@given(worlds(), angles, strengths)
def test_rotation_keeps_the_norm_and_turns_back(
    each_backend: ModuleType, world: World, angle: float, strength: float
) -> None:
    turned = steered(each_backend, world, [rotation(angle)], strength)
    torch.testing.assert_close(turned.hidden.norm(dim=1), world.hidden.norm(dim=1), rtol=1e-5, atol=1e-6)
    for back in (rotation(angle)._replace(scale=-1.0), rotation(-angle)):
        assert_near(steered(each_backend, turned, [back], strength).hidden, world.hidden, world)


@kernels
@given(worlds(), angles, angles)
def test_rotations_add_up(each_backend: ModuleType, world: World, one: float, other: float) -> None:
    both = steered(each_backend, world, [rotation(one), rotation(other)])
    assert_near(both.hidden, steered(each_backend, world, [rotation(one + other)]).hidden, world)


@kernels
@given(worlds(), angles)
def test_absolute_rotation_sets_the_angle(each_backend: ModuleType, world: World, angle: float) -> None:
    to_angle = rotation(angle, Flag.ABSOLUTE)
    turned = steered(each_backend, world, [to_angle])
    radius = world.plane.norm(dim=1, keepdim=True)
    assert_near(turned.plane, radius * torch.tensor([math.cos(angle), math.sin(angle)]), world)
    torch.testing.assert_close(turned.hidden.norm(dim=1), world.hidden.norm(dim=1), rtol=1e-5, atol=1e-6)
    assert_near(steered(each_backend, turned, [to_angle]).hidden, turned.hidden, world)


@kernels
@given(worlds(), angles, st.floats(0, 1, width=32))
def test_absolute_rotation_goes_the_shorter_way(
    each_backend: ModuleType, world: World, angle: float, strength: float
) -> None:
    turned = steered(each_backend, world, [rotation(angle, Flag.ABSOLUTE)], strength)
    target = torch.tensor([math.cos(angle), math.sin(angle)])
    tolerance = 1e-5 * (1 + world.hidden.abs().max())
    assert (turned.plane @ target >= world.plane @ target - tolerance).all()


@kernels
@given(worlds(dtype=None), any_entry, strengths)
def test_keep_norm_keeps_the_norm(each_backend: ModuleType, world: World, entry: Entry, strength: float) -> None:
    kept = steered(each_backend, world, [entry._replace(flags=entry.flags | Flag.KEEP_NORM)], strength)
    rtol = 4 * torch.finfo(world.hidden.dtype).eps + 1e-5
    torch.testing.assert_close(kept.hidden.float().norm(dim=1), world.hidden.float().norm(dim=1), rtol=rtol, atol=1e-6)


@kernels
@given(worlds(dtype=None), st.lists(any_entries, min_size=NUM_TOKENS, max_size=NUM_TOKENS), strengths)
def test_mixed_batch_equals_each_token_alone(
    each_backend: ModuleType, world: World, slots: list[list[Entry]], strength: float
) -> None:
    scaled = torch.linspace(-1, 1, NUM_TOKENS) * strength
    slot_ids = [2, -1, 0, 4, 2]
    batch = steered(each_backend, world, [*slots, []], scaled, slot_ids)
    for token, slot in enumerate(slot_ids):
        alone = world._replace(hidden=world.hidden[token : token + 1])
        alone = steered(each_backend, alone, [*slots, []], scaled[token : token + 1], [slot])
        assert torch.equal(alone.hidden[0], batch.hidden[token])


@kernels
@given(worlds(), any_entries, strengths)
def test_a_list_is_the_composition_of_its_entries(
    each_backend: ModuleType, world: World, listed: list[Entry], strength: float
) -> None:
    """Calls one after the other, in the order of listing; fp32 in and out, so no rounding lies between the entries."""
    together, one_by_one = steered(each_backend, world, listed, strength), world
    for entry in listed:
        one_by_one = steered(each_backend, one_by_one, [entry], strength)
    assert torch.equal(together.hidden, one_by_one.hidden)


@kernels
@given(worlds())
def test_order_matters_where_entries_do_not_commute(each_backend: ModuleType, world: World) -> None:
    add = Entry(Kind.ADD, write=R, scale=2.0)
    projected_last = steered(each_backend, world, [add, PROJECT])
    added_last = steered(each_backend, world, [PROJECT, add])
    assert_near(projected_last.plane[:, 0], torch.zeros(NUM_TOKENS), world)
    assert_near(added_last.plane[:, 0], torch.full((NUM_TOKENS,), 2.0), world)


@kernels
@given(worlds(dtype=None), strengths)
def test_add_is_undone_by_the_opposite_strength(each_backend: ModuleType, world: World, strength: float) -> None:
    add = [Entry(Kind.ADD, write=W)]
    there = steered(each_backend, world, add, strength)
    assert_near(steered(each_backend, there, add, -strength).hidden, world.hidden, there)


@kernels
@given(worlds(), strengths, strengths)
def test_add_is_linear_in_the_strength(each_backend: ModuleType, world: World, one: float, other: float) -> None:
    add = [Entry(Kind.ADD, write=W)]
    twice = steered(each_backend, steered(each_backend, world, add, one), add, other)
    assert_near(twice.hidden, steered(each_backend, world, add, one + other).hidden, world)


@kernels
@given(worlds(), strengths)
def test_add_relative_moves_by_a_share_of_the_norm(each_backend: ModuleType, world: World, strength: float) -> None:
    moved = steered(each_backend, world, [Entry(Kind.ADD_RELATIVE, write=R)], strength)
    expected = world.hidden.norm(dim=1, keepdim=True) * strength * world.pool[R]
    assert_near(moved.hidden, world.hidden + expected, moved)


@kernels
@given(worlds(dtype=None), st.sampled_from([Flag(0), Flag.JUMP_RELU, Flag.IDENTITY]), strengths)
def test_feature_scaled_by_one_changes_nothing(
    each_backend: ModuleType, world: World, activation: Flag, strength: float
) -> None:
    feature = Entry(Kind.FEATURE, R, W, flags=activation, a=0.25, b=0.5, c=1.0)
    assert torch.equal(steered(each_backend, world, [feature], strength).hidden, world.hidden)


@kernels
@given(worlds(), st.floats(-2, 2, width=32, allow_subnormal=False), strengths)
def test_affine_is_affine(each_backend: ModuleType, world: World, share: float, strength: float) -> None:
    """The image of a mixture of rows is the mixture of their images."""
    affine = [Entry(Kind.AFFINE, W, W2)]
    mixed = share * world.hidden[:1] + (1 - share) * world.hidden[1:2]
    images = steered(each_backend, world, affine, strength).hidden
    image = steered(each_backend, world._replace(hidden=mixed), affine, strength)
    expected = share * images[:1] + (1 - share) * images[1:2]
    atol = 1e-5 * (1 + images.abs().max().item()) * (1 + abs(share))
    torch.testing.assert_close(image.hidden, expected, rtol=0, atol=atol)


@kernels
@given(worlds(), st.booleans())
def test_hard_gate_opens_on_one_side_only(each_backend: ModuleType, world: World, below: bool) -> None:
    entry = Entry(Kind.GATED_ADD, R, W, flags=Flag.HARD, a=0.1, b=-1.0 if below else 1.0)
    moved = (steered(each_backend, world, [entry]).hidden != world.hidden).any(1)
    coordinate = world.plane[:, 0]
    decided = (coordinate - 0.1).abs() > 1e-3
    assert torch.equal(moved[decided], ((coordinate < 0.1) == below)[decided])


@kernels
@given(worlds(), any_entries, strengths)
def test_fused_equals_unfused(each_backend: ModuleType, world: World, listed: list[Entry], strength: float) -> None:
    """The residual stream of the fused operator is what `steer_` makes of hidden + residual."""
    apart = steered(each_backend, world, listed, strength)
    # Halves add up exactly.
    hidden, residual = world.hidden / 2, world.hidden / 2
    codes, params = pack([listed])
    num_tokens, hidden_size = hidden.shape
    tables = (torch.zeros(num_tokens, dtype=torch.int32), torch.full((num_tokens,), strength))
    gates = torch.zeros(num_tokens, NUM_GATES)
    each_backend.steer_add_rms_norm_(
        hidden, residual, None, FUSED_EPSILON, 0.0, world.pool, codes, params, *tables, gates
    )
    assert_near(residual, apart.hidden, apart)
    normed = torch.nn.functional.rms_norm(apart.hidden, (hidden_size,), None, FUSED_EPSILON)
    torch.testing.assert_close(hidden, normed, rtol=1e-4, atol=1e-4)

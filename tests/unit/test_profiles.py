"""Names, and what they mean at admission."""

from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from artifacts.bundle import Bundle, load_bundle
from artifacts.manifest import Scope
from server.auth.keys import ANONYMOUS, Identity, Role
from server.engine.steering import Term
from server.errors import ErrorCode, SteeringRequestError
from server.lowering import lower
from server.profiles import Profile, ProfileTable
from server.schema import ProfileRef
from server.triggers import resolve_triggers
from steering_kernels import MAX_OPS, NUM_GATES, Kind


@pytest.fixture
def careful(make_profile: Callable[..., Profile]) -> Profile:
    return make_profile("careful", (3, 1, 3))


@pytest.fixture
def table(
    careful: Profile, make_profile: Callable[..., Profile], table_of: Callable[..., ProfileTable]
) -> ProfileTable:
    return table_of(careful, make_profile("medical", scope=Scope.RESPONSE), make_profile("wide", (3,) * 7))


def refusal(table: ProfileTable, *refs: dict[str, Any], by: Identity = ANONYMOUS) -> SteeringRequestError:
    with pytest.raises(SteeringRequestError) as caught:
        table.resolve([ProfileRef(**ref) for ref in refs], by)
    return caught.value


def test_defaults_come_from_the_manifest(careful: Profile) -> None:
    settings = careful.settings
    assert (careful.name, settings.strength, settings.maximum_strength, settings.scope) == ("careful", 0.5, 2.0, "all")
    assert settings.key == settings.bundle


def test_the_program_keeps_the_listed_order(careful: Profile, tiny_bundle: Callable[..., Bundle]) -> None:
    program = lower(tiny_bundle("careful", (3, 1, 3)), {})
    assert [(step.layer, step.kind, program.rows[step.write][0].item()) for step in program.steps] == [
        (3, Kind.ADD, 1),
        (1, Kind.ADD, 2),
        (3, Kind.ADD, 3),
    ]
    assert careful.layers == [1, 3, 3]


@pytest.fixture(scope="module")
def gated(make_bundle: Callable[..., Path]) -> Callable[..., Bundle]:
    """A bundle that uses `count` triggers, all at layers of their own, and a condition."""

    def make(name: str, count: int, **changes: Any) -> Bundle:
        triggers = {f"t{index}": {"text_contains": "\n"} for index in range(count)}
        steps = [
            {"kind": "condition", "sets": "open", "parameters": {"threshold": 0.0}},
            {"kind": "add", "gate": "open"},
        ]
        steps += [{"kind": "add", "gate": gate} for gate in triggers]
        layers = [0, 4, *(index % 4 + 1 for index in range(count))]
        path = make_bundle(name, layers, 11, steps=steps, triggers=triggers, **changes)
        return load_bundle(path)

    return make


def test_triggers_come_from_the_served_tokenizer(gated: Callable[..., Bundle]) -> None:
    bundle = gated("gated", 1)
    triggers = resolve_triggers(bundle.manifest, {0: "a", 1: "\n", 2: "b\n"})
    assert dict(lower(bundle, triggers).triggers) == {0: (1, 2)}
    with pytest.raises(ValueError, match="Trigger 't0' asks for tokens"):
        resolve_triggers(bundle.manifest, {})


def test_layers_that_are_only_read_are_not_steered(
    gated: Callable[..., Bundle], profile_of: Callable[..., Profile]
) -> None:
    bundle = gated("gated", 1)
    assert profile_of(bundle).layers == [1, 4]
    assert [step.layer for step in lower(bundle, {"t0": (1,)}).steps] == [0, 4, 1]


@pytest.mark.parametrize(
    ("layers", "steps", "steered"),
    [((4,), [0, 4], [4]), ((1,), [1], [1]), ((1, 4), [0, 4, 1], [1, 4]), (None, [0, 4, 1], [1, 4])],
)
def test_a_profile_of_some_layers(
    gated: Callable[..., Bundle],
    profile_of: Callable[..., Profile],
    layers: tuple[int, ...] | None,
    steps: list[int],
    steered: list[int],
) -> None:
    """A condition stays where something that is kept waits for it, and goes where nothing does."""
    bundle = gated("gated", 1)
    profile = profile_of(bundle, layers=layers)
    program = lower(bundle, {"t0": (1,)}, layers)
    assert [step.layer for step in program.steps] == steps
    assert profile.layers == steered
    assert program.rows.shape[0] == len(steps), "only the rows that are used"
    assert profile.settings.key == bundle.digest + ("" if layers is None else f"+{','.join(map(str, layers))}")


def test_more_gates_than_a_slot_holds(
    gated: Callable[..., Bundle], profile_of: Callable[..., Profile], table_of: Callable[..., ProfileTable]
) -> None:
    table = table_of(profile_of(gated("four", 3)), profile_of(gated("five", 4)))
    table.resolve([ProfileRef(name="four"), ProfileRef(name="four", strength=-1.0)], ANONYMOUS)
    error = refusal(table, {"name": "four"}, {"name": "five"})
    assert error.code == ErrorCode.TOO_MANY
    assert f"There are 9 conditions and triggers; at most {NUM_GATES} fit." in str(error)


def test_excluded_spans_reach_the_engine(
    gated: Callable[..., Bundle], profile_of: Callable[..., Profile], table_of: Callable[..., ProfileTable]
) -> None:
    table = table_of(profile_of(gated("spans", 1, exclude=("structured_output", "reasoning"))))
    profile = next(iter(table))
    assert profile.settings.exclude == ("structured_output", "reasoning")
    steering = table.resolve([ProfileRef(name="spans")], ANONYMOUS).steering
    assert steering is not None
    assert steering.terms == (Term(profile.settings.bundle, 1.0, "all", ("structured_output", "reasoning")),)


def test_resolve(table: ProfileTable) -> None:
    refs = [ProfileRef(name="medical"), ProfileRef(name="careful", strength=-1.5, scope=Scope.PROMPT)]
    resolved = table.resolve(refs, ANONYMOUS)
    digests = [term.profile.settings.bundle for term in resolved.terms]
    assert resolved.steering is not None
    assert resolved.steering.terms == (Term(digests[0], 0.5, "response"), Term(digests[1], -1.5, "prompt"))
    assert type(resolved.steering.terms[0].scope) is str, "the engine gets plain data"
    assert resolved.bundles == f"{digests[0]}, {digests[1]}"
    again = table.resolve(refs, ANONYMOUS).steering
    assert again is not None and again.request_id != resolved.steering.request_id


def test_receipts(table: ProfileTable) -> None:
    refs = [ProfileRef(name="careful", strength=0.0), ProfileRef(name="medical"), ProfileRef(name="careful")]
    resolved = table.resolve(refs, ANONYMOUS)
    assert resolved.steering is not None and len(resolved.steering.terms) == 2
    first, second, third = resolved.receipts([4, 3, 0, 9])
    assert [first.tokens_steered, second.tokens_steered, third.tokens_steered] == [0, 7, 9]
    assert first.to_json() == {
        "profile": "careful",
        "bundle": resolved.terms[0].profile.settings.bundle,
        "strength": 0.0,
        "scope": "all",
        "layers": [1, 3],
        "tokens_steered": 0,
    }


def test_all_strengths_zero_is_off(table: ProfileTable) -> None:
    resolved = table.resolve(
        [ProfileRef(name="careful", strength=0.0), ProfileRef(name="medical", strength=-0.0)], ANONYMOUS
    )
    assert resolved.steering is None
    assert [receipt.tokens_steered for receipt in resolved.receipts([])] == [0, 0]


def test_unknown_profile(table: ProfileTable) -> None:
    error = refusal(table, {"name": "carefull"})
    assert (error.code, error.status) == (ErrorCode.PROFILE_NOT_FOUND, HTTPStatus.NOT_FOUND)
    assert "'carefull' does not exist. Near names: careful, " in str(error)
    assert "Served: careful, medical, wide." in str(refusal(table, {"name": "zzz"}))
    assert "Served: none." in str(refusal(ProfileTable({}), {"name": "x"}))


@pytest.mark.parametrize("digits", [8, 20, 64])
def test_version(table: ProfileTable, careful: Profile, digits: int) -> None:
    prefix = careful.settings.bundle[: len("sha256:") + digits]
    assert table.resolve([ProfileRef(name=f"careful@{prefix}")], ANONYMOUS).terms[0].profile is careful


@pytest.mark.parametrize("version", ["", "sha256:", "sha256:{7}", "sha256:00000000", "{8}", "sha256:{8}x", "latest"])
def test_other_version(table: ProfileTable, careful: Profile, version: str) -> None:
    digits = careful.settings.bundle.removeprefix("sha256:")
    for count in ("7", "8"):
        version = version.replace(f"{{{count}}}", digits[: int(count)])
    error = refusal(table, {"name": f"careful@{version}"})
    assert (error.code, error.status) == (ErrorCode.PROFILE_NOT_FOUND, HTTPStatus.NOT_FOUND)
    assert f"no version '{version}'; loaded: {careful.settings.bundle}" in str(error)


@pytest.mark.parametrize("strength", [2.0, -2.0])
def test_strength_at_the_maximum(table: ProfileTable, strength: float) -> None:
    assert table.resolve([ProfileRef(name="careful", strength=strength)], ANONYMOUS).terms[0].strength == strength


@pytest.mark.parametrize(
    "strengths", [[2.001], [-2.001], [1.5, 1.0], [1.5, -1.0]], ids=["over", "under", "twice", "cancelling"]
)
def test_strength_over_the_maximum(table: ProfileTable, strengths: list[float]) -> None:
    error = refusal(table, *({"name": "careful", "strength": strength} for strength in strengths))
    assert (error.code, error.status) == (ErrorCode.STRENGTH_INVALID, HTTPStatus.BAD_REQUEST)
    total = sum(map(abs, strengths))
    assert f"Strength {total:g} of profile 'careful' is over its maximum of 2." in str(error)


def test_the_maximum_counts_by_profile(table: ProfileTable) -> None:
    table.resolve([ProfileRef(name="careful", strength=2.0), ProfileRef(name="medical", strength=2.0)], ANONYMOUS)


def test_too_many_interventions_at_one_layer(table: ProfileTable) -> None:
    assert MAX_OPS == 8
    error = refusal(table, {"name": "careful"}, {"name": "wide"})
    assert error.code == ErrorCode.TOO_MANY
    assert "9 interventions at layer 3; at most 8 fit" in str(error)
    # What is off takes no room.
    table.resolve([ProfileRef(name="careful", strength=0.0), ProfileRef(name="wide")], ANONYMOUS)


@pytest.fixture
def versions(careful: Profile, make_profile: Callable[..., Profile]) -> ProfileTable:
    """A name whose current version allows less than the one before."""
    old = replace(careful, generation=3)
    new = make_profile("other")
    settings = replace(
        new.settings, maximum_strength=0.25, strength=0.25, allowed_keys=("team",), exclude=("reasoning",)
    )
    return ProfileTable({"careful": [Profile("careful", new.manifest, settings, 7), old]}, 7)


def test_an_older_version_under_the_bounds_of_the_current_one(versions: ProfileTable, careful: Profile) -> None:
    team = Identity("team", Role.INFERENCE)
    name = f"careful@{careful.settings.bundle}"
    term = versions.resolve([ProfileRef(name=name)], team).terms[0]
    assert term.profile.settings.bundle == careful.settings.bundle
    assert (term.profile.generation, term.strength) == (3, 0.25)
    assert term.profile.settings.exclude == ("reasoning",)
    assert refusal(versions, {"name": name, "strength": 0.5}, by=team).code == ErrorCode.STRENGTH_INVALID
    both = ({"name": name, "strength": 0.2}, {"name": "careful", "strength": -0.2})
    assert refusal(versions, *both, by=team).code == ErrorCode.STRENGTH_INVALID, "versions of one name add up"
    assert refusal(versions, {"name": name}).code == ErrorCode.PROFILE_FORBIDDEN


def test_keys_and_profiles(table: ProfileTable) -> None:
    limited = Identity("team", Role.INFERENCE, profiles=("med*",), maximum_strength=1.0)
    assert [profile.name for profile in table.usable_by(limited)] == ["medical"]
    assert table.resolve([ProfileRef(name="medical", strength=-1.0)], limited).terms[0].strength == -1.0
    for ref, code, status in (
        ({"name": "careful"}, ErrorCode.PROFILE_FORBIDDEN, HTTPStatus.FORBIDDEN),
        ({"name": "medical", "strength": 1.5}, ErrorCode.STRENGTH_INVALID, HTTPStatus.FORBIDDEN),
        ({"name": "mediacl"}, ErrorCode.PROFILE_NOT_FOUND, HTTPStatus.NOT_FOUND),
    ):
        error = refusal(table, ref, by=limited)
        assert (error.code, error.status) == (code, status)
    assert "wide" not in str(refusal(table, {"name": "wid"}, by=limited)), "what a key may not use is not named"

"""Names, and what they mean at admission."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import pytest

from artifacts.manifest import Scope
from server.engine.slots import MAX_OPS
from server.engine.steering import Term
from server.errors import ErrorCode, SteeringRequestError
from server.profiles import Profile, ProfileTable
from server.schema import ProfileRef


@pytest.fixture
def careful(make_profile: Callable[..., Profile]) -> Profile:
    return make_profile("careful", (3, 1, 3))


@pytest.fixture
def table(careful: Profile, make_profile: Callable[..., Profile]) -> ProfileTable:
    return ProfileTable([careful, make_profile("medical", scope=Scope.RESPONSE), make_profile("wide", (3, 3, 3))])


def refusal(table: ProfileTable, *refs: dict[str, Any]) -> SteeringRequestError:
    with pytest.raises(SteeringRequestError) as caught:
        table.resolve([ProfileRef(**ref) for ref in refs])
    return caught.value


def test_defaults_come_from_the_manifest(careful: Profile) -> None:
    assert (careful.name, careful.strength, careful.maximum_strength, careful.scope) == ("careful", 0.5, 2.0, "all")
    assert Profile.from_bundle(careful.bundle, "other").name == "other"


def test_writes_keep_the_listed_order(careful: Profile) -> None:
    assert {layer: [row[0].item() for row in rows] for layer, rows in careful.writes.items()} == {3: [1, 3], 1: [2]}
    assert careful.layers == [1, 3, 3]


def test_resolve(table: ProfileTable) -> None:
    refs = [ProfileRef(name="medical"), ProfileRef(name="careful", strength=-1.5, scope=Scope.PROMPT)]
    resolved = table.resolve(refs)
    digests = [term.profile.bundle.digest for term in resolved.terms]
    assert resolved.steering is not None
    assert resolved.steering.terms == (Term(digests[0], 0.5, "response"), Term(digests[1], -1.5, "prompt"))
    assert type(resolved.steering.terms[0].scope) is str, "the engine gets plain data"
    assert resolved.bundles == f"{digests[0]}, {digests[1]}"
    again = table.resolve(refs).steering
    assert again is not None and again.request_id != resolved.steering.request_id


def test_receipts(table: ProfileTable) -> None:
    refs = [ProfileRef(name="careful", strength=0.0), ProfileRef(name="medical"), ProfileRef(name="careful")]
    resolved = table.resolve(refs)
    assert resolved.steering is not None and len(resolved.steering.terms) == 2
    first, second, third = resolved.receipts([7, 9])
    assert [first.tokens_steered, second.tokens_steered, third.tokens_steered] == [0, 7, 9]
    assert first.to_json() == {
        "profile": "careful",
        "bundle": resolved.terms[0].profile.bundle.digest,
        "strength": 0.0,
        "scope": "all",
        "layers": [1, 3],
        "tokens_steered": 0,
    }


def test_all_strengths_zero_is_off(table: ProfileTable) -> None:
    resolved = table.resolve([ProfileRef(name="careful", strength=0.0), ProfileRef(name="medical", strength=-0.0)])
    assert resolved.steering is None
    assert [receipt.tokens_steered for receipt in resolved.receipts([])] == [0, 0]


def test_unknown_profile(table: ProfileTable) -> None:
    error = refusal(table, {"name": "carefull"})
    assert (error.code, error.status) == (ErrorCode.PROFILE_NOT_FOUND, HTTPStatus.NOT_FOUND)
    assert "'carefull' does not exist. Near names: careful, " in str(error)
    assert "Served: careful, medical, wide." in str(refusal(table, {"name": "zzz"}))
    assert "Served: none." in str(refusal(ProfileTable([]), {"name": "x"}))


@pytest.mark.parametrize("digits", [8, 20, 64])
def test_version(table: ProfileTable, careful: Profile, digits: int) -> None:
    prefix = careful.bundle.digest[: len("sha256:") + digits]
    assert table.resolve([ProfileRef(name=f"careful@{prefix}")]).terms[0].profile is careful


@pytest.mark.parametrize("version", ["", "sha256:", "sha256:{7}", "sha256:00000000", "{8}", "sha256:{8}x", "latest"])
def test_other_version(table: ProfileTable, careful: Profile, version: str) -> None:
    digits = careful.bundle.digest.removeprefix("sha256:")
    for count in ("7", "8"):
        version = version.replace(f"{{{count}}}", digits[: int(count)])
    error = refusal(table, {"name": f"careful@{version}"})
    assert (error.code, error.status) == (ErrorCode.PROFILE_NOT_FOUND, HTTPStatus.NOT_FOUND)
    assert f"no version '{version}'; it is {careful.bundle.digest}" in str(error)


@pytest.mark.parametrize("strength", [2.0, -2.0])
def test_strength_at_the_maximum(table: ProfileTable, strength: float) -> None:
    assert table.resolve([ProfileRef(name="careful", strength=strength)]).terms[0].strength == strength


@pytest.mark.parametrize(
    "strengths", [[2.001], [-2.001], [1.5, 1.0], [1.5, -1.0]], ids=["over", "under", "twice", "cancelling"]
)
def test_strength_over_the_maximum(table: ProfileTable, strengths: list[float]) -> None:
    error = refusal(table, *({"name": "careful", "strength": strength} for strength in strengths))
    assert (error.code, error.status) == (ErrorCode.STRENGTH_INVALID, HTTPStatus.BAD_REQUEST)
    total = sum(map(abs, strengths))
    assert f"Strength {total:g} of profile 'careful' is over its maximum of 2." in str(error)


def test_the_maximum_counts_by_profile(table: ProfileTable) -> None:
    table.resolve([ProfileRef(name="careful", strength=2.0), ProfileRef(name="medical", strength=2.0)])


def test_too_many_interventions_at_one_layer(table: ProfileTable) -> None:
    assert MAX_OPS == 4
    error = refusal(table, {"name": "careful"}, {"name": "wide"})
    assert error.code == ErrorCode.TOO_MANY
    assert "5 interventions at layer 3; at most 4 fit" in str(error)
    # What is off takes no room.
    table.resolve([ProfileRef(name="careful", strength=0.0), ProfileRef(name="wide")])


def test_two_profiles_of_one_name(careful: Profile) -> None:
    with pytest.raises(ValueError, match=r"Two bundles are named 'careful'; rename one with --steering-bundle"):
        ProfileTable([careful, careful])


def test_a_bundle_that_fits_no_slot_is_refused_at_start(make_profile: Callable[..., Profile]) -> None:
    with pytest.raises(ValueError, match="'wide' cannot be served: There are 5 interventions at layer 3; at most 4"):
        ProfileTable([make_profile("wide", (3,) * 5)])

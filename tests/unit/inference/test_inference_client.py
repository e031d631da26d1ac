"""What the commands ask a server for: models, one answer, counters."""

import json
from typing import Any

import pytest

from server.client import SteeringClientError
from server.inference import InferenceClient, ModelCard, Served, check_profile, choose, receipts

CARDS = [
    ModelCard(id="lab", root="/models/lab", max_model_len=512),
    ModelCard(id="alias", root="/models/lab", max_model_len=512),
    ModelCard(id="lora", parent="lab"),
    ModelCard(id="with@sign"),
    *(ModelCard(id=f"{model}@{name}", parent=model) for model in ("lab", "alias") for name in ("careful", "terse")),
]


def test_models_and_their_profiles() -> None:
    assert choose(CARDS, None) == Served("lab", "/models/lab", 512, ("careful", "terse"))
    assert choose(CARDS, "alias").profiles == ("careful", "terse")
    assert choose(CARDS, "lora") == Served("lora", None, None, ())
    assert choose(CARDS, "with@sign").model == "with@sign"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("other", r"no model 'other'; served: lab, alias, lora, with@sign\."),
        ("lab@careful", "has a profile in its name; name the profile by itself"),
        ("lab@nothing", "has a profile in its name"),
        ("", "no model ''"),
    ],
)
def test_models_that_there_are_not(model: str, words: str) -> None:
    with pytest.raises(SteeringClientError, match=words) as caught:
        choose(CARDS, model)
    assert caught.value.code == "bad_argument"


def test_no_models() -> None:
    with pytest.raises(SteeringClientError, match="served: none"):
        choose([], None)


def test_profiles_that_there_are_not() -> None:
    served = choose(CARDS, None)
    check_profile(served, "careful@sha256:0123456789abcdef")
    with pytest.raises(SteeringClientError, match="near names: careful") as caught:
        check_profile(served, "carefull")
    assert caught.value.code == "steering_profile_not_found"
    with pytest.raises(SteeringClientError, match=r"served: careful, terse\."):
        check_profile(served, "xyz")
    with pytest.raises(SteeringClientError, match=r"served: none\."):
        check_profile(choose(CARDS, "lora"), "xyz")


def test_answers_and_counters(fake: Any) -> None:
    with InferenceClient(fake.url, "secret") as client:
        assert client.served().profiles == ("careful",)
        answer = client.complete(model="lab@careful", prompt="Hello")
        (receipt,) = receipts(answer)
        assert (receipt.profile, receipt.strength) == ("careful", 0.5)
        assert receipts(client.complete(model="lab", prompt="Hello")) == ()
        counters = client.counters("steering_requests_total")
        assert counters == {(("outcome", "ok"), ("profile", "careful")): 1.0}
        assert client.counters("no_such_series_total") is None
    assert fake.keys == ["Bearer secret"] * 2


def test_counters_that_cannot_be_read(fake: Any) -> None:
    fake.counts = False
    with InferenceClient(fake.url) as client:
        assert client.counters("steering_requests_total") is None
    with InferenceClient("http://127.0.0.1:1") as client:
        assert client.counters("steering_requests_total") is None


@pytest.mark.parametrize("models", [b"<html>", b"[]", b'{"data": [{"id": 7}]}', b'{"data": "\xff"}'])
def test_a_list_of_models_that_is_none(fake: Any, models: bytes) -> None:
    fake.models = models
    with InferenceClient(fake.url) as client, pytest.raises(SteeringClientError, match="does not understand"):
        client.served()


def test_refusals_and_silence(fake: Any) -> None:
    error = {"message": "No such key.", "type": "AuthenticationError", "code": "invalid_api_key"}
    fake.refusal = 401, json.dumps({"error": error}).encode()
    with InferenceClient(fake.url) as client:
        with pytest.raises(SteeringClientError, match=r"^No such key\.$") as caught:
            client.served()
        assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
        fake.refusal = 200, b"[]"
        with pytest.raises(SteeringClientError, match="does not understand"):
            client.complete(model="lab", prompt="Hello")
    with InferenceClient("http://127.0.0.1:1") as client, pytest.raises(SteeringClientError, match="no answer") as late:
        client.served()
    assert late.value.code == "unreachable"


@pytest.mark.parametrize("found", ["yes", {"profile": "careful"}, [{"profile": 3}]])
def test_receipts_that_are_none(found: Any) -> None:
    with pytest.raises(SteeringClientError, match="not of this version"):
        receipts({"steering": found})

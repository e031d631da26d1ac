"""What a client can find out: models, profiles, OpenAPI schema. And the openai package as a client."""

import json
from typing import Any

import openai
import pytest

from artifacts.bundle import Bundle

pytestmark = pytest.mark.engine


def test_models_list_every_profile(eager: Any, bundles: dict[str, Bundle]) -> None:
    ids = [card["id"] for card in eager.client.get("/v1/models").json()["data"]]
    assert sorted(ids) == sorted(["lab", *(f"lab@{name}" for name in bundles)])


def test_profiles(eager: Any, bundles: dict[str, Bundle]) -> None:
    profiles = eager.client.get("/v1/steering/profiles").json()["profiles"]
    assert {profile["name"]: profile["bundle"] for profile in profiles} == {
        name: bundle.digest for name, bundle in bundles.items()
    }
    double = next(profile for profile in profiles if profile["name"] == "double")
    assert (double["layers"], double["maximum_strength"], double["scope"]) == ([1, 4], 4.0, "response")


def test_status(eager: Any, bundles: dict[str, Bundle]) -> None:
    (worker,) = eager.steering_status()
    assert worker["bundles"] == sorted(bundle.digest for bundle in bundles.values())
    assert worker["rows_used"] == sum(len(bundle.rows) for bundle in bundles.values())
    assert worker["layers"] == 6
    assert worker["slots_total"] > 40


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"])
def test_openapi(eager: Any, path: str) -> None:
    document = eager.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    operation = document["paths"][path]["post"]
    request = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    field = schemas[request]["properties"]["steering_profile"]
    assert "profile" in field["description"]
    assert "ProfileRef" in json.dumps(field)
    for name in ("name", "strength", "scope"):
        assert schemas["ProfileRef"]["properties"][name]["description"]
    response = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert schemas[response]["properties"]["steering"]["description"]
    for field in schemas["Receipt"]["properties"].values():
        assert field["description"]


def test_openapi_names_no_route_twice(eager: Any, plain: Any) -> None:
    ours, theirs = (server.client.get("/openapi.json").json()["paths"] for server in (eager, plain))
    admin = {
        "bundles",
        "bundles/{digest}",
        "bundles/{digest}/manifest",
        "bundles/{digest}/tensors",
        "root",
        "profiles",
        "profiles/{name}",
        "profiles/{name}/rollback",
        "status",
        "audit",
    }
    added = {*(f"/v1/steering/{path}" for path in admin), "/health/live", "/health/ready"}
    assert ours.keys() - theirs.keys() == added
    assert theirs.keys() <= ours.keys()


def test_openai_client(eager: Any, bundles: dict[str, Bundle]) -> None:
    with openai.OpenAI(base_url=f"{eager.url}/v1", api_key="none", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "What is 7 plus 5?"}]
        options: Any = {"messages": messages, "temperature": 0, "max_tokens": 16}
        by_field = client.chat.completions.create(model="lab", extra_body={"steering_profile": "careful"}, **options)
        by_name = client.chat.completions.create(model="lab@careful", **options)
        assert by_field.choices[0].message.content == by_name.choices[0].message.content
        assert by_name.to_dict()["steering"]["bundle"] == bundles["careful"].digest
        with pytest.raises(openai.NotFoundError) as refusal:
            client.chat.completions.create(model="lab", extra_body={"steering_profile": "carefull"}, **options)
        assert refusal.value.code == "steering_profile_not_found"

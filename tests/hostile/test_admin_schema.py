"""What the server's own OpenAPI document promises, held against the server by schemathesis: no 5xx, no other answer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.admin_schema import ProfileSpec, Refusal

pytestmark = pytest.mark.engine

ADMIN_ROOT = "/v1/steering/"
ADMIN = [
    *(("POST", "/v1/steering/bundles"), ("GET", "/v1/steering/bundles")),
    *(("GET", "/v1/steering/bundles/{digest}"), ("DELETE", "/v1/steering/bundles/{digest}")),
    *(("GET", "/v1/steering/bundles/{digest}/manifest"), ("GET", "/v1/steering/bundles/{digest}/tensors")),
    ("GET", "/v1/steering/root"),
    *(("GET", "/v1/steering/profiles"), ("GET", "/v1/steering/profiles/{name}")),
    *(("PUT", "/v1/steering/profiles/{name}"), ("DELETE", "/v1/steering/profiles/{name}")),
    *(("POST", "/v1/steering/profiles/{name}/rollback"), ("GET", "/v1/steering/status"), ("GET", "/v1/steering/audit")),
]
# A valid request of each steered route, into which the examples put fields of their own.
STEERED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "What is 7 plus 5?"}]},
    "/v1/completions": {"prompt": "What is 7 plus 5?"},
}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
NUM_EXAMPLES = 20
MAX_FIELDS, MAX_TOKENS, MAX_CHOICES = 3, 2, 2
NAME = "schema"
UPLOAD_TYPE = "application/octet-stream"
TIMEOUT_S = 60


@dataclass(frozen=True)
class Api:
    """The document of a running server, and what its examples may name besides what they make up.

    Attributes:
        url: of the server.
        document: as schemathesis reads it.
        session: with the admin key.
        bundle: file of a bundle that no profile names.
        spare: its digest.
        used: digest of the bundle that the profile NAME means.
        restore: makes sure that bundles and profile are there, and the profile has a version before.
    """

    url: str
    document: Any
    session: requests.Session
    bundle: Path
    spare: str
    used: str
    restore: Callable[[], None]

    def run(self, method: str, path: str, mode: GenerationMode, amend: Callable[[Any, Random], None]) -> set[int]:
        """Send examples of an operation, half of them amended, check every answer, and return the statuses."""
        operation, statuses = self.document[path][method], set()

        @seed(0)
        @settings(max_examples=NUM_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(
            case=operation.as_strategy(generation_mode=mode),
            is_amended=st.booleans(),
            random=st.randoms(use_true_random=False),
        )
        def send(case: Any, is_amended: bool, random: Random) -> None:
            if is_amended:
                amend(case, random)
            if isinstance(case.body, dict) and path in STEERED:
                _keep_short(case.body)
            response = case.call(base_url=self.url, session=self.session, timeout=TIMEOUT_S)
            statuses.add(response.status_code)
            case.validate_response(response, checks=CHECKS)

        send()
        return statuses


@pytest.fixture(scope="module")
def api(operated: Any, make_bundle: Callable[..., Path]) -> Iterator[Api]:
    """The document of a running server, which is left as it was."""
    server, admin = operated.server, operated.admin
    used_file, spare_file = make_bundle(NAME, [1, 4], 7), make_bundle("spare", [2], 8)
    used, spare = (admin.upload(path, dry_run=True).digest for path in (used_file, spare_file))

    def restore() -> None:
        for path in (used_file, spare_file):
            admin.upload(path)
        for strength in (0.5, 1.0):
            admin.put_profile(NAME, ProfileSpec(bundle=used, strength=strength))

    document = schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())
    with requests.Session() as session:
        # A request must not meet a proxy of the machine it runs on.
        session.trust_env = False
        session.headers["authorization"] = server.client.headers["authorization"]
        yield Api(server.url, document, session, spare_file, spare, used, restore)
    for profile in admin.profiles():
        admin.delete_profile(profile.name)
    for bundle in admin.bundles():
        admin.delete_bundle(bundle.digest)


# These take nothing that could be wrong.
CASES = [(*operation, mode) for operation in ADMIN for mode in MODES]
for _path in ("/v1/steering/status", "/v1/steering/root"):
    CASES.remove(("GET", _path, GenerationMode.NEGATIVE))


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_admin(api: Api, method: str, path: str, mode: GenerationMode) -> None:
    api.restore()

    def amend(case: Any, _: Random) -> None:
        """Speak of what is there."""
        case.headers.clear()
        if "name" in case.path_parameters:
            case.path_parameters["name"] = NAME
        if "digest" in case.path_parameters:
            case.path_parameters["digest"] = api.spare
        if mode is GenerationMode.POSITIVE and method == "PUT":
            case.body = {"bundle": api.used, "description": case.body.get("description")}
        elif mode is GenerationMode.POSITIVE and case.media_type == UPLOAD_TYPE:
            case.body = api.bundle.read_bytes()

    statuses = api.run(method, path, mode, amend)
    if mode is GenerationMode.POSITIVE:
        assert min(statuses) < 300, f"no example did what the route is for: {statuses}"
    else:
        assert max(statuses) >= 400, f"no example was refused: {statuses}"


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", STEERED)
def test_steered(api: Api, path: str, mode: GenerationMode) -> None:
    api.restore()

    def amend(case: Any, random: Random) -> None:
        """A valid request with some of the fields that were made up."""
        fields = case.body if isinstance(case.body, dict) else {}
        kept = random.sample(sorted(fields), min(len(fields), random.randint(0, MAX_FIELDS)))
        made_up = {key: fields[key] for key in kept if key not in STEERED[path]}
        case.body = {**STEERED[path], "model": "lab", "steering_profile": NAME, **made_up}

    statuses = api.run("POST", path, mode, amend)
    assert 200 in statuses and max(statuses) >= 400, f"too much alike: {statuses}"


def test_no_admin_operation_is_left_out(api: Api) -> None:
    documented = {
        (method.upper(), path) for path in api.document if path.startswith(ADMIN_ROOT) for method in api.document[path]
    }
    assert documented == set(ADMIN)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("POST", path, 400) for path in (*STEERED, "/tokenize")),
        ("GET", "/nowhere", 404),
        ("PATCH", "/v1/steering/profiles", 405),
    ],
)
def test_refusals_of_the_framework_have_the_same_form(operated: Any, method: str, path: str, status: int) -> None:
    headers = {"content-type": "application/json"}
    # Not UTF-8.
    answer = operated.server.client.request(method, path, content=b"\xb8\xe9t", headers=headers)
    assert answer.status_code == status
    error = Refusal.model_validate_json(answer.content).error
    assert error.message and error.code == status
    assert ("allow" in answer.headers) == (status == 405)


def _keep_short(body: dict[str, Any]) -> None:
    """What is asked for is answered on two cores."""
    for field in ("max_tokens", "max_completion_tokens"):
        body[field] = MAX_TOKENS
    if isinstance(body.get("n"), int):
        body["n"] = min(body["n"], MAX_CHOICES)

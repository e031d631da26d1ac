"""Profiles that change while they are used: every request gets one version, whole, and nothing is left behind."""

import json
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import wait_until

from artifacts.bundle import Bundle
from server.admin_schema import ProfileSpec
from server.client import SteeringClientError

pytestmark = pytest.mark.engine

SWAPS = Path(__file__).parents[1] / "bench" / "swaps.py"
NUM_SWAPS, NUM_STREAMS, SWAPS_TIMEOUT_S = 60, 24, 400
PROMPT = "The baker came home early and"
# Many times as long as the changes that happen meanwhile.
LONG = 1600
SETTLE_S = 90.0
# Absolute, on log-probabilities in fp32: other batch shapes add in another order.
TOLERANCE = 3e-4
VOCAB_SIZE = 640


def resident(site: Any) -> set[str]:
    """Programs that every worker holds."""
    return set.intersection(*(set(worker.bundles) for worker in site.admin.status().workers))


@pytest.fixture
def site(operated: Any) -> Iterator[Any]:
    """The server without profiles and bundles, before and after."""
    yield operated
    for profile in operated.admin.profiles():
        operated.admin.delete_profile(profile.name)
    for bundle in operated.admin.bundles():
        operated.admin.delete_bundle(bundle.digest, drain=True)

    def is_empty() -> bool:
        workers = operated.admin.status().workers
        return not any(each.rows_used or each.slots_used or each.requests or each.bundles for each in workers)

    wait_until(is_empty, f"rows, slots or requests are left: {operated.admin.status().workers}")


@pytest.fixture
def digests(site: Any, bundle_files: dict[str, Path]) -> dict[str, str]:
    """Digests of bundles that were uploaded, by name."""
    return {name: site.admin.upload(bundle_files[name]).digest for name in ("early", "late", "every")}


@pytest.fixture(scope="module")
def long_answer(operated: Any, bundle_files: dict[str, Path]) -> str:
    """What a long stream says that one bundle, `early`, steers from its beginning to its end."""
    digest = operated.admin.upload(bundle_files["early"]).digest
    put(operated, "long", digest)
    text, _ = ask(operated, "long", max_tokens=LONG, ignore_eos=True)
    operated.admin.delete_profile("long")
    operated.admin.delete_bundle(digest)
    return text


def put(site: Any, name: str, digest: str, **fields: Any) -> Any:
    answer = site.admin.put_profile(name, ProfileSpec(bundle=digest, **fields))
    assert answer.observed
    return answer


def refused(call: Callable[[], Any]) -> tuple[int | None, str]:
    """Status and code with which a call is refused."""
    with pytest.raises(SteeringClientError) as error:
        call()
    return error.value.status, error.value.code


def ask(site: Any, profile: Any, prompt: Any = PROMPT, **fields: Any) -> tuple[str, dict[str, Any]]:
    """Text and receipt."""
    answer = site.server.complete(prompt, **{"max_tokens": 12, "steering_profile": profile, **fields})
    return answer["choices"][0]["text"], answer["steering"]


def ask_refused(site: Any, profile: Any) -> tuple[int, str]:
    response = site.server.post("/v1/completions", {"model": "lab", "prompt": PROMPT, "steering_profile": profile})
    return response.status_code, response.json()["error"]["code"]


class Stream:
    """A long greedy answer that is read in a thread of its own; it has begun when this exists."""

    def __init__(self, site: Any, profile: str) -> None:
        self._site = site
        self._chunks: list[dict[str, Any]] = []
        self._begun = threading.Event()
        self._body = {"model": "lab", "prompt": PROMPT, "temperature": 0, "max_tokens": LONG, "ignore_eos": True}
        self._body |= {"steering_profile": profile, "stream": True, "stream_options": {"include_usage": True}}
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self._begun.wait(SETTLE_S)

    def _read(self) -> None:
        with self._site.server.client.stream("POST", "/v1/completions", json=self._body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self._chunks.append(json.loads(line.removeprefix("data: ")))
                    self._begun.set()

    @property
    def is_running(self) -> bool:
        """Whether the engine still works on it."""
        return bool(self._chunks[-1]["choices"]) and self._chunks[-1]["choices"][0]["finish_reason"] is None

    def result(self) -> tuple[str, dict[str, Any]]:
        """Text and receipt at its end."""
        self._thread.join()
        usage, receipt = self._chunks[-1]["usage"], self._chunks[-1]["steering"]
        assert usage["completion_tokens"] == LONG
        assert receipt["tokens_steered"] == usage["total_tokens"] - 1
        return "".join(each["text"] for chunk in self._chunks for each in chunk["choices"]), receipt


def test_swaps_under_streams(site: Any, tmp_path: Path) -> None:
    key = site.server.client.headers["authorization"].removeprefix("Bearer ")
    command = [sys.executable, str(SWAPS), "--server", site.server.url, "--key", key]
    command += ["--swaps", str(NUM_SWAPS), "--streams", str(NUM_STREAMS), "--max-tokens", "24"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "figures.json")],
        capture_output=True,
        text=True,
        timeout=SWAPS_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["swaps"] == NUM_SWAPS
    assert [figures[name] for name in ("failed", "mixed", "miscounted", "stale")] == [0, 0, 0, 0]
    assert figures["answers_across_a_swap"] > 0
    assert min(figures["answers_by_bundle"]) > 0


@pytest.mark.parametrize("change", ["put", "rollback", "delete"])
def test_a_running_request_keeps_its_version(site: Any, long_answer: str, digests: dict[str, str], change: str) -> None:
    put(site, "running", digests["late"])
    put(site, "running", digests["early"])
    stream = Stream(site, "running")
    if change == "put":
        put(site, "running", digests["late"])
    elif change == "rollback":
        assert site.admin.rollback("running").bundle == digests["late"]
    else:
        site.admin.delete_profile("running")
        assert ask_refused(site, "running") == (404, "steering_profile_not_found")
    if change != "delete":
        assert ask(site, "running")[1]["bundle"] == digests["late"]
    assert stream.is_running
    # Of a deleted profile nothing is wanted any more, but for this request.
    assert digests["early"] in resident(site)
    text, receipt = stream.result()
    assert (receipt["bundle"], text) == (digests["early"], long_answer)
    if change == "delete":
        wait_until(lambda: not {digests["early"], digests["late"]} & resident(site), "unused bundles stay loaded")


def test_a_bundle_is_removed_when_nothing_uses_it(site: Any, long_answer: str, digests: dict[str, str]) -> None:
    digest = digests["early"]
    put(site, "used", digest)
    assert refused(lambda: site.admin.delete_bundle(digest)) == (409, "steering_bundle_in_use")
    stream = Stream(site, "used")
    site.admin.delete_profile("used")
    drained = refused(lambda: site.admin.delete_bundle(digest, drain=True, timeout_s=0.2))
    assert drained == (409, "steering_bundle_in_use")
    assert stream.is_running
    # Nothing has changed: it can be used again, while the stream runs.
    assert not site.admin.bundle(digest).is_draining
    put(site, "again", digest)
    assert ask(site, "again")[1]["bundle"] == digest
    site.admin.delete_profile("again")
    assert stream.is_running
    site.admin.delete_bundle(digest, drain=True, timeout_s=SETTLE_S)
    assert not stream.is_running
    assert stream.result()[0] == long_answer
    assert refused(lambda: site.admin.bundle(digest)) == (404, "steering_bundle_not_found")
    assert digest not in resident(site)
    assert not (site.registry / "bundles" / f"{digest.removeprefix('sha256:')}.safetensors").exists()


def test_a_profile_is_deleted_when_its_requests_have_ended(site: Any, digests: dict[str, str]) -> None:
    put(site, "drained", digests["early"])
    stream = Stream(site, "drained")
    site.admin.delete_profile("drained", drain=True, timeout_s=SETTLE_S)
    assert not stream.is_running
    assert stream.result()[1]["bundle"] == digests["early"]
    assert digests["early"] not in resident(site)


def test_older_versions_by_digest(site: Any, digests: dict[str, str]) -> None:
    early, late = digests["early"], digests["late"]
    put(site, "pinned", early, maximum_strength=3.0)
    first = ask(site, {"name": "pinned", "strength": 2.0})
    put(site, "pinned", late, maximum_strength=2.0)
    assert ask(site, "pinned")[1]["bundle"] == late
    for pinned in (early, early[: len("sha256:") + 8]):
        text, receipt = ask(site, {"name": f"pinned@{pinned}", "strength": 2.0})
        assert (receipt["bundle"], text) == (early, first[0])
    # An older version is no way around the present bound.
    too_strong = {"name": f"pinned@{early}", "strength": 3.0}
    assert ask_refused(site, too_strong) == (400, "steering_strength_invalid")
    put(site, "pinned", late, allowed_keys=("somebody",))
    assert ask_refused(site, f"pinned@{early}") == (403, "steering_profile_forbidden")
    assert ask_refused(site, f"pinned@sha256:{'0' * 64}") == (403, "steering_profile_forbidden")
    # Two versions before the current one are kept; this is the third.
    put(site, "pinned", digests["every"])
    assert ask_refused(site, f"pinned@{early}") == (404, "steering_profile_not_found")
    assert ask(site, f"pinned@{late}")[1]["bundle"] == late


def test_freed_rows_are_used_again(
    site: Any, bundle_files: dict[str, Path], bundles: dict[str, Bundle], read_answer: Any, reference: Any
) -> None:
    def rows_used() -> int:
        return int(site.admin.status().workers[0].rows_used)

    rows = {name: sum(len(row.reshape(-1, 128)) for row in bundles[name].rows.values()) for name in ("early", "late")}
    for name in ("early", "late", "early"):
        digest = site.admin.upload(bundle_files[name]).digest
        put(site, "rows", digest)
        assert rows_used() == rows[name]
        check_against(reference, site, name, read_answer)
        site.admin.delete_profile("rows")
        site.admin.delete_bundle(digest)
        assert rows_used() == 0


def check_against(reference: Any, site: Any, bundle: str, read_answer: Any, profile: str = "rows") -> None:
    prompt = [int(token) for token in site.server.complete(PROMPT, max_tokens=1)["choices"][0]["prompt_token_ids"]]
    body = {"max_tokens": 8, "logprobs": VOCAB_SIZE, "return_tokens_as_token_ids": True, "ignore_eos": True}
    answer = site.server.complete(prompt, **body, steering_profile=profile)
    found = read_answer(answer["choices"][0])
    tokens = [*prompt, *found.tokens[:-1]]
    terms = [{"name": bundle, "strength": answer["steering"]["strength"], "scope": "all"}]
    expected = reference.logprobs(tokens, len(prompt), terms)[len(prompt) - 1 :]
    served = torch.tensor([[row[token] for token in range(VOCAB_SIZE)] for row in found.logprobs])
    assert (served - expected).abs().max() < TOLERANCE
    plain = reference.logprobs(tokens, len(prompt), [])[len(prompt) - 1 :]
    assert (expected - plain).abs().max() > 20 * TOLERANCE


def test_a_subset_of_the_layers(
    site: Any, digests: dict[str, str], bundles: dict[str, Bundle], read_answer: Any, make_reference: Any
) -> None:
    every = bundles["every"]
    kept = tuple(step for step in every.manifest.interventions if step.layer in (1, 4))
    subset = replace(every, manifest=every.manifest.model_copy(update={"interventions": kept}))
    put(site, "subset", digests["every"], layers=(4, 1))
    assert ask(site, "subset")[1]["layers"] == [1, 4]
    assert f"{digests['every']}+1,4" in resident(site)
    check_against(make_reference({"subset": subset}), site, "subset", read_answer, "subset")
    unknown = refused(lambda: put(site, "subset", digests["early"], layers=(1, 4)))
    assert unknown == (400, "steering_request_invalid")


def test_what_an_operator_may_bound(site: Any, digests: dict[str, str]) -> None:
    put(site, "bounded", digests["early"], strength=0.5, maximum_strength=0.75, scope="generation")
    _, receipt = ask(site, "bounded")
    assert (receipt["strength"], receipt["scope"], receipt["tokens_steered"]) == (0.5, "generation", 11)
    assert ask_refused(site, {"name": "bounded", "strength": -0.8}) == (400, "steering_strength_invalid")
    put(site, "bounded", digests["early"], allowed_keys=("somebody",))
    assert ask_refused(site, "bounded") == (403, "steering_profile_forbidden")
    assert ask_refused(site, {"name": "bounded", "strength": 0}) == (403, "steering_profile_forbidden")
    put(site, "bounded", digests["early"], allowed_keys=("somebody", "admin"))
    assert ask(site, "bounded")[1]["bundle"] == digests["early"]
    constraint = {"structured_outputs": {"regex": "[0-9]{6}"}}
    generation = {"name": "bounded", "scope": "generation"}
    assert ask(site, generation, **constraint)[1]["tokens_steered"] > 0
    put(site, "bounded", digests["early"], exclude=("structured_output",))
    assert ask(site, generation, **constraint)[1]["tokens_steered"] == 0
    assert ask(site, generation)[1]["tokens_steered"] == 11
    # This server was not told which tokens open and close them.
    unknown = refused(lambda: put(site, "bounded", digests["early"], exclude=("reasoning",)))
    assert unknown == (409, "steering_unsupported")


def test_a_dry_run_changes_nothing(site: Any, bundle_files: dict[str, Path], digests: dict[str, str]) -> None:
    put(site, "kept", digests["early"])
    before, text = site.admin.status(), ask(site, "kept")
    uploaded = site.admin.upload(bundle_files["double"], dry_run=True)
    assert (uploaded.dry_run, uploaded.created, uploaded.is_resident) == (True, True, False)
    assert uploaded.checks
    spec = ProfileSpec(bundle=digests["late"], strength=-1.0)
    changed = site.admin.put_profile("kept", spec, dry_run=True)
    assert (changed.dry_run, changed.changed, changed.bundle) == (True, True, digests["late"])
    site.admin.put_profile("never", spec, dry_run=True)
    after = site.admin.status()
    assert after.generation_desired == before.generation_desired
    assert after.workers[0].bundles == before.workers[0].bundles
    assert {bundle.digest for bundle in site.admin.bundles()} == set(digests.values())
    assert [profile.name for profile in site.admin.profiles()] == ["kept"]
    assert ask(site, "kept") == text
    assert not list((site.registry / "incoming").iterdir())


def test_entity_tags(site: Any, digests: dict[str, str]) -> None:
    path, client = "/v1/steering/profiles/tagged", site.server.client

    def change(bundle: str, **headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return client.put(path, json={"bundle": digests[bundle]}, headers=named)

    assert change("early", if_match="*").status_code == 412
    first = change("early", if_none_match="*")
    assert first.status_code == 201
    tag = first.headers["etag"]
    assert client.get(path).headers["etag"] == tag
    assert change("late", if_none_match="*").status_code == 412
    stale = f'"{int(tag.strip(chr(34))) - 1}"'
    for refusal in (change("late", if_match=stale), client.delete(path, headers={"if-match": stale})):
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (412, "steering_precondition_failed")
    second = change("late", if_match=tag)
    assert second.status_code == 200
    assert second.headers["etag"] != tag
    # What is there already needs no version of its own.
    again = change("late")
    assert (again.status_code, again.json()["changed"], again.headers["etag"]) == (200, False, second.headers["etag"])
    roll_back = client.post(f"{path}/rollback", headers={"if-match": tag})
    assert roll_back.status_code == 412
    assert client.delete(path, headers={"if-match": second.headers["etag"]}).status_code == 204
    assert client.delete(path).status_code == 404


def test_a_chain_of_rollbacks(site: Any, digests: dict[str, str]) -> None:
    answers = {}
    for name in ("early", "late", "every"):
        put(site, "chain", digests[name])
        answers[name] = ask(site, "chain")[0]
    generations = {version.settings.bundle: version.generation for version in site.admin.profile("chain").history}
    for name in ("late", "early"):
        back = site.admin.rollback("chain")
        assert back.bundle == digests[name]
        text, receipt = ask(site, "chain")
        assert (text, receipt["bundle"]) == (answers[name], digests[name])
    assert refused(lambda: site.admin.rollback("chain")) == (404, "steering_profile_not_found")
    newest = site.admin.rollback("chain", to=generations[digests["every"]])
    assert ask(site, "chain")[0] == answers["every"]
    history = site.admin.profile("chain").history
    assert [version.action for version in history] == ["rollback"] * 3 + ["put"] * 3
    assert history[0].restored_from == generations[digests["every"]]
    assert history[0].generation == newest.generation
    # A deleted profile comes back by a rollback too.
    site.admin.delete_profile("chain")
    assert site.admin.rollback("chain").bundle == digests["every"]
    assert ask(site, "chain")[0] == answers["every"]


def test_files_of_the_store_are_read_only_once(
    site: Any, digests: dict[str, str], bundle_files: dict[str, Path], text_tokens: list[int]
) -> None:
    put(site, "stored", digests["early"])
    prompts = [text_tokens[start : start + 40] for start in (0, 40)]
    before = [ask(site, "stored", prompt)[0] for prompt in prompts]
    stored = {
        name: site.registry / "bundles" / f"{digest[len('sha256:') :]}.safetensors" for name, digest in digests.items()
    }
    content = stored["early"].read_bytes()
    other = stored["early"].with_suffix(".new")
    other.write_bytes(bundle_files["late"].read_bytes())
    other.replace(stored["early"])
    assert ask(site, "stored", prompts[0])[0] == before[0]
    stored["early"].unlink()
    assert [ask(site, "stored", prompt)[0] for prompt in prompts] == before
    # The bundle still serves as another profile, and after a swap to and fro, without its file.
    put(site, "stored", digests["late"])
    put(site, "stored", digests["early"])
    put(site, "second", digests["early"])
    assert ask(site, "second", prompts[1])[0] == before[1]
    # What needs the file is refused, and changes nothing.
    status, _ = refused(lambda: put(site, "second", digests["early"], layers=(0,)))
    assert status is not None and 400 <= status < 500
    assert ask(site, "second", prompts[1])[0] == before[1]
    stored["early"].write_bytes(content)


def test_receipts_and_metrics_agree(site: Any, digests: dict[str, str], text_tokens: list[int]) -> None:
    put(site, "counted", digests["early"])
    put(site, "left", digests["late"])
    checked = site.server.metric("steering_receipt_tokens_checked_total")
    choices = random.Random(0)

    def send(index: int) -> int:
        body: dict[str, Any] = {"prompt": text_tokens[index : index + 30], "max_tokens": 20, "ignore_eos": True}
        kind = index % 5
        if kind == 1:
            body |= {"n": 2, "temperature": 1.0, "seed": index}
        elif kind == 2:
            body |= {"stop": ["e"], "max_tokens": 60}
        elif kind == 3:
            body |= {"prompt": [text_tokens[:20], text_tokens[index : index + 50]]}
        profile: Any = {"name": "counted", "strength": choices.choice([0.5, 1.0])}
        if kind == 4:
            body |= {"model": "lab", "temperature": 0, "steering_profile": profile}
            return int(site.server.stream("/v1/completions", body)[-1]["steering"]["tokens_steered"])
        return int(site.server.complete(**body, steering_profile=profile)["steering"]["tokens_steered"])

    def leave(index: int) -> None:
        body = {"model": "lab", "prompt": PROMPT, "max_tokens": 300, "ignore_eos": True, "stream": True}
        with site.server.client.stream("POST", "/v1/completions", json=body | {"steering_profile": "left"}) as response:
            assert response.status_code == 200
            next(response.iter_lines())

    receipts = site.server.map(lambda index: leave(index) if index % 6 == 5 else send(index), range(42))
    claimed = sum(tokens for tokens in receipts if tokens is not None)

    def total(series: str) -> float:
        text = site.server.client.get("/metrics").text
        found = re.findall(rf'^{series}{{[^}}]*profile="counted"[^}}]*}} (\S+)$', text, re.MULTILINE)
        return sum(map(float, found))

    assert total("steering_tokens_total") == claimed
    assert total("steering_requests_total") == sum(tokens is not None for tokens in receipts)
    wait_until(lambda: site.server.metric("steering_active_requests") == 0, "requests are still active")
    wait_until(
        lambda: site.server.metric("steering_receipt_tokens_checked_total") - checked > claimed / 3,
        "receipts are not checked",
    )
    assert site.server.metric("steering_receipt_discrepancy_tokens") == 0
    assert site.server.metric("steering_receipt_mismatches_total") == 0

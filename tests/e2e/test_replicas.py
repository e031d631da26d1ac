"""Several API processes, replicas and servers on one registry: what one of them acknowledges, all of them serve."""

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from waiting import wait_until

from server.admin_schema import ProfileSpec
from server.client import SteeringClient, SteeringClientError
from server.registry.registry import Registry

pytestmark = pytest.mark.engine

NUM_REPLICAS, NUM_PROCESSES = 2, 2
# Each has a connection of its own; every process has as many of them.
NUM_CLIENTS = 12
NUM_CHANGES = 16
# Room for the four bundles that the tests use, and little more.
ROWS = 16
PROMPT = "The baker came home early and"
# Absolute, on log-probabilities in fp32: other requests in the batch change the order of additions.
TOLERANCE = 2e-4


class State(NamedTuple):
    """What a server left in its registry when it ended.

    Attributes:
        registry: its folder.
        generation: of the last change.
        history: of the profile `kept`, as its API showed it.
        answer: of the profile.
    """

    registry: Path
    generation: int
    history: list[dict[str, Any]]
    answer: dict[str, Any]


class Replicated(NamedTuple):
    """A server of several processes, and connections to them."""

    site: Any
    clients: list[httpx.Client]

    def everywhere(self, send: Callable[[httpx.Client], Any]) -> list[Any]:
        """Do the same over every connection at the same time."""
        results: list[Any] = self.site.server.map(send, self.clients, NUM_CLIENTS)
        return results


def ask(client: httpx.Client, profile: Any, prompt: str = PROMPT, max_tokens: int = 8, **fields: Any) -> httpx.Response:
    body = {"model": "lab", "prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    return client.post("/v1/completions", json=body | {"steering_profile": profile} | fields)


def answer_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    body = response.json()
    return {"text": body["choices"][0]["text"], "steering": body["steering"]}


def history_of(admin: SteeringClient, name: str) -> list[dict[str, Any]]:
    return [version.model_dump(mode="json") for version in admin.profile(name).history]


def put(site: Any, name: str, digest: str, **fields: Any) -> Any:
    answer = site.admin.put_profile(name, ProfileSpec(bundle=digest, **fields))
    assert answer.observed
    return answer


def requests_by_member(registry: Path, profile: str) -> dict[str, int]:
    """Requests for a profile that each live API process has answered so far, as it tells the others."""
    opened = Registry.open(registry)
    try:
        rows = opened.members.list()
    finally:
        opened.close()
    counters = {row.member: json.loads(row.counters or "{}").get("profiles", {}) for row in rows}
    return {
        member: sum(of_member.get(profile, {}).get("requests", {}).values()) for member, of_member in counters.items()
    }


@pytest.fixture(scope="module")
def state(start_operated: Callable[..., Any], bundle_files: dict[str, Path]) -> State:
    """A server of one process makes changes, and ends."""
    with start_operated("before") as site:
        early, late = (site.admin.upload(bundle_files[name]).digest for name in ("early", "late"))
        put(site, "kept", early, strength=0.5, description="first")
        put(site, "kept", late)
        put(site, "gone", late)
        site.admin.rollback("kept")
        site.admin.delete_profile("gone")
        answer = answer_of(ask(site.server.client, "kept"))
        generation = site.admin.status().generation_desired
        return State(site.registry, generation, history_of(site.admin, "kept"), answer)


def connect(site: Any, stack: ExitStack, number: int) -> list[httpx.Client]:
    """Open connections, as many to each of the server's processes: all but one stand still while it accepts its own."""
    pids = [member.pid for member in site.admin.status().members]
    clients = []
    for pid in pids:
        others = [other for other in pids if other != pid]
        for other in others:
            os.kill(other, signal.SIGSTOP)
        try:
            for _ in range(number // len(pids)):
                client = httpx.Client(
                    base_url=site.server.url, headers=site.server.client.headers, timeout=120, trust_env=False
                )
                clients.append(stack.enter_context(client))
                assert client.get("/health/live").status_code == 200
        finally:
            for other in others:
                os.kill(other, signal.SIGCONT)
    return clients


@pytest.fixture(scope="module")
def replicated(start_operated: Callable[..., Any], state: State) -> Iterator[Replicated]:
    """Two API processes and two replicas, on the registry of a server that has ended."""
    flags = ["--data-parallel-size", str(NUM_REPLICAS), "--api-server-count", str(NUM_PROCESSES)]
    flags += ["--steering-rows", str(ROWS), "--steering-keep-versions", "1"]
    # Otherwise a connection that rests is closed, and the next one may be another process's.
    keep_alive = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"}
    with start_operated("replicated", *flags, registry=state.registry, **keep_alive) as site, ExitStack() as stack:
        yield Replicated(site, connect(site, stack, NUM_CLIENTS))


def test_a_restart_changes_nothing(replicated: Replicated, state: State) -> None:
    status = replicated.site.admin.status()
    assert status.is_ready
    assert (status.generation_desired, status.generation_observed) == (state.generation, state.generation)
    assert history_of(replicated.site.admin, "kept") == state.history
    assert [profile.name for profile in replicated.site.admin.profiles()] == ["kept"]
    answers = replicated.everywhere(lambda client: answer_of(ask(client, "kept")))
    assert answers == [state.answer] * NUM_CLIENTS


def test_status_lists_everyone(replicated: Replicated) -> None:
    for status in replicated.everywhere(lambda client: client.get("/v1/steering/status").json()):
        assert len({member["pid"] for member in status["members"]}) == NUM_PROCESSES
        assert {member["state"] for member in status["members"]} == {"ready"}
        assert len({member["instance"] for member in status["members"]}) == 1
        assert [(worker["replica"], worker["rank"]) for worker in status["workers"]] == [(0, 0), (1, 0)]
        assert status["workers"][0]["bundles"] == status["workers"][1]["bundles"]


def test_no_process_answers_with_the_state_before(
    replicated: Replicated, state: State, bundle_files: dict[str, Path]
) -> None:
    site = replicated.site
    digests = [site.admin.upload(bundle_files[name]).digest for name in ("early", "late")]
    put(site, "moved", digests[1])
    for index in range(NUM_CHANGES):
        if index % 4 == 3:
            assert site.admin.rollback("moved").observed
        else:
            put(site, "moved", digests[index % 2])
        receipts = replicated.everywhere(lambda client: answer_of(ask(client, "moved", max_tokens=2))["steering"])
        assert {receipt["bundle"] for receipt in receipts} == {digests[index % 2]}
        shown = replicated.everywhere(lambda client: client.get("/v1/steering/profiles/moved").json()["bundle"])
        assert set(shown) == {digests[index % 2]}
    asked = NUM_CHANGES * NUM_CLIENTS
    wait_until(
        lambda: sum(requests_by_member(state.registry, "moved").values()) == asked,
        "the processes do not tell of all requests",
    )
    # Otherwise this test has seen one process only.
    assert set(requests_by_member(state.registry, "moved").values()) == {asked // NUM_PROCESSES}
    site.admin.delete_profile("moved")
    refusals = replicated.everywhere(lambda client: ask(client, "moved").json()["error"]["code"])
    assert set(refusals) == {"steering_profile_not_found"}


def test_replicas_steer_alike(
    replicated: Replicated,
    bundle_files: dict[str, Path],
    read_answer: Callable[..., Any],
    difference: Callable[..., float],
) -> None:
    site = replicated.site
    put(site, "alike", site.admin.upload(bundle_files["early"]).digest)
    fields = {"model": "lab", "prompt": PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 5}
    fields |= {"return_token_ids": True, "return_tokens_as_token_ids": True}

    def ask_replica(replica: int, profile: str | None) -> Any:
        body = fields | ({} if profile is None else {"steering_profile": profile})
        headers = {"x-data-parallel-rank": str(replica)}
        response = site.server.client.post("/v1/completions", json=body, headers=headers)
        assert response.status_code == 200, response.text
        return read_answer(response.json()["choices"][0])

    queries = queries_by_replica(site)
    steered = [ask_replica(replica, "alike") for replica in range(NUM_REPLICAS)]
    assert all(after > before for after, before in zip(queries_by_replica(site), queries, strict=True))
    assert difference(*steered) < TOLERANCE
    assert difference(steered[0], ask_replica(0, None)) > 100 * TOLERANCE
    site.admin.delete_profile("alike")


def queries_by_replica(site: Any) -> list[float]:
    """Tokens of steered prompts that each replica has looked up."""
    text = site.server.client.get("/metrics").text
    pattern = r'^steering_prefix_cache_query_tokens_total\{replica="%d",steered="true"\} (\S+)$'
    return [float(re.findall(pattern % replica, text, re.MULTILINE)[0]) for replica in range(NUM_REPLICAS)]


def test_metrics_are_those_of_all_processes(replicated: Replicated, bundle_files: dict[str, Path]) -> None:
    site = replicated.site
    put(site, "counted", site.admin.upload(bundle_files["late"]).digest)
    scraped: list[tuple[float, float]] = []
    is_over = threading.Event()

    def counts(client: httpx.Client) -> tuple[float, float]:
        text = client.get("/metrics").text
        names = ("steering_tokens_total", "steering_requests_total")
        found = (re.findall(rf'^{name}{{[^}}]*profile="counted"[^}}]*}} (\S+)$', text, re.MULTILINE) for name in names)
        tokens, requests = (sum(map(float, values)) for values in found)
        return tokens, requests

    def keep_scraping() -> None:
        with ExitStack() as stack:
            scrapers = connect(site, stack, 6)
            while not is_over.is_set():
                for client in scrapers:
                    scraped.append(counts(client))

    scraper = threading.Thread(target=keep_scraping)
    scraper.start()
    steered = []
    try:
        # Counts are to be seen while they grow; a scraper that is dead has failed.
        while len(steered) < 4 * NUM_CLIENTS or (len(scraped) <= NUM_CLIENTS and scraper.is_alive()):
            answers = replicated.everywhere(lambda client: answer_of(ask(client, "counted", max_tokens=24)))
            steered += [answer["steering"]["tokens_steered"] for answer in answers]
    finally:
        is_over.set()
        scraper.join()
    assert len(scraped) > NUM_CLIENTS
    assert scraped == sorted(scraped, key=lambda pair: pair[0])
    assert scraped == sorted(scraped, key=lambda pair: pair[1])
    total = (sum(steered), len(steered))
    wait_until(lambda: set(replicated.everywhere(counts)) == {total}, "the processes' counts are not summed")
    wait_until(lambda: site.server.metric("steering_active_requests") == 0, "requests stay active")
    assert site.server.metric("steering_receipt_discrepancy_tokens") == 0
    assert site.server.metric("steering_receipt_mismatches_total") == 0
    site.admin.delete_profile("counted")


def rows_of(site: Any) -> list[int]:
    return [worker.rows_used for worker in site.admin.status().workers]


def test_no_room_leaves_everything_as_it_was(
    replicated: Replicated, bundle_files: dict[str, Path], make_bundle: Callable[..., Path]
) -> None:
    site = replicated.site
    digest = site.admin.upload(bundle_files["every"]).digest
    put(site, "full", digest)
    answer = answer_of(ask(site.server.client, "full"))
    before = site.admin.status()
    large = make_bundle("large", [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], 9)
    with pytest.raises(SteeringClientError, match=r"replica [01], rank 0") as error:
        site.admin.upload(large)
    assert (error.value.status, error.value.code) == (409, "steering_capacity")
    after = site.admin.status()
    assert after.generation_desired == before.generation_desired
    assert [worker.bundles for worker in after.workers] == [worker.bundles for worker in before.workers]
    assert rows_of(site) == [worker.rows_used for worker in before.workers]
    assert not [bundle for bundle in site.admin.bundles() if bundle.name == "large"]
    assert replicated.everywhere(lambda client: answer_of(ask(client, "full"))) == [answer] * NUM_CLIENTS
    site.admin.delete_profile("full", drain=True)
    site.admin.delete_bundle(digest)
    freed = rows_of(site)
    assert freed[0] == freed[1] == before.workers[0].rows_used - 6


def test_two_servers_share_a_registry(
    replicated: Replicated, state: State, start_operated: Callable[..., Any], bundle_files: dict[str, Path]
) -> None:
    first = replicated.site
    with start_operated("second", "--steering-rows", str(ROWS), registry=state.registry) as second:
        assert len({member.instance for member in second.admin.status().members}) == 2
        assert answer_of(ask(second.server.client, "kept")) == state.answer
        digest = first.admin.upload(bundle_files["double"]).digest
        # The upload is acknowledged when the other one has loaded it too.
        assert digest in second.admin.status().workers[0].bundles
        for source, other in ((first, second), (second, first)):
            put(source, "shared", digest, strength=0.5 if source is first else -0.5)
            ours, theirs = (answer_of(ask(site.server.client, "shared")) for site in (source, other))
            assert ours == theirs
            assert ours["steering"]["bundle"] == digest
        first.admin.delete_profile("shared")
        assert ask(second.server.client, "shared").status_code == 404
        second.admin.delete_bundle(digest)
        for site in (first, second):
            assert all(digest not in worker.bundles for worker in site.admin.status().workers)
    # A server that has ended holds nobody up.
    wait_until(lambda: len({member.instance for member in first.admin.status().members}) == 1, "it is still listed")
    put(first, "alone", first.admin.upload(bundle_files["late"]).digest)
    assert answer_of(ask(first.server.client, "alone"))["steering"]["profile"] == "alone"
    first.admin.delete_profile("alone")

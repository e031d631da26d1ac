"""The playground's bundle page and admin tab, in a browser, on a real server."""

import json
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import APIResponse, Locator, Route, expect

from artifacts.bundle import load_bundle
from artifacts.manifest import Intervention, ModelIdentity, Parameters
from server.admin_schema import ProfileSpec
from server.client import SteeringClient

pytestmark = pytest.mark.engine

CAREFUL = Path(__file__).parents[3] / "artifacts" / "lab" / "careful.safetensors"
WRONG_KEY = "a-key-that-nobody-gave-out"
MARKUP = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"
NUM_PROFILES, PAGE_OF_LIST = 70, 50
# More than 4096 fields, were they drawn.
NUM_PAIRS = 65


class Tab:
    """The page of a server, to be opened at one of its views."""

    def __init__(self, visit: Any) -> None:
        self.visit = visit
        self.page = visit.page
        # Without a key the server refuses what these views ask for.
        visit.refusals.add(401)

    def open(self, view: str, key: str | None) -> None:
        self.page.goto(f"{self.visit.url}#{view}")
        if key is not None and view == "admin":
            self.page.get_by_label("Admin key").fill(key)
            self.page.get_by_role("button", name="Use key").click()
        elif key is not None:
            self.page.get_by_role("tabpanel").get_by_role("button", name="Use a key").click()
            self.page.get_by_label("API key").fill(key)
            self.page.get_by_role("dialog").get_by_role("button", name="Use key").click()

    def card(self, title: str) -> Locator:
        heading = self.page.get_by_role("heading", name=title, exact=True)
        found: Locator = self.page.locator("section.card").filter(has=heading)
        return found

    def chart(self, title: str) -> Locator:
        found: Locator = self.page.get_by_role("figure", name=title)
        return found

    def rows(self, title: str) -> list[list[str]]:
        """The table that stands beside a chart, without its head."""
        self.chart(title).get_by_text("Show as a table").click()
        lines = self.chart(title).locator("tbody tr")
        return [line.locator("td").all_inner_texts() for line in lines.all()]


@pytest.fixture
def open_tab(blank_page: Callable[..., Any]) -> Iterator[Callable[..., Tab]]:
    """A tab for a server; afterwards nobody has given the page another title."""
    opened = []

    def start(url: str, *, width: int = 1280, scheme: Any = "light") -> Tab:
        size = {"width": width, "height": 900}
        opened.append(Tab(blank_page(url, viewport=size, color_scheme=scheme, reduced_motion="reduce")))
        return opened[-1]

    yield start
    for tab in opened:
        assert tab.page.title() == "ExpertSteer playground"


@pytest.fixture
def site(operated: Any) -> Iterator[Any]:
    """A server without profiles and bundles, left so."""
    yield operated
    for profile in operated.admin.profiles():
        operated.admin.delete_profile(profile.name)
    for bundle in operated.admin.bundles():
        operated.admin.delete_bundle(bundle.digest, drain=True)


@pytest.fixture
def key(operated: Any) -> str:
    header: str = operated.server.client.headers["authorization"]
    return header.removeprefix("Bearer ")


@pytest.fixture
def name() -> str:
    """Name of a profile that was never there: the history of one that was deleted stays."""
    return f"page-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def tab(open_tab: Callable[..., Tab], site: Any) -> Tab:
    return open_tab(site.server.url)


def confirm(tab: Tab, action: str) -> None:
    """Press the button of the open dialog that does what it asks for."""
    tab.page.get_by_role("dialog").get_by_role("button", name=action, exact=True).click()
    expect(tab.page.get_by_role("dialog")).to_have_count(0)


class TestAdmin:
    def test_from_a_file_to_a_profile_and_back(self, tab: Tab, site: Any, key: str, name: str) -> None:
        admin: SteeringClient = site.admin
        tab.open("admin", key)
        expect(tab.card("Profiles")).to_contain_text("No profile yet")
        tab.page.set_input_files("input[type=file]", CAREFUL)
        upload, profiles = tab.card("Add a bundle"), tab.card("Profiles")
        expect(upload).to_contain_text("Nothing is kept yet")
        upload.get_by_text("6 checks").click()
        expect(upload.get_by_role("cell", name="digest", exact=True)).to_be_visible()
        assert admin.bundles() == []

        upload.get_by_label("Profile").fill(name)
        upload.get_by_label("Strength", exact=True).fill("0.25")
        upload.get_by_label("Tokens to steer").select_option("generation")
        upload.get_by_label("Description").fill(MARKUP)
        upload.get_by_role("button", name="Add and activate").click()
        expect(upload).to_contain_text(f"{name} is now version")
        first = admin.profile(name)
        assert (first.strength, first.scope, first.description) == (0.25, "generation", MARKUP)

        profiles.get_by_role("button", name="Change", exact=True).click()
        profiles.get_by_label("Strength", exact=True).fill("-0.5")
        profiles.get_by_role("button", name="Save as a new version").click()
        expect(profiles).to_contain_text(f"{name} is now version")
        second = admin.profile(name)
        assert (second.strength, second.scope, second.description) == (-0.5, "generation", MARKUP)

        history = tab.page.get_by_role("region", name=f"History of {name}")
        expect(history.locator("tbody tr")).to_have_count(2)
        expect(history.locator("tbody tr").first).to_contain_text("current")
        expect(history.locator("tbody tr").first).to_contain_text("admin")
        profiles.get_by_role("button", name="Roll back", exact=True).click()
        confirm(tab, "Roll back")
        expect(history.locator("tbody tr").first).to_contain_text(f"rolled back to version {first.generation}")
        assert admin.profile(name).strength == 0.25
        history.get_by_role("button", name=f"Roll back to version {second.generation}").click()
        confirm(tab, "Roll back")
        expect(history.locator("tbody tr")).to_have_count(4)
        assert admin.profile(name).strength == -0.5

        expect(tab.card("Audit log").locator("tbody tr").first).to_contain_text("profile.rollback")
        expect(tab.card("Status")).to_contain_text("the newest")

    def test_delete_asks_and_can_be_undone(self, tab: Tab, site: Any, key: str, name: str) -> None:
        admin: SteeringClient = site.admin
        admin.put_profile(name, ProfileSpec(bundle=admin.upload(CAREFUL).digest))
        tab.open("admin", key)
        profiles = tab.card("Profiles")
        delete = profiles.get_by_role("button", name="Delete", exact=True)
        delete.click()
        tab.page.keyboard.press("Escape")
        expect(tab.page.get_by_role("dialog")).to_have_count(0)
        expect(delete).to_be_focused()
        assert [each.name for each in admin.profiles()] == [name]
        delete.click()
        confirm(tab, "Delete the profile")
        expect(profiles).to_contain_text(f"{name} is deleted")
        assert admin.profiles() == []
        assert any("drain=true&timeout_s=30" in each for each in tab.visit.requests)
        profiles.get_by_role("button", name="Bring it back").click()
        expect(profiles).to_contain_text(f"{name} is now version")
        assert [each.name for each in admin.profiles()] == [name]

    def test_nothing_is_overwritten_unseen(self, tab: Tab, site: Any, key: str) -> None:
        """A name that exists is shown before it is changed, and who may use it stays as it was."""
        admin: SteeringClient = site.admin
        bundle = admin.upload(CAREFUL)
        admin.put_profile("careful", ProfileSpec(bundle=bundle.digest, strength=0.1, allowed_keys=("clinic",)))
        tab.open("admin", key)
        tab.page.set_input_files("input[type=file]", CAREFUL)
        upload = tab.card("Add a bundle")
        expect(upload).to_contain_text("is on the server already")
        upload.get_by_role("button", name="Activate").click()
        expect(tab.page.get_by_role("dialog")).to_contain_text("strength 0.1")
        tab.page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        assert admin.profile("careful").strength == 0.1
        upload.get_by_role("button", name="Activate").click()
        confirm(tab, "Change it")
        expect(upload).to_contain_text("careful is now version")
        found = admin.profile("careful")
        assert (found.strength, found.allowed_keys) == (0.5, ["clinic"])

    def test_layers_stay_or_the_dialog_says_so(
        self, tab: Tab, site: Any, key: str, name: str, make_bundle: Callable[..., Path]
    ) -> None:
        admin: SteeringClient = site.admin
        served, other = (make_bundle(label, [1, 4], seed) for label, seed in (("served", 5), ("other", 6)))
        admin.put_profile(name, ProfileSpec(bundle=admin.upload(served).digest, layers=(4,)))
        tab.open("admin", key)
        upload = tab.card("Add a bundle")
        for file, said, layers, done in (
            (served, "It steers at some of its layers only, as before: 4.", [4], "was so already"),
            (other, "It will steer at all layers of the bundle: 1, 4.", [1, 4], "is now version"),
        ):
            tab.page.set_input_files("input[type=file]", file)
            upload.get_by_label("Profile").fill(name)
            upload.get_by_role("button", name=re.compile("activate$", re.IGNORECASE)).click()
            expect(tab.page.get_by_role("dialog")).to_contain_text(said)
            confirm(tab, "Change it")
            expect(upload).to_contain_text(f"{name} {done}")
            assert admin.profile(name).layers == layers

    @pytest.mark.parametrize("act", ["roll back", "change"])
    def test_changed_by_somebody_else_meanwhile(self, tab: Tab, site: Any, key: str, act: str, name: str) -> None:
        admin: SteeringClient = site.admin
        digest = admin.upload(CAREFUL).digest
        for strength in (0.1, 0.2):
            admin.put_profile(name, ProfileSpec(bundle=digest, strength=strength))
        tab.visit.refusals.add(412)
        tab.open("admin", key)
        profiles = tab.card("Profiles")
        expect(profiles).to_contain_text("0.2, at most 0.8")
        theirs = admin.put_profile(name, ProfileSpec(bundle=digest, strength=0.7))
        if act == "roll back":
            profiles.get_by_role("button", name="Roll back", exact=True).click()
            confirm(tab, "Roll back")
        else:
            profiles.get_by_role("button", name="Change", exact=True).click()
            profiles.get_by_role("button", name="Save as a new version").click()
        expect(profiles).to_contain_text("Somebody else changed the profile meanwhile")
        expect(profiles).to_contain_text("steering_precondition_failed")
        expect(profiles).to_contain_text("0.7, at most 0.8")
        assert admin.profile(name).generation == theirs.generation

    def test_refusals_are_shown_as_they_are(self, tab: Tab, site: Any, key: str, tmp_path: Path) -> None:
        tab.visit.refusals.add(400)
        tab.open("admin", key)
        upload = tab.card("Add a bundle")
        path = tmp_path / "no-bundle.safetensors"
        path.write_bytes(b"no bundle at all")
        tab.page.set_input_files("input[type=file]", path)
        expect(upload).to_contain_text("steering_bundle_invalid, HTTP status 400")
        tab.page.set_input_files("input[type=file]", CAREFUL)
        upload.get_by_label("Strength", exact=True).fill("3")
        upload.get_by_role("button", name="Add and activate").click()
        expect(upload).to_contain_text("strength 3.0 is over maximum_strength 0.8")
        assert site.admin.profiles() == []

    def test_a_file_of_the_servers_folder(self, tab: Tab, site: Any, key: str, bundle_root: Path) -> None:
        (bundle_root / "page").mkdir()
        try:
            (bundle_root / "page" / "careful.safetensors").write_bytes(CAREFUL.read_bytes())
            tab.open("admin", key)
            upload = tab.card("Add a bundle")
            expect(upload.locator("option[value='page/careful.safetensors']")).to_have_count(1)
            upload.get_by_label("Or a file in the server's folder").fill("page/careful.safetensors")
            upload.get_by_role("button", name="Check it").click()
            expect(upload).to_contain_text("Nothing is kept yet")
            upload.get_by_role("button", name="Add it without a profile").click()
            expect(upload).to_contain_text("no profile names it yet")
        finally:
            (bundle_root / "page" / "careful.safetensors").unlink()
            (bundle_root / "page").rmdir()
        assert [each.source for each in site.admin.bundles()] == ["path:page/careful.safetensors"]
        assert site.admin.profiles() == []

    def test_drop_and_stop(self, tab: Tab, site: Any, key: str, wait_for_routes: Callable[..., None]) -> None:
        tab.open("admin", key)
        upload = tab.card("Add a bundle")
        held: list[Route] = []
        tab.page.route("**/v1/steering/bundles?dry_run=*", lambda route: held.append(route))
        # A file can only be dropped by a hand; this is what the browser then hands to the page.
        dropped = tab.page.evaluate_handle(
            "() => { const data = new DataTransfer(); data.items.add(new File(['x'.repeat(99)], 'a.safetensors'));"
            " return data; }"
        )
        tab.page.dispatch_event(".drop", "drop", {"dataTransfer": dropped})
        expect(upload).to_contain_text("Sending a.safetensors, 99 bytes")
        wait_for_routes(tab.page, held, 1)
        upload.get_by_role("button", name="Stop").click()
        expect(upload).to_contain_text("Stopped; the server kept nothing.")
        assert len(held) == 1 and site.admin.bundles() == []

    def test_stop_while_the_server_adds(
        self, tab: Tab, site: Any, key: str, wait_for_routes: Callable[..., None]
    ) -> None:
        """The server has it all: nobody may be told that it kept nothing."""
        held: list[APIResponse] = []
        tab.open("admin", key)
        tab.page.set_input_files("input[type=file]", CAREFUL)
        upload = tab.card("Add a bundle")
        expect(upload).to_contain_text("Nothing is kept yet")

        def add_and_hold(route: Route) -> None:
            # The browser does not say what a file holds.
            held.append(route.fetch(post_data=CAREFUL.read_bytes()))

        tab.page.route("**/v1/steering/bundles?dry_run=false", add_and_hold)
        for button in ("Add it without a profile", "Add and activate"):
            upload.get_by_role("button", name=button).click()
            wait_for_routes(tab.page, held, 1)
            assert held.pop().ok
            assert [each.name for each in site.admin.bundles()] == ["careful"]
            upload.get_by_role("button", name="Stop").click()
            expect(upload).to_contain_text("Stopped; the server may have added it all the same.")
            expect(tab.card("Audit log").locator("tbody tr").first).to_contain_text("bundle.add")
            digest = site.admin.bundles()[0].digest
            site.admin.delete_bundle(digest, drain=True)
            tab.page.set_input_files("input[type=file]", CAREFUL)
            expect(upload).to_contain_text("Nothing is kept yet")
        assert site.admin.profiles() == []

    def test_many_profiles(self, tab: Tab, site: Any, key: str, name: str) -> None:
        admin: SteeringClient = site.admin
        digest = admin.upload(CAREFUL).digest
        for number in range(NUM_PROFILES):
            admin.put_profile(f"{name}-{number:03}", ProfileSpec(bundle=digest, description=f"Ward {number}."))
        tab.open("admin", key)
        names = tab.page.get_by_role("list", name="Profiles", exact=True).get_by_role("button")
        expect(names).to_have_count(PAGE_OF_LIST)
        tab.page.get_by_role("button", name=f"Show {NUM_PROFILES - PAGE_OF_LIST} more").click()
        expect(names).to_have_count(NUM_PROFILES)
        tab.card("Profiles").get_by_label("Filter").fill("ward 61")
        expect(names).to_have_count(1)
        names.click()
        expect(tab.page.get_by_role("region", name=f"History of {name}-061")).to_be_visible()


class TestKey:
    def test_wrong_then_right_then_forgotten(self, tab: Tab, site: Any, key: str, name: str) -> None:
        site.admin.put_profile(name, ProfileSpec(bundle=site.admin.upload(CAREFUL).digest))
        tab.open("admin", WRONG_KEY)
        access = tab.card("Access")
        expect(access).to_contain_text("invalid_api_key, HTTP status 401")
        expect(tab.card("Add a bundle")).to_be_hidden()
        access.get_by_role("button", name="Forget the key").click()
        tab.page.get_by_label("Admin key").fill(key)
        tab.page.keyboard.press("Enter")
        expect(tab.card("Add a bundle")).to_be_visible()
        expect(access.get_by_role("button", name="Forget the key")).to_be_focused()
        expect(access.get_by_role("status")).to_have_text("The key is in use.")
        expect(tab.card("Status").get_by_role("table")).to_have_count(2)
        expect(tab.card("Profiles")).to_contain_text(name)
        expect(tab.card("Audit log").locator("tbody tr").first).to_contain_text("profile.put")
        access.get_by_role("button", name="Forget the key").click()
        expect(tab.card("Add a bundle")).to_be_hidden()
        expect(access.get_by_role("button", name="Use key")).to_be_focused()
        expect(access.get_by_role("status")).to_have_text("The key is forgotten.")
        # Nor is it left in the page for those who look behind it.
        assert tab.page.locator("#admin").locator("table td").count() == 0
        assert name not in tab.page.locator("#admin").inner_html()

    def test_what_is_typed_outlives_a_slow_answer(
        self, tab: Tab, key: str, wait_for_routes: Callable[..., None]
    ) -> None:
        held: list[Route] = []
        tab.page.route("**/v1/steering/status", lambda route: held.append(route))
        tab.open("admin", None)
        wait_for_routes(tab.page, held, 1)
        tab.page.get_by_label("Admin key").fill(key)
        with tab.page.expect_response("**/v1/steering/status"):
            held.pop().continue_()
        tab.page.unroute("**/v1/steering/status")
        expect(tab.card("Add a bundle")).to_be_hidden()
        tab.page.get_by_role("button", name="Use key").click()
        expect(tab.card("Add a bundle")).to_be_visible()

    def test_is_kept_nowhere(self, tab: Tab, site: Any, key: str, name: str) -> None:
        site.admin.put_profile(name, ProfileSpec(bundle=site.admin.upload(CAREFUL).digest))
        tab.open("admin", key)
        expect(tab.card("Profiles")).to_contain_text(name)
        stored = tab.page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, name])")
        assert json.loads(stored) == [{}, {}, "", ""]
        assert tab.page.context.storage_state() == {"cookies": [], "origins": []}
        assert tab.page.evaluate("indexedDB.databases()") == []
        values = tab.page.evaluate("[...document.querySelectorAll('input, textarea')].map((each) => each.value)")
        for text in (tab.page.url, tab.page.content(), *values, *tab.visit.requests):
            assert key not in text
        tab.page.reload()
        expect(tab.page.get_by_label("Admin key")).to_be_visible()

    def test_server_without_any(self, open_tab: Callable[..., Tab], eager: Any) -> None:
        """Everybody may look, nobody may change; the page says how to enable it."""
        tab = open_tab(eager.url)
        tab.visit.refusals.add(403)
        tab.open("admin", None)
        expect(tab.card("Profiles")).to_contain_text("careful")
        # No folder of bundles was configured either.
        expect(tab.card("Add a bundle")).to_contain_text("start it with --steering-bundle-root")
        tab.page.set_input_files("input[type=file]", CAREFUL)
        expect(tab.card("Add a bundle")).to_contain_text("steering_admin_disabled, HTTP status 403")
        expect(tab.card("Add a bundle")).to_contain_text("EXPERTSTEER_ADMIN_KEY")


class TestBundlePage:
    def test_draws_what_the_manifest_holds(self, tab: Tab, site: Any, key: str, name: str) -> None:
        digest = site.admin.upload(CAREFUL).digest
        site.admin.put_profile(name, ProfileSpec(bundle=digest))
        bundle = load_bundle(CAREFUL)
        evaluation: Any = bundle.manifest.evaluation
        tab.open("bundles", key)
        expect(tab.page.get_by_role("heading", name="careful", exact=True)).to_be_visible()
        for text in (digest, bundle.manifest.licence, "expertsteer-lab-expert, Qwen2ForCausalLM", name):
            expect(tab.page.locator("#bundles")).to_contain_text(text)
        expect(tab.card("Where it is now")).to_contain_text("all of its layers")

        doses = evaluation["dose_response"]
        title = "Score and cost by strength"
        shown = [[float(cell) for cell in (row[0], row[1], row[3], row[5])] for row in tab.rows(title)]
        keys = ("strength", "accuracy", "perplexity_ratio", "retention")
        assert shown == [pytest.approx([dose[key] for key in keys], rel=1e-5) for dose in doses]
        chart = tab.chart(title)
        # Accuracy, perplexity and, as some answers are lost, retention.
        expect(chart.locator(".plot circle")).to_have_count(3 * len(doses))
        for text in ("recommended 0.5", "maximum 0.8", "Accuracy, share of 204 test questions", "Strength"):
            expect(chart.locator(".plot").get_by_text(text, exact=True)).to_be_visible()
        means = {name: evaluation["test"][name]["mean"] for name in ("random", "permuted-labels")}
        expect(chart).to_contain_text(f"random directions, mean of 30: {means['random']:.3g}")
        expect(chart).to_contain_text(f"permuted labels, mean of 10: {means['permuted-labels']:.3g}")
        heights = [
            float(value)
            for value in chart.locator(".plot circle").evaluate_all("all => all.map(c => c.cy.baseVal.value)")
        ]
        accuracies = [dose["accuracy"] for dose in doses]
        order = sorted(range(len(doses)), key=lambda index: -heights[index])
        assert order == sorted(range(len(doses)), key=lambda index: accuracies[index])

        conditions = {row[0]: row[1] for row in tab.rows("Against controls")}
        assert float(conditions["steered, as recommended"]) == pytest.approx(evaluation["test"]["on"]["accuracy"])
        assert float(conditions["shuffled pairs (10)"]) == pytest.approx(evaluation["test"]["shuffled-pairs"]["mean"])
        assert len(conditions) == len(evaluation["test"]) - 1

        pairs = tab.rows("Layer pairs")
        assert len(pairs) == len(evaluation["pairs"])
        assert [row[:2] for row in pairs if row[3] == "yes"] == [["3", "2"]]
        tab.page.get_by_label("Score of the pairs").select_option("r2")
        used = next(row for row in tab.rows("Layer pairs") if row[3] == "yes")
        assert float(used[2]) == pytest.approx(bundle.manifest.layer_pairs[0].scores["r2"])

        [layer] = tab.rows("Layers")
        [norm] = [float(row.norm()) for row in bundle.rows.values()]
        assert layer[:3] == ["2", "add", "none"] and float(layer[3]) == pytest.approx(norm, rel=1e-5)

    def test_values_by_keyboard_and_pointer(self, tab: Tab, site: Any, key: str) -> None:
        site.admin.upload(CAREFUL)
        tab.open("bundles", key)
        doses: Any = load_bundle(CAREFUL).manifest.evaluation["dose_response"]
        plot = tab.chart("Score and cost by strength").locator(".plot")
        said = tab.chart("Score and cost by strength").get_by_role("status")
        plot.focus()
        tab.page.keyboard.press("ArrowRight")
        expect(said).to_contain_text(f"accuracy {doses[0]['accuracy']:.4g}")
        tab.page.keyboard.press("End")
        expect(said).to_contain_text(f"accuracy {doses[-1]['accuracy']:.4g}")
        low, high = doses[-1]["accuracy_interval"]
        expect(said).to_contain_text(f"{low:.4g} to {high:.4g}")
        tab.page.keyboard.press("Escape")
        expect(said).to_have_count(0)
        plot.locator("circle").nth(3).hover()
        expect(said).to_contain_text(f"strength {doses[3]['strength']:g}")

    def test_by_hand_means_without_evidence(
        self, tab: Tab, site: Any, key: str, make_bundle: Callable[..., Path]
    ) -> None:
        site.admin.upload(make_bundle("by-hand", [1, 4, 4], 5))
        tab.open("bundles", key)
        expect(tab.card("How well it works")).to_contain_text("No measurement comes with this bundle")
        expect(tab.card("How layers were paired")).to_contain_text("names no layer pairs")
        expect(tab.card("How well it works").locator("figure")).to_have_count(0)
        expect(tab.card("Where it is now")).to_contain_text("No recent version of a profile names it.")
        assert [row[0] for row in tab.rows("Layers")] == ["1", "4", "4"]

    def test_what_a_manifest_holds_stays_text(
        self, tab: Tab, site: Any, key: str, make_bundle: Callable[..., Path]
    ) -> None:
        hostile = {
            "dose_response": [
                *({"strength": s, "accuracy": 0.5, "accuracy_interval": MARKUP} for s in (0.5, 0.0)),
                *({"strength": MARKUP, "accuracy": 1}, MARKUP, None, {"strength": 1}, [], 3),
            ],
            "test": {
                MARKUP: {"accuracy": 0.25},
                "on": MARKUP,
                "__proto__": {"accuracy": 0.5},
                "questions": MARKUP,
                "constructor": {"accuracy": 1},
            },
            "pairs": [
                {"expert": 0, "target": 1, MARKUP: 0.5, "constructor": 0.25},
                {"expert": 1, "target": 1},
                *({"expert": -1, "target": 0}, {"expert": "0", "target": 0}, MARKUP),
            ],
            "p_holm": [MARKUP],
            MARKUP: MARKUP,
        }
        path = make_bundle(
            "hostile",
            [3],
            6,
            steps=[{"kind": "clamp", "parameters": Parameters(minimum=-1.0)}],
            description=MARKUP,
            licence=MARKUP,
            target=ModelIdentity(id=MARKUP, architecture="LlamaForCausalLM", hidden_size=128, num_layers=6),
            evaluation=hostile,
            tool_versions={MARKUP: MARKUP},
        )
        assert isinstance(load_bundle(path).manifest.interventions[0], Intervention)
        site.admin.upload(path)
        tab.open("bundles", key)
        expect(tab.card("hostile")).to_contain_text(MARKUP)
        # Two doses, three conditions and two pairs are of the right form.
        assert [row[0] for row in tab.rows("Score and cost by strength")] == ["0", "0.5"]
        assert len(tab.rows("Against controls")) == 3
        assert len(tab.rows("Layer pairs")) == 2
        tab.page.get_by_label("Score of the pairs").select_option("constructor")
        assert [row[2] for row in tab.rows("Layer pairs")] == ["0.25", "\u2013"]
        expect(tab.card("How well it works")).to_contain_text("10 entries of the evaluation are not drawn")
        tab.page.get_by_text("All figures of the evaluation, as JSON").click()
        expect(tab.page.locator("pre")).to_contain_text("onerror")
        assert tab.page.locator("#bundles :is(img, b, script, iframe)").count() == 0
        assert tab.page.evaluate("({}).accuracy") is None

    def test_pairs_of_too_many_layers_are_a_table(
        self, tab: Tab, site: Any, key: str, make_bundle: Callable[..., Path]
    ) -> None:
        """A map of them would have the square of their number of fields, and the page would stand still."""
        pairs = [{"expert": layer, "target": layer, "r2": 0.5} for layer in range(NUM_PAIRS)]
        site.admin.upload(make_bundle("diagonal", [3], 6, evaluation={"pairs": pairs}))
        tab.open("bundles", key)
        rows = tab.card("How layers were paired").locator("tbody tr")
        expect(rows).to_have_count(NUM_PAIRS)
        assert rows.last.locator("td").all_inner_texts() == [str(NUM_PAIRS - 1)] * 2 + ["0.5", "no"]
        expect(tab.card("How layers were paired").locator("svg")).to_have_count(0)

    def test_serve_and_delete(self, tab: Tab, site: Any, key: str, name: str) -> None:
        admin: SteeringClient = site.admin
        digest = admin.upload(CAREFUL).digest
        tab.visit.refusals.add(409)
        tab.open("bundles", key)
        view = tab.page.locator("#bundles")
        view.get_by_role("button", name="Serve as a profile").click()
        view.get_by_label("Profile").fill(name)
        tab.page.get_by_role("tab", name="Compare").click()
        with tab.page.expect_response("**/v1/steering/bundles?*"):
            tab.page.get_by_role("tab", name="Bundles").click()
        expect(view.get_by_label("Profile")).to_have_value(name)
        view.get_by_role("button", name="Serve it").click()
        expect(view).to_contain_text(f"{name} is now version")
        assert admin.profile(name).bundle == digest
        view.get_by_role("button", name="Delete", exact=True).click()
        confirm(tab, "Delete the bundle")
        expect(view).to_contain_text("steering_bundle_in_use, HTTP status 409")
        admin.delete_profile(name)
        view.get_by_role("button", name="Delete", exact=True).click()
        confirm(tab, "Delete the bundle")
        expect(view).to_contain_text("No bundles yet")
        assert admin.bundles() == []

    def test_description_of_a_bundle_may_be_longer_than_a_typed_one(
        self, tab: Tab, site: Any, key: str, name: str, make_bundle: Callable[..., Path]
    ) -> None:
        admin: SteeringClient = site.admin
        description = "long\n" * 500 + "end"
        admin.upload(make_bundle("wordy", [1], 5, description=description))
        tab.open("bundles", key)
        view = tab.page.locator("#bundles")
        for typed in (None, "Short."):
            view.get_by_role("button", name="Serve as a profile").click()
            view.get_by_label("Profile").fill(name)
            if typed is not None:
                view.get_by_label("Description").fill(typed)
            view.get_by_role("button", name="Serve it").click()
            if typed is not None:
                confirm(tab, "Change it")
            expect(view.locator("form")).to_have_count(0)
            assert admin.profile(name).description == (typed or description)

    def test_slow_server(self, tab: Tab, site: Any, key: str, wait_for_routes: Callable[..., None]) -> None:
        site.admin.upload(CAREFUL)
        held: list[Route] = []
        tab.page.route("**/v1/steering/bundles?*", lambda route: held.append(route))
        tab.open("bundles", None)
        expect(tab.page.locator("#bundles")).to_contain_text("Loading bundles")
        wait_for_routes(tab.page, held, 1)
        held[0].continue_()
        tab.page.get_by_role("tabpanel").get_by_role("button", name="Use a key").click()
        tab.page.get_by_label("API key").fill(key)
        tab.page.get_by_role("dialog").get_by_role("button", name="Use key").click()
        expect(tab.page.locator("#bundles")).to_contain_text("Loading bundles")
        wait_for_routes(tab.page, held, 2)
        held[1].continue_()
        expect(tab.page.get_by_role("heading", name="careful", exact=True)).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_narrow_and_wide(
    open_tab: Callable[..., Tab], site: Any, key: str, tmp_path: Path, width: int, scheme: str, name: str
) -> None:
    site.admin.put_profile(name, ProfileSpec(bundle=site.admin.upload(CAREFUL).digest))
    tab = open_tab(site.server.url, width=width, scheme=scheme)
    tab.open("admin", key)
    expect(tab.page.get_by_role("region", name=f"History of {name}")).to_be_visible()
    for view in ("admin", "bundles"):
        tab.page.get_by_role("tab", name=view).click()
        if view == "bundles":
            expect(tab.chart("Against controls").locator(".plot circle").first).to_be_visible()
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        tab.page.screenshot(path=tmp_path / f"{view}-{width}-{scheme}.png", full_page=True)

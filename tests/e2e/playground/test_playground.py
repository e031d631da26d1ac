"""The playground against a real server: what a person sees who compares answers."""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from server.admin_schema import ProfileSpec

pytestmark = pytest.mark.engine

PROFILE = "careful"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
QUOTES = "It's \"7 plus 5\"? \\n `id` $(id) $HOME %s {0} \n\ttab\u202e \u00e9 \u6f22 \U0001f642 '; echo no"
COMMAND_TIMEOUT_S = 60
# Text and ground, as the style sheet uses them.
_READ_ON = (
    *(("text", ground) for ground in ("surface", "raised", "sunken", "accent-soft", "plain-soft")),
    *(("text", ground) for ground in ("good-soft", "warn-soft", "bad-soft")),
    *(("muted", ground) for ground in ("surface", "raised", "sunken")),
    *(("accent", ground) for ground in ("surface", "raised", "accent-soft")),
    *(("on-accent", "accent"), ("on-accent", "accent-strong"), ("plain", "plain-soft"), ("good", "good-soft")),
    *(("warn", "warn-soft"), ("bad", "bad-soft"), ("bad", "raised")),
)
# Controls that can be seen and that a screen reader could not name.
_NAMELESS = """(view) => ["header", `#${view.id}`]
    .flatMap((place) => [...document.querySelectorAll(`${place} :is(button, input, select, textarea)`)])
    .filter((node) => node.checkVisibility() && !(node.labels?.length || node.ariaLabel || node.textContent.trim()))
    .map((node) => node.outerHTML)"""


@pytest.fixture
def careful(operated: Any, bundle_files: dict[str, Path]) -> Iterator[str]:
    """Digest of the lab's bundle, with a profile of its own; both are gone afterwards."""
    digest: str = operated.admin.upload(bundle_files["careful"]).digest
    operated.admin.put_profile(PROFILE, ProfileSpec(bundle=digest))
    yield digest
    for profile in operated.admin.profiles():
        operated.admin.delete_profile(profile.name)
    operated.admin.delete_bundle(digest, drain=True)


def _cards(page: Page) -> tuple[Locator, Locator]:
    return page.locator("#compare .answer.plain"), page.locator("#compare .answer.steered")


def _run(page: Page, view: str = "compare") -> None:
    page.locator(f"#{view}").get_by_role("button", name="Run", exact=True).click()


def _keep_short(page: Page) -> None:
    """Let no answer of the page be long, whatever steers it."""

    def shortened(route: Route) -> None:
        route.continue_(post_data=json.dumps(route.request.post_data_json | {"max_tokens": 16}))

    page.route("**/v1/chat/completions", shortened)


def _facts(receipt: Locator) -> dict[str, str]:
    names = receipt.locator("dt").all_text_contents()
    return dict(zip(names, receipt.locator("dd").all_text_contents(), strict=True))


def test_both_answers_and_their_words_that_differ(operated: Any, careful: str, visit: Callable[..., Any]) -> None:
    seen = visit(operated.server.url)
    page = seen.page
    plain, steered = _cards(page)
    expect(page.get_by_role("group", name=PROFILE)).to_be_visible()
    _run(page)
    expect(plain.locator(".answer-text")).to_have_text("7 plus 5 is 13.")
    expect(steered.locator(".answer-text")).to_have_text("7 plus 5 is 12.")
    expect(plain.locator("del")).to_have_text(["13"])
    expect(steered.locator("ins")).to_have_text(["12"])
    expect(page.locator("#compare .summary")).to_have_text(
        "1 word only in the default answer, 1 only in the steered one."
    )
    facts = _facts(steered.locator(".receipt"))
    assert facts.pop("Bundle").startswith(careful[:15])
    assert facts == {"Profile": PROFILE, "Strength": "0.5", "Scope": "all", "Layer": "2", "Tokens steered": "16"}
    expect(plain.locator(".receipt")).to_have_count(0)
    for card in (plain, steered):
        expect(card.locator(".figures")).to_have_text(re.compile(r"^7 tokens .*first after"))
    files = [answer for answer in seen.responses if answer.url.startswith(seen.url)]
    assert len(files) > 10
    for answer in files:
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]


def test_strength_and_scope_are_those_asked_for(operated: Any, careful: str, visit: Callable[..., Any]) -> None:
    page = visit(operated.server.url).page
    _, steered = _cards(page)
    profile = page.get_by_role("group", name=PROFILE)
    slider, number = profile.get_by_role("slider"), profile.get_by_role("spinbutton")
    assert [slider.get_attribute(bound) for bound in ("min", "max")] == ["-0.8", "0.8"]
    slider.fill("-0.5")
    expect(number).to_have_value("-0.5")
    number.fill("-0.333")
    profile.get_by_label("Scope").select_option("prompt")
    _run(page)
    expect(steered.locator(".receipt")).to_be_visible()
    facts = _facts(steered.locator(".receipt"))
    assert (facts["Strength"], facts["Scope"]) == ("\u22120.333", "prompt")
    number.fill("0.9")
    _run(page)
    assert number.evaluate("field => field.matches(':invalid')")
    expect(page.locator("#compare")).to_have_attribute("data-state", "idle")
    assert _facts(steered.locator(".receipt")) == facts, "a strength beyond the bound was sent"


def test_two_profiles_give_two_receipts(operated: Any, careful: str, visit: Callable[..., Any]) -> None:
    operated.admin.put_profile("gentle", ProfileSpec(bundle=careful, strength=0.1, scope="response"))
    page = visit(operated.server.url).page
    page.get_by_label("Add a profile").select_option("gentle")
    expect(page.get_by_role("group", name="gentle").get_by_role("slider")).to_be_focused()
    _run(page)
    receipts = _cards(page)[1].locator(".receipt")
    expect(receipts).to_have_count(2)
    assert [_facts(receipt)["Profile"] for receipt in receipts.all()] == [PROFILE, "gentle"]
    page.get_by_role("button", name=f"Remove {PROFILE}").click()
    _run(page)
    expect(receipts).to_have_count(1)
    assert _facts(receipts)["Profile"] == "gentle"


def test_text_of_others_stays_text(operated: Any, careful: str, visit: Callable[..., Any]) -> None:
    operated.admin.put_profile(PROFILE, ProfileSpec(bundle=careful, description=HOSTILE))
    page = visit(operated.server.url).page
    title = page.title()
    expect(page.locator(".about")).to_have_text(HOSTILE)
    page.get_by_label("Prompt", exact=True).fill(HOSTILE)
    page.get_by_text("Settings").click()
    page.get_by_label("Max tokens").fill("8")
    _run(page)
    expect(_cards(page)[1].locator(".receipt")).to_be_visible()
    _cards(page)[1].get_by_role("button", name="Code").click()
    shown = page.get_by_role("dialog").locator("pre").inner_text()
    assert HOSTILE.replace('"', '\\"').replace("'", "'\\''") in shown
    assert page.title() == title
    assert page.locator("main img, main script, dialog img, dialog script").count() == 0


def test_without_profiles_it_says_what_to_do_and_still_answers(operated: Any, visit: Callable[..., Any]) -> None:
    seen = visit(operated.server.url)
    # The tab Admin asks for what needs a key.
    seen.refusals.add(401)
    page = seen.page
    empty = page.locator("#compare .empty")
    expect(empty).to_contain_text(f"expertsteer push FILE.safetensors --profile NAME --server {operated.server.url}")
    _run(page)
    plain, steered = _cards(page)
    expect(plain.locator(".answer-text")).to_have_text("7 plus 5 is 13.")
    expect(steered.locator(".receipt")).to_have_count(0)
    page.get_by_role("tab", name="Strengths").click()
    expect(page.locator("#strengths .empty")).to_contain_text("No profile yet")
    expect(page.locator("#strengths").get_by_role("button", name="Run")).to_be_disabled()
    page.get_by_role("link", name="Admin tab").last.click()
    expect(page.get_by_role("tab", name="Admin")).to_have_attribute("aria-selected", "true")


def test_a_profile_that_vanishes_and_comes_back(operated: Any, careful: str, visit: Callable[..., Any]) -> None:
    seen = visit(operated.server.url)
    # 401: what the tab Bundles asks for needs a key.
    seen.refusals |= {401, 404}
    page = seen.page
    expect(page.get_by_role("group", name=PROFILE)).to_be_visible()
    operated.admin.delete_profile(PROFILE)
    _run(page)
    plain, steered = _cards(page)
    expect(plain.locator(".answer-text")).to_have_text("7 plus 5 is 13.")
    expect(steered.get_by_role("alert")).to_contain_text("steering_profile_not_found")
    expect(page.get_by_role("group", name=PROFILE)).to_have_count(0)
    expect(page.get_by_text(f"{PROFILE} is no longer on the server and was removed here.")).to_be_visible()
    operated.admin.rollback(PROFILE)
    page.get_by_role("tab", name="Bundles").click()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Add a profile").select_option(PROFILE)
    _run(page)
    expect(steered.locator(".answer-text")).to_have_text("7 plus 5 is 12.")
    expect(steered.get_by_role("alert")).to_have_count(0)


def test_a_server_that_does_not_answer_can_be_left(operated: Any, careful: str, visit: Callable[..., Any]) -> None:
    page = visit(operated.server.url).page
    expect(page.get_by_role("group", name=PROFILE)).to_be_visible()
    page.route("**/v1/chat/completions", lambda _: None)
    _run(page)
    plain, steered = _cards(page)
    expect(plain).to_have_attribute("data-state", "waiting")
    expect(steered.locator(".badge")).to_have_text(re.compile(r"^Waiting \d+ s$"))
    page.get_by_role("button", name="Stop").click()
    expect(plain.locator(".badge")).to_have_text("Stopped")
    expect(steered.locator(".badge")).to_have_text("Stopped")
    page.unroute_all(behavior="ignoreErrors")
    _run(page)
    expect(steered.locator(".answer-text")).to_have_text("7 plus 5 is 12.")


def test_stop_ends_the_requests_on_the_server(operated: Any, careful: str, visit: Callable[..., Any]) -> None:
    def never_ending(route: Route) -> None:
        body = route.request.post_data_json | {"ignore_eos": True, "max_tokens": 4000}
        route.continue_(post_data=json.dumps(body))

    def aborted() -> float:
        value: float = operated.server.metric("steering_requests_total", profile=PROFILE, outcome="aborted")
        return value

    page = visit(operated.server.url).page
    expect(page.get_by_role("group", name=PROFILE)).to_be_visible()
    before = aborted()
    page.route("**/v1/chat/completions", never_ending)
    _run(page)
    plain, steered = _cards(page)
    for card in (plain, steered):
        expect(card).to_have_attribute("data-state", "writing")
    page.get_by_role("button", name="Stop").click()
    for card in (plain, steered):
        expect(card).to_have_attribute("data-state", "stopped")
        assert card.locator(".answer-text").inner_text() != ""
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while aborted() == before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert aborted() == before + 1


def test_strengths_are_compared_with_zero(operated: Any, careful: str, visit: Callable[..., Any]) -> None:
    page = visit(operated.server.url, "#strengths").page
    view = page.locator("#strengths")
    expect(view.get_by_label("Strengths", exact=True)).to_have_value("-0.8  -0.5  0  0.5  0.8")
    view.get_by_label("Strengths", exact=True).fill("0.5 \u22120.5")
    _run(page, "strengths")
    cards = view.locator(".answer")
    expect(view.locator(".summary")).to_have_text("3 of 3 answers arrived.")
    assert cards.locator(".level").all_inner_texts() == ["\u22120.5", "0", "0.5"]
    assert cards.locator(".answer-text").all_inner_texts() == ["7 plus 5 is 13."] * 2 + ["7 plus 5 is 12."]
    assert cards.locator("ins").all_inner_texts() == ["12"]
    assert [bar.bounding_box()["height"] for bar in cards.locator(".level-bar").all()] == [4, 4, 4]
    assert cards.locator(".note").all_inner_texts()[::2] == ["same words as off", "1 word differs from off"]
    summaries = cards.locator("summary:visible").all_inner_texts()
    assert summaries == [f"Receipt \u00b7 {count} tokens steered" for count in (16, 0, 16)]
    for text, problem in (("0.5 x", "'x' is no number."), ("0.81", "0.81 is outside of \u22120.8 to 0.8."), ("", None)):
        field = view.get_by_label("Strengths", exact=True)
        field.fill(text)
        _run(page, "strengths")
        said = field.evaluate("field => field.validationMessage")
        assert said == problem if problem else said != ""
        expect(cards).to_have_count(3)


def test_at_most_five_requests_at_a_time(
    operated: Any, careful: str, visit: Callable[..., Any], wait_for_routes: Callable[..., None]
) -> None:
    page = visit(operated.server.url, "#strengths").page
    held: list[Route] = []
    is_open = False

    def hold(route: Route) -> None:
        if is_open:
            route.continue_()
        else:
            held.append(route)

    page.route("**/v1/chat/completions", hold)
    page.locator("#strengths").get_by_label("Strengths", exact=True).fill("-0.4 -0.3 -0.2 -0.1 0.1 0.2 0.3")
    _run(page, "strengths")
    expect(page.locator("#strengths .answer[data-state=queued]")).to_have_count(3)
    expect(page.locator("#strengths .answer[data-state=waiting]")).to_have_count(5)
    wait_for_routes(page, held, 5)
    assert len(held) == 5
    is_open = True
    for route in held:
        route.continue_()
    expect(page.locator("#strengths .answer[data-state=done]")).to_have_count(8)


@contextmanager
def _listener() -> Iterator[tuple[str, list[tuple[str, Any, str | None]]]]:
    """Address of a server that answers everything alike, and what it was asked: path, body, authorization."""
    asked: list[tuple[str, Any, str | None]] = []
    choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "text": "yes", "finish_reason": "stop"}
    answer = {"id": "1", "object": "x", "created": 1, "model": "lab", "choices": [choice], "steering": {"strength": 2}}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, body, self.headers["authorization"]))
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def _code(page: Page, card: Locator, language: str) -> str:
    card.get_by_role("button", name="Code").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name=language).click()
    shown: str = dialog.locator("pre").text_content() or ""
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_have_count(0)
    return shown


def _execute(language: str, code: str, key: str | None = None) -> str:
    command = ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    # Requests must not meet a proxy of the machine that the tests run on.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {} if key is None else {"EXPERTSTEER_API_KEY": key}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("language", ["curl", "Python"])
@pytest.mark.parametrize("is_plain", [False, True])
def test_code_sends_the_very_request(
    operated: Any, careful: str, visit: Callable[..., Any], language: str, is_plain: bool
) -> None:
    sent: list[Any] = []
    page = visit(operated.server.url).page
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    _, steered = _cards(page)
    page.get_by_text("Settings").click()
    page.get_by_label("System prompt").fill(QUOTES[::-1])
    page.get_by_label("Max tokens").fill("8")
    page.get_by_label("Seed").fill("7")
    if is_plain:
        page.get_by_label("Plain completion").check()
    page.get_by_label("Prompt", exact=True).fill(QUOTES)
    _run(page)
    expect(steered.locator(".receipt")).to_be_visible()
    shown = sent[-1] if "steering_profile" in sent[-1] else sent[-2]
    body = {name: value for name, value in shown.items() if not name.startswith("stream")}
    assert body["prompt"] == QUOTES if is_plain else body["messages"][1]["content"] == QUOTES
    code = _code(page, steered, language)
    with _listener() as (address, asked):
        printed = _execute(language, code.replace(operated.server.url, address))
    assert "yes" in printed and "strength" in printed
    assert [(path, found) for path, found, _ in asked] == [
        ("/v1/completions" if is_plain else "/v1/chat/completions", body)
    ]


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_code_works_and_never_holds_the_key(
    operated: Any, careful: str, visit: Callable[..., Any], language: str
) -> None:
    key = operated.server.client.headers["authorization"].removeprefix("Bearer ")
    page = visit(operated.server.url).page
    _, steered = _cards(page)
    page.get_by_role("button", name="Set key").click()
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Use key").click()
    _run(page)
    expect(steered.locator(".answer-text")).to_have_text("7 plus 5 is 12.")
    code = _code(page, steered, language)
    assert key not in page.content() and key not in code and "EXPERTSTEER_API_KEY" in code
    assert "7 plus 5 is 12." in _execute(language, code, key)
    with _listener() as (address, asked):
        _execute(language, code.replace(operated.server.url, address), key)
    assert [authorization for _, _, authorization in asked] == [f"Bearer {key}"]
    page.get_by_role("button", name="Forget key").click()
    expect(page.get_by_role("button", name="Set key")).to_be_visible()


def test_copying(operated: Any, careful: str, visit: Callable[..., Any]) -> None:
    page = visit(operated.server.url, permissions=["clipboard-read", "clipboard-write"]).page
    _run(page)
    page.get_by_role("button", name=f"Copy the digest of {PROFILE}").click()
    expect(page.get_by_text("Copied", exact=True).first).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == careful
    # As where there is no clipboard API.
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.evaluate("document.addEventListener('copy', () => { window.copied = getSelection().toString(); })")
    _cards(page)[0].get_by_role("button", name="Code").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Copy").click()
    expect(dialog.get_by_role("button", name="Copied")).to_be_focused()
    assert page.evaluate("window.copied").startswith("curl -sS ")


def test_keyboard_alone(operated: Any, careful: str, visit: Callable[..., Any]) -> None:
    seen = visit(operated.server.url)
    seen.refusals.add(401)
    page = seen.page
    _keep_short(page)
    expect(page.get_by_role("group", name=PROFILE)).to_be_visible()

    def focused() -> Any:
        return page.evaluate("document.activeElement.id || document.activeElement.textContent")

    def reach(control: Locator) -> None:
        for _ in range(30):
            if control.evaluate("node => node === document.activeElement"):
                return
            page.keyboard.press("Tab")
        pytest.fail(f"Tab does not reach {control}")

    page.keyboard.press("Tab")
    assert focused() == "Skip to the content"
    reach(page.get_by_role("tab", name="Compare"))
    for key, tab in (("ArrowRight", "strengths"), ("End", "admin"), ("ArrowRight", "compare"), ("ArrowLeft", "admin")):
        page.keyboard.press(key)
        assert focused() == f"tab-{tab}"
        expect(page.locator(f"#{tab}")).to_be_visible()
        expect(page.get_by_role("tabpanel")).to_have_count(1)
    page.keyboard.press("Home")
    reach(page.locator("#compare").get_by_label("Prompt", exact=True))
    page.keyboard.press("Control+Enter")
    plain, steered = _cards(page)
    expect(steered.locator(".answer-text")).to_have_text("7 plus 5 is 12.")
    reach(page.get_by_role("slider"))
    page.keyboard.press("Home")
    expect(page.get_by_role("spinbutton", name="Strength")).to_have_value("-0.8")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("spinbutton", name="Strength")).to_have_value("-0.79")
    reach(page.locator("#compare").get_by_role("button", name="Run", exact=True))
    page.keyboard.press("Enter")
    expect(steered.locator(".receipt dd").nth(1)).to_have_text("\u22120.79")
    reach(plain.get_by_role("button", name="Code"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(plain.get_by_role("button", name="Code")).to_be_focused()


@pytest.mark.parametrize("width", [360, 1360])
def test_looks(operated: Any, careful: str, visit: Callable[..., Any], tmp_path: Path, width: int) -> None:
    page = visit(operated.server.url, viewport={"width": width, "height": 900}, reduced_motion="reduce").page
    _keep_short(page)
    expect(page.get_by_role("group", name=PROFILE)).to_be_visible()
    for view in ("compare", "strengths"):
        page.get_by_role("tab", name=view).click()
        _run(page, view)
        expect(page.locator(f"#{view} .answer[data-state=done]")).to_have_count(5 if view == "strengths" else 2)
        assert page.locator(f"#{view}").evaluate(_NAMELESS) == []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            assert page.evaluate("document.documentElement.scrollWidth") == width
            page.screenshot(path=tmp_path / f"{view}-{scheme}.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours(operated: Any, visit: Callable[..., Any], scheme: str) -> None:
    page = visit(operated.server.url, color_scheme=scheme).page
    for text, ground in _READ_ON:
        assert _contrast(page, text, ground) >= 4.5, (text, ground)
    page.get_by_role("button", name="Use dark" if scheme == "light" else "Use light").click()
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (_luminance(ground) < 0.1) == (scheme == "light")


def _contrast(page: Page, text: str, ground: str) -> float:
    """Contrast of two tokens by WCAG 2."""
    colours = page.evaluate(
        """([text, ground]) => {
            const node = document.createElement("p");
            node.style.color = `var(--${text})`;
            node.style.backgroundColor = `var(--${ground})`;
            document.body.append(node);
            const { color, backgroundColor } = getComputedStyle(node);
            node.remove();
            return [color, backgroundColor];
        }""",
        [text, ground],
    )
    dark, light = sorted(map(_luminance, colours))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(", ")]
    linear = [part / 12.92 if part <= 0.04045 else math.pow((part + 0.055) / 1.055, 2.4) for part in channels]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

"""The playground with servers that refuse, break off, hold much or lack something, behind a proxy's prefix."""

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import Request
from fastapi.responses import JSONResponse
from playwright.sync_api import Page, Route, expect

HOSTILE = "<img src=x onerror=\"document.title='taken'\"> <b>bold</b> &lt;i&gt;"
NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template."
)


def _events(pieces: list[str], receipt: dict[str, Any] | None = None, is_plain: bool = False) -> list[str]:
    """A stream as vLLM writes it: a role, the pieces, usage and receipt."""
    first = [] if is_plain else [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
    texts = [{"choices": [{"text": piece} if is_plain else {"delta": {"content": piece}}]} for piece in pieces]
    last = {"choices": [], "usage": {"completion_tokens": len(pieces)}} | (
        {} if receipt is None else {"steering": receipt}
    )
    return [f"data: {json.dumps(event)}\n\n" for event in [*first, *texts, last]] + ["data: [DONE]\n\n"]


def _receipt(**changes: Any) -> dict[str, Any]:
    receipt = {"profile": "formal", "bundle": "sha256:" + "ab" * 32, "strength": 0.5, "scope": "all", "layers": [1, 2]}
    return receipt | {"tokens_steered": 9} | changes


def _refusal(status: int, code: str, message: str, **headers: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": code}}, status, headers)


def _run(page: Page) -> None:
    page.locator("#compare").get_by_role("button", name="Run", exact=True).click()


def test_model_text_and_receipts_stay_text(
    scripted: Any, visit: Callable[..., Any], profile: Callable[..., Any]
) -> None:
    scripted.profiles = [profile("formal")]
    marks = {"profile": HOSTILE, "scope": HOSTILE, "bundle": HOSTILE}
    scripted.chat = lambda _, body: _events(
        ["Say ", HOSTILE[:9], HOSTILE[9:]], _receipt(**marks) if "steering_profile" in body else None
    )
    page = visit(scripted.url).page
    title = page.title()
    _run(page)
    for card in page.locator("#compare .answer").all():
        expect(card.locator(".answer-text")).to_have_text(f"Say {HOSTILE}")
    expect(page.locator(".receipt dd").first).to_have_text(HOSTILE)
    assert page.locator("main :is(img, b, i)").count() == 0 and page.title() == title


def test_asks_for_a_key(scripted: Any, visit: Callable[..., Any], profile: Callable[..., Any]) -> None:
    def without_key(request: Request) -> JSONResponse | None:
        if request.headers.get("authorization") == "Bearer right":
            return None
        return _refusal(401, "invalid_api_key", "No key with this request; send one.")

    scripted.profiles, scripted.refusal = [profile("formal")], without_key
    scripted.chat = lambda _, body: _events(["yes"], _receipt() if "steering_profile" in body else None)
    seen = visit(scripted.url)
    seen.refusals.add(401)
    page = seen.page
    notice = page.locator("#notice")
    expect(notice).to_contain_text("No key with this request")
    expect(page.locator("#compare").get_by_role("button", name="Run")).to_be_disabled()
    for key in ("wrong", "right"):
        notice.get_by_role("button", name="Use a key").click()
        expect(page.get_by_label("API key")).to_be_focused()
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
    expect(notice).to_be_hidden()
    _run(page)
    expect(page.locator("#compare .answer-text").last).to_have_text("yes")
    assert {authorization for _, _, authorization in scripted.asked} == {"Bearer right"}
    assert "right" not in page.content().replace("bottom-right", "")


@pytest.mark.parametrize(
    ("status", "code", "headers", "said"),
    [
        (429, "steering_rate_limited", {"retry-after": "7"}, "Try again in 7 s."),
        (503, "steering_server_draining", {}, "no room"),
    ],
)
def test_says_why_and_tries_again(
    scripted: Any,
    visit: Callable[..., Any],
    profile: Callable[..., Any],
    status: int,
    code: str,
    headers: dict[str, str],
    said: str,
) -> None:
    scripted.profiles = [profile("formal")]
    scripted.chat = lambda _, body: _events(["yes"], _receipt() if "steering_profile" in body else None)
    seen = visit(scripted.url)
    seen.refusals.add(status)
    page = seen.page
    expect(page.get_by_role("group", name="formal")).to_be_visible()
    scripted.refusal = lambda _: _refusal(status, code, "There is no room.", **headers)
    _run(page)
    alerts = page.locator("#compare").get_by_role("alert")
    expect(alerts).to_have_count(2)
    for alert in alerts.all():
        expect(alert).to_contain_text(code)
        expect(alert).to_contain_text(said)
    scripted.refusal = lambda _: None
    alerts.first.get_by_role("button", name="Try again").click()
    expect(alerts).to_have_count(0)
    expect(page.locator("#compare .answer-text").last).to_have_text("yes")


def test_a_model_without_chat_template(scripted: Any, visit: Callable[..., Any], profile: Callable[..., Any]) -> None:
    scripted.profiles = [profile("formal")]
    scripted.refusal = lambda request: (
        _refusal(400, "BadRequestError", NO_TEMPLATE) if "chat" in request.url.path else None
    )
    scripted.chat = lambda _, body: _events(
        ["plain"], _receipt() if "steering_profile" in body else None, is_plain=True
    )
    seen = visit(scripted.url)
    seen.refusals.add(400)
    page = seen.page
    _run(page)
    alerts = page.locator("#compare").get_by_role("alert")
    expect(alerts.first).to_contain_text(NO_TEMPLATE)
    alerts.first.get_by_role("button", name="Use plain completion").click()
    expect(page.locator("#compare .answer-text")).to_have_text(["plain", "plain"])
    assert [body["prompt"] for path, body, _ in scripted.asked if path == "completions"] == ["What is 7 plus 5?"] * 2


def test_a_remedy_while_the_other_answer_runs(
    scripted: Any, visit: Callable[..., Any], profile: Callable[..., Any]
) -> None:
    """It stops what runs: both answers are to the same question in the same form."""
    chats = itertools.count()
    scripted.profiles = [profile("formal")]
    scripted.refusal = lambda request: (
        _refusal(400, "BadRequestError", NO_TEMPLATE) if "chat" in request.url.path and next(chats) == 0 else None
    )
    scripted.chat = lambda path, body: (
        [None]
        if path.startswith("chat")
        else _events(["plain"], _receipt() if "steering_profile" in body else None, is_plain=True)
    )
    seen = visit(scripted.url)
    seen.refusals.add(400)
    _run(seen.page)
    seen.page.locator("#compare").get_by_role("button", name="Use plain completion").click()
    texts = seen.page.locator("#compare .answer-text")
    expect(texts).to_have_text(["plain", "plain"])
    scripted.gate.set()


def test_a_key_that_comes_while_the_server_answers(
    scripted: Any, visit: Callable[..., Any], blank_page: Callable[..., Any], profile: Callable[..., Any]
) -> None:
    """What the server says to the page without the key does not count any more."""

    def without_key(request: Request) -> JSONResponse | None:
        is_right = request.headers.get("authorization") == "Bearer right"
        return None if is_right else _refusal(401, "invalid_api_key", "No key with this request; send one.")

    held: list[Route] = []

    def hold_first(route: Route) -> None:
        if "authorization" in route.request.headers:
            route.continue_()
        else:
            held.append(route)

    scripted.profiles, scripted.refusal = [profile("formal")], without_key
    seen = blank_page(scripted.url)
    seen.refusals.add(401)
    page = seen.page
    page.route("**/v1/**", hold_first)
    with page.expect_request("**/v1/models"), page.expect_request("**/v1/steering/profiles?*"):
        page.goto(seen.url)
    page.get_by_role("button", name="Set key").click()
    page.get_by_label("API key").fill("right")
    page.keyboard.press("Enter")
    expect(page.get_by_role("group", name="formal")).to_be_visible()
    for route in held:
        route.fulfill(status=401, json={"error": {"message": "Too late.", "code": "invalid_api_key"}})
    page.get_by_role("tab", name="Strengths").click()
    expect(page.locator("#strengths").get_by_role("button", name="Run")).to_be_enabled()
    expect(page.locator("#notice")).to_be_hidden()


def test_a_key_that_no_header_can_carry(scripted: Any, visit: Callable[..., Any]) -> None:
    page = visit(scripted.url).page
    page.get_by_role("button", name="Set key").click()
    field = page.get_by_label("API key")
    for key, number in (("right\u2013hand", "U+2013"), ("\U0001f511", "U+1F511"), ("right\u200b", "U+200B")):
        field.fill(key)
        page.keyboard.press("Enter")
        assert number in field.evaluate("field => field.validationMessage")
        expect(page.get_by_role("dialog")).to_be_visible()
    field.fill(" sch\u00f6n ")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Forget key")).to_be_visible()


def test_enter_in_a_field_begins_one_run_and_stops_none(
    scripted: Any, visit: Callable[..., Any], profile: Callable[..., Any]
) -> None:
    scripted.profiles = [profile(f"profile-{number:04}") for number in range(60)]
    scripted.chat = lambda _, body: [*_events(["yes"])[:2], None, *_events(["yes"])[2:]]
    page = visit(scripted.url).page
    view = page.locator("#compare")
    page.get_by_label("Filter").fill("0031")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Add a profile").locator("option")).to_have_count(2)
    number = view.get_by_role("spinbutton", name="Strength of profile-0000")
    number.fill("0.25")
    page.keyboard.press("Enter")
    expect(view.locator(".answer[data-state=writing]")).to_have_count(2)
    number.fill("0.75")
    page.keyboard.press("Enter")
    expect(view.get_by_role("button", name="Stop")).to_be_visible()
    scripted.gate.set()
    expect(view.locator(".answer[data-state=done]")).to_have_count(2)
    expect(view.get_by_role("button", name="Run", exact=True)).to_be_visible()
    strengths = [body["steering_profile"]["strength"] for _, body, _ in scripted.asked if "steering_profile" in body]
    assert strengths == [0.25] and len(scripted.asked) == 2


def test_code_of_a_strength_is_what_was_asked(
    scripted: Any, visit: Callable[..., Any], profile: Callable[..., Any]
) -> None:
    scripted.profiles = [profile("formal")]
    scripted.chat = lambda _, __: _events(["yes"])
    page = visit(scripted.url, "#strengths").page
    view = page.locator("#strengths")
    view.get_by_label("Prompt", exact=True).fill("What was asked?")
    view.get_by_role("button", name="Run", exact=True).click()
    expect(view.locator(".answer[data-state=done]")).to_have_count(5)
    view.get_by_label("Prompt", exact=True).fill("What is asked next?")
    view.get_by_text("Settings").click()
    view.get_by_label("Temperature").fill("")
    view.get_by_label("Scope").select_option("prompt")
    view.get_by_role("button", name="Code for strength 0.5").click()
    shown = page.get_by_role("dialog").locator("pre").text_content() or ""
    asked = next(body for _, body, _ in scripted.asked if body["steering_profile"]["strength"] == 0.5)
    expected = {name: value for name, value in asked.items() if not name.startswith("stream")}
    assert json.loads(shown.partition("-d '")[2].rstrip().removesuffix("'")) == expected
    assert expected["messages"][-1]["content"] == "What was asked?"


def test_another_version_of_a_profile_proposes_its_strengths(
    scripted: Any, visit: Callable[..., Any], profile: Callable[..., Any]
) -> None:
    scripted.profiles = [profile("formal")]
    page = visit(scripted.url, "#strengths").page
    strengths = page.locator("#strengths").get_by_label("Strengths", exact=True)
    expect(strengths).to_have_value("-1.5  -0.5  0  0.5  1.5")

    def change(**changes: Any) -> None:
        scripted.profiles = [profile("formal", **changes)]
        page.get_by_role("tab", name="Compare").click()
        page.get_by_role("tab", name="Strengths").click()

    # Rounded to four digits, this bound would be over itself.
    change(generation=2, maximum_strength=2 / 3, strength=0.25)
    expect(strengths).to_have_value(f"{-2 / 3}  -0.25  0  0.25  {2 / 3}")
    assert strengths.evaluate("field => field.validationMessage") == ""
    change(generation=3, maximum_strength=1, strength=0.25)
    expect(strengths).to_have_value("-1  -0.25  0  0.25  1")
    strengths.fill("0.75")
    change(generation=4, maximum_strength=0.5, strength=0.25)
    expect(page.locator("#strengths")).to_contain_text("From \u22120.5 to 0.5")
    expect(strengths).to_have_value("0.75")
    assert "0.75 is outside" in strengths.evaluate("field => field.validationMessage")


def test_the_slider_reaches_off_and_the_field_the_bound(
    scripted: Any, visit: Callable[..., Any], profile: Callable[..., Any]
) -> None:
    """The bound is no whole number of the slider's steps."""
    scripted.profiles = [profile("formal", maximum_strength=1.23456)]
    page = visit(scripted.url).page
    slider, number = page.get_by_role("slider"), page.get_by_role("spinbutton", name="Strength of formal")
    slider.fill("0")
    expect(number).to_have_value("0")
    expect(slider).to_have_attribute("aria-valuetext", "0, off")
    for key, end in (("Home", "-1.22"), ("End", "1.22")):
        slider.press(key)
        expect(number).to_have_value(end)
    for bound in ("-1.23456", "1.23456"):
        number.fill(bound)
        assert number.evaluate("field => field.validity.valid")


def test_a_long_description_without_spaces_is_cut(
    scripted: Any, visit: Callable[..., Any], profile: Callable[..., Any]
) -> None:
    scripted.profiles = [profile("formal", description="\u6f22" * 400)]
    about = visit(scripted.url).page.locator(".about")
    expect(about.locator("summary")).to_have_text("\u6f22" * 180 + " \u2026")
    about.locator("summary").click()
    expect(about.locator("p")).to_have_text("\u6f22" * 400)


def test_a_model_that_went_away(scripted: Any, visit: Callable[..., Any]) -> None:
    seen = visit(scripted.url)
    seen.refusals.add(404)
    expect(seen.page.locator("#only-model")).to_have_text("lab")
    scripted.models = ["other"]
    scripted.refusal = lambda request: (
        _refusal(404, "model_not_found", "No such model.") if request.method == "POST" else None
    )
    _run(seen.page)
    expect(seen.page.locator("#only-model")).to_have_text("other")


def test_streams_that_break(scripted: Any, visit: Callable[..., Any], profile: Callable[..., Any]) -> None:
    scripted.profiles = [profile("formal")]
    error = {"error": {"message": "The workers reported nothing.", "code": "steering_not_applied", "status": 500}}
    scripted.chat = lambda _, body: (
        [*_events(["half"])[:2], f"data: {json.dumps(error)}\n\n", "data: [DONE]\n\n"]
        if "steering_profile" in body
        else _events(["half"])[:2]
    )
    page = visit(scripted.url).page
    _run(page)
    plain, steered = page.locator("#compare .answer").all()
    expect(plain.get_by_role("alert")).to_contain_text("stopped before its end")
    expect(steered.get_by_role("alert")).to_contain_text("steering_not_applied")
    for card in (plain, steered):
        expect(card.locator(".answer-text")).to_have_text("half")
        expect(card.locator(".badge")).to_have_text("Failed")


@pytest.mark.parametrize("data", ["no JSON", "null", '"text"'])
def test_events_of_another_form(scripted: Any, visit: Callable[..., Any], data: str) -> None:
    scripted.chat = lambda _, __: [*_events(["half"])[:2], f"data: {data}\n\n", "data: [DONE]\n\n"]
    page = visit(scripted.url).page
    _run(page)
    plain = page.locator("#compare .answer.plain")
    expect(plain.get_by_role("alert")).to_contain_text("stream_invalid")
    expect(plain.locator(".answer-text")).to_have_text("half")


def test_a_server_that_went_away(scripted: Any, visit: Callable[..., Any], profile: Callable[..., Any]) -> None:
    scripted.profiles = [profile("formal")]
    seen = visit(scripted.url)
    page = seen.page
    expect(page.get_by_role("group", name="formal")).to_be_visible()
    page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    _run(page)
    expect(page.locator("#compare").get_by_role("alert")).to_have_count(2)
    expect(page.locator("#compare").get_by_role("alert").first).to_contain_text("No answer from the server")
    assert seen.errors and all("ERR_CONNECTION_REFUSED" in error for error in seen.errors)
    seen.errors.clear()


def test_several_models(scripted: Any, visit: Callable[..., Any], profile: Callable[..., Any]) -> None:
    scripted.models = ["lab", "tuned@home"]
    scripted.chat = lambda _, __: _events(["yes"])
    page = visit(scripted.url).page
    page.get_by_label("Model").select_option("tuned@home")
    _run(page)
    expect(page.locator("#compare .answer-text").first).to_have_text("yes")
    assert [body["model"] for _, body, _ in scripted.asked] == ["tuned@home"]


def test_a_thousand_profiles(scripted: Any, visit: Callable[..., Any], profile: Callable[..., Any]) -> None:
    scripted.profiles = [profile(f"profile-{number:04}") for number in range(1100)]
    page = visit(scripted.url).page
    expect(page.get_by_role("group", name="profile-0000")).to_be_visible()
    choice = page.get_by_label("Add a profile")
    expect(choice.locator("option")).to_have_count(1100)
    page.get_by_label("Filter").fill("0998 does")
    expect(choice.locator("option")).to_have_count(2)
    expect(choice.locator("option").first).to_have_text("Choose, 1 match \u2026")
    choice.select_option("profile-0998")
    expect(page.get_by_role("group", name="profile-0998")).to_be_visible()


def test_an_answer_is_shown_while_it_comes(scripted: Any, visit: Callable[..., Any]) -> None:
    pieces = _events(["one", " two", " three"])
    scripted.chat = lambda _, __: [*pieces[:2], None, *pieces[2:]]
    page = visit(scripted.url).page
    _run(page)
    plain = page.locator("#compare .answer.plain")
    expect(plain).to_have_attribute("data-state", "writing")
    expect(plain.locator(".answer-text")).to_have_text("one")
    expect(plain.locator(".figures")).to_have_text(re.compile(r"^1 token \S+ first after"))
    # A rate is only shown of what took some time.
    page.wait_for_timeout(50)
    page.get_by_role("tab", name="Strengths").click()
    with page.expect_event("requestfinished", lambda request: request.method == "POST"):
        scripted.gate.set()
    page.get_by_role("tab", name="Compare").click()
    expect(plain).to_have_attribute("data-state", "done")
    expect(plain.locator(".answer-text")).to_have_text("one two three")
    expect(plain.locator(".figures")).to_have_text(re.compile(r"^3 tokens .* tokens/s .*first after"))
    expect(page.locator("#compare")).to_have_attribute("data-state", "idle")


def test_differences_show_while_answers_grow(
    scripted: Any, visit: Callable[..., Any], profile: Callable[..., Any]
) -> None:
    scripted.profiles = [profile("formal")]
    plain, steered = _events(["one two three ", "four five"]), _events(["one too three", " fore"], _receipt())
    scripted.chat = lambda _, body: (
        [*steered[:2], None, *steered[2:]] if "steering_profile" in body else [*plain[:3], None, *plain[3:]]
    )
    page = visit(scripted.url).page
    _run(page)
    only_plain, only_steered = page.locator("#compare .answer del"), page.locator("#compare .answer ins")
    # The steered answer may yet say "four five".
    expect(page.locator("#compare .answer.plain .answer-text")).to_have_text("one two three four five")
    expect(only_plain).to_have_text(["two"])
    expect(only_steered).to_have_text(["too"])
    expect(page.locator("#compare .summary")).to_have_text("")
    scripted.gate.set()
    expect(only_plain).to_have_text(["two", "four five"])
    expect(only_steered).to_have_text(["too", "fore"])
    expect(page.locator("#compare .summary")).to_have_text(
        "3 words only in the default answer, 2 only in the steered one."
    )

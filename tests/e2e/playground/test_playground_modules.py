"""The playground's modules that need no page: the stream parser, the comparison of words, steps, strengths."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page

_PIECES = (
    "data: one",
    "data:two",
    "data",
    "data: \u00e9\u6f22\U0001f642",
    ": comment",
    "event: x",
    "id: 1",
    "data:  x ",
)
_WORDS = ("the", "cat", "sat", ",", "7", "12", "isn't", "\u6f22\u5b57", "caf\u00e9", "\n\n", " ", "<b>", "\U0001f642")


@pytest.fixture
def page(scripted: Any, visit: Callable[..., Any]) -> Page:
    """A page whose scripts may be imported."""
    opened: Page = visit(scripted.url).page
    return opened


def _expected(lines: list[str]) -> list[str]:
    """Data of events, as the HTML standard reads lines."""
    events, data = [], []
    for line in lines:
        if line == "" and data:
            events.append("\n".join(data))
        if line == "":
            data = []
        elif line == "data" or line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
    return events


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_events_wherever_chunks_are_cut(page: Page, end: str) -> None:
    generator = random.Random(7)
    for _ in range(20):
        lines = [generator.choice((*_PIECES, "", "")) for _ in range(12)] + [""]
        text = "".join(line + end for line in lines)
        found = page.evaluate(
            """async (text) => {
                const { events } = await import("./events.js");
                const bytes = new TextEncoder().encode(text);
                const results = [];
                for (const size of [1, 2, 3, 7, bytes.length]) {
                    const body = new ReadableStream({
                        start(controller) {
                            for (let at = 0; at < bytes.length; at += size) {
                                controller.enqueue(bytes.slice(at, at + size));
                            }
                            controller.close();
                        },
                    });
                    results.push(await Array.fromAsync(events(body)));
                }
                return results;
            }""",
            text,
        )
        assert found == [_expected(lines)] * 5, text


def _compare(page: Page, first: str, second: str, is_final: bool = True) -> Any:
    return page.evaluate(
        'async ([...texts]) => (await import("./words.js")).compared(...texts)', [first, second, is_final]
    )


def _marked(pieces: list[dict[str, Any]]) -> list[str]:
    return [piece["text"] for piece in pieces if piece["isMarked"]]


@pytest.mark.parametrize(
    ("first", "second", "only_first", "only_second"),
    [
        ("7 plus 5 is 13.", "7 plus 5 is 12.", ["13"], ["12"]),
        ("same words", "same  words", [], []),
        ("", "all new", [], ["all new"]),
        ("a b c d", "a x c", ["b", "d"], ["x"]),
        ("keep it, please", "keep it please", [","], []),
        ("\u6f22\u5b57\u306f", "\u6f22\u5b57\u304c", ["\u306f"], ["\u304c"]),
        ("one two three", "two three four", ["one"], ["four"]),
    ],
)
def test_words_that_differ(page: Page, first: str, second: str, only_first: list[str], only_second: list[str]) -> None:
    found = _compare(page, first, second)
    assert (_marked(found["first"]), _marked(found["second"])) == (only_first, only_second)


def test_comparison_loses_nothing_and_finds_the_longest_common_part(page: Page) -> None:
    generator = random.Random(8)
    for _ in range(60):
        texts = [" ".join(generator.choice(_WORDS) for _ in range(generator.randrange(14))) for _ in range(2)]
        for is_final in (True, False):
            found = _compare(page, *texts, is_final)
            assert ["".join(piece["text"] for piece in found[side]) for side in ("first", "second")] == texts
        words, marks, few = page.evaluate(
            """async ([first, second]) => {
                const { common, wordsOf } = await import("./words.js");
                const words = [wordsOf(first), wordsOf(second)];
                return [words.map((list) => list.map(({ text }) => text)), common(...words), common(...words, 0)];
            }""",
            texts,
        )
        kept = [[w for w, is_kept in zip(words[i], marks[s], strict=True) if is_kept] for i, s in enumerate(marks)]
        assert kept[0] == kept[1] and len(kept[0]) == _longest(*words)
        assert sum(few["first"]) == sum(few["second"]) <= len(kept[0])


def _longest(first: list[str], second: list[str]) -> int:
    row = [0] * (len(second) + 1)
    for one in first:
        before, row = row, [0]
        for index, two in enumerate(second):
            row.append(before[index] + 1 if one == two else max(before[index + 1], row[index]))
    return row[-1]


def test_texts_are_compared_anew_only_where_they_changed(page: Page) -> None:
    found = page.evaluate(
        """async () => {
            const { Comparison } = await import("./words.js");
            const comparison = new Comparison();
            const asked = [["a b", "", false], ["a b", "a", false], ["a b", "a", false], ["a b", "a c", false]];
            const found = [...asked, ["a b", "a c", true], ["a b", "a c", true]].map((each) => comparison.of(...each));
            return [found[0], found[1] === found[2], found[2] === found[3], found[4] === found[5], found[3], found[4]];
        }"""
    )
    assert found[:4] == [None, True, False, True]
    assert [each["numSecond"] for each in found[4:]] == [0, 1]


@pytest.mark.parametrize("maximum", [0.003, 0.08, 0.8, 1, 1.5, 4, 7.3, 100, 12345])
def test_steps_are_round_and_enough(page: Page, maximum: float) -> None:
    step = page.evaluate('async (maximum) => (await import("./strength.js")).stepOf(maximum)', maximum)
    assert 30 <= maximum / step <= 85
    assert f"{step:.0e}"[0] in "125"


def test_hidden_characters_are_escaped_in_code(page: Page) -> None:
    prompt = "a\u202eb\u200bc\u2028d\x7fe\ufeff"
    texts = page.evaluate(
        """async (prompt) => {
            const { curlText, pythonText } = await import("./copy.js");
            const steering_profile = [{ name: "p" }, { name: "q" }];
            const body = { model: "m", prompt, seed: null, echo: true, steering_profile };
            return [curlText("http://x/v1/completions", body, false), pythonText("http://x/v1", body, false)];
        }""",
        prompt,
    )
    for text in texts:
        assert all(character.isprintable() or character == "\n" for character in text)
        assert r"a\u202eb\u200bc\u2028d\u007fe\ufeff" in text
    assert json.loads(texts[0].partition("-d '")[2].rstrip().removesuffix("'"))["prompt"] == prompt
    compile(texts[1], "copied", "exec")

"""The model card: what it tells, and that the text of a bundle's author formats nothing."""

import argparse
import random
import string
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from artifacts.bundle import Bundle, load_bundle, write_bundle
from artifacts.commands import card as command
from artifacts.interchange.card import model_card
from artifacts.interchange.figure_table import figure_tables
from artifacts.interchange.markdown import escaped, paragraph, plain
from artifacts.manifest import Intervention, LayerPair, Manifest, ModelIdentity

LAB_BUNDLE = Path(__file__).parents[2] / "artifacts" / "lab" / "careful.safetensors"
HOSTILE = (
    "](https://evil.example) ![x](https://evil.example/x.png) <script>alert(1)</script> <!-- `code` **bold** | cell |\n"
    "---\n# Title\n- item\n&lt; $$x$$ \\\\(y\\\\) \\(z\\) @someone www.evil.example http://evil.example a@b.example\n"
    "licence: none\x1b[2J\u202e ~~gone~~ ![^1] [a]: http://evil.example\n\n    indented\n\n> quote\n===\n1. one\n"
)
MakeBundle = Callable[..., Bundle]


@pytest.fixture
def make_bundle_of(tmp_path: Path) -> MakeBundle:
    """A bundle whose manifest has the given fields."""

    def make(**fields: Any) -> Bundle:
        manifest = {
            "name": "careful",
            "target": ModelIdentity(id="org/tiny", architecture="LlamaForCausalLM", hidden_size=4, num_layers=6),
            "interventions": (Intervention(layer=2, kind="add", write="runtime.2.0.write"),),
            "recommended_strength": 0.5,
            "maximum_strength": 1.5,
        }
        path = tmp_path / "card.safetensors"
        write_bundle(path, Manifest(**(manifest | fields)), {"runtime.2.0.write": torch.ones(4)})
        return load_bundle(path)

    return make


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def tokens(text: str) -> list[Token]:
    """Every token of a page, those within lines included."""
    found: list[Token] = []
    for token in MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(text):
        found += [token, *(token.children or ())]
    return found


def cells(text: str) -> dict[str, str]:
    """First and second cell of every table row, as rendered."""
    inline = [token for token in MarkdownIt("commonmark").enable("table").parse(text) if token.type == "inline"]
    words = ["".join(child.content for child in token.children or ()) for token in inline]
    return dict(pairwise(words))


def test_the_card_names_kinds_and_excluded_spans(
    make_bundle: Callable[..., Path], kind_examples: dict[str, dict[str, Any]]
) -> None:
    path = make_bundle("turn", [1, 4], 1, steps=[kind_examples["rotate"], {"kind": "add"}], exclude=("tool_calls",))
    text = model_card(load_bundle(path), "turn.safetensors")
    assert "it acts on the residual stream" in text
    assert cells(text)["decoder blocks, from 0"] == "1 (rotate), 4 (add)"
    assert cells(text)["tokens"] == "all tokens, without tool calls"
    assert "it adds vectors to the residual stream" in model_card(load_bundle(make_bundle("plain", [1], 1)), "p")


def test_the_card_of_the_lab_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "README.md"
    assert run(LAB_BUNDLE, "-o", path) == 0
    assert run(LAB_BUNDLE) == 0
    assert capsys.readouterr().out == path.read_text()
    card = ModelCard(path.read_text())
    assert card.data.to_dict() == {
        "base_model": "expertsteer-lab-target",
        "library_name": "expertsteer",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["activation-steering", "steering-vector", "expertsteer"],
    }
    bundle = load_bundle(LAB_BUNDLE)
    shown = cells(card.text)
    assert shown["bundle"] == bundle.digest
    assert shown["recommended strength"] == "0.5"
    assert shown["decoder blocks, from 0"] == "2 (add)"
    assert shown["paired layers, expert to target"] == "3 to 2"
    assert shown["target weights"] == bundle.manifest.target.fingerprint
    for text in ("0.8971", "0.9265", "untrained expert", "random", bundle.manifest.description):
        assert text in card.text
    assert "expertsteer serve expertsteer-lab-target --steering-bundle careful.safetensors" in card.text


def test_the_card_does_not_depend_on_the_order_of_keys(make_bundle_of: MakeBundle) -> None:
    results = {"off": 0.25, "on": {"accuracy": 0.5, "strength": 0.4}}
    turned = {"on": {"strength": 0.4, "accuracy": 0.5}, "off": 0.25}
    cards = {model_card(make_bundle_of(evaluation={"test": each}), "a.safetensors") for each in (results, turned)}
    assert len(cards) == 1


def test_hostile_text_is_shown_as_words(make_bundle_of: MakeBundle) -> None:
    identity = ModelIdentity(
        id=HOSTILE, revision=HOSTILE, architecture=HOSTILE, hidden_size=4, num_layers=6, fingerprint=None
    )
    hostile = make_bundle_of(
        description=HOSTILE,
        licence=HOSTILE,
        target=identity,
        expert=identity,
        layer_pairs=(LayerPair(expert=0, target=2),),
        evaluation={"test": {HOSTILE: {HOSTILE: HOSTILE}}, "source": {"file": HOSTILE}},
        tool_versions={HOSTILE: HOSTILE},
    )
    harmless = make_bundle_of(
        description="words",
        licence="words, not an identifier",
        target=identity.model_copy(update={"id": "a b", "revision": "words", "architecture": "words"}),
        expert=identity.model_copy(update={"id": "a b", "revision": "words", "architecture": "words"}),
        layer_pairs=(LayerPair(expert=0, target=2),),
        evaluation={"test": {"words": {"words": "words"}}, "source": {"file": "words"}},
        tool_versions={"words": "words"},
    )
    card = ModelCard(model_card(hostile, HOSTILE))
    assert card.data.to_dict() == {
        "license": "other",
        "license_name": plain(HOSTILE),
        "library_name": "expertsteer",
        "pipeline_tag": "text-generation",
        "tags": ["activation-steering", "steering-vector", "expertsteer"],
    }
    # Same structure as a card of plain words: not one token more.
    kinds = [token.type for token in tokens(card.text) if token.type not in ("text", "text_special")]
    assert kinds == [token.type for token in tokens(ModelCard(model_card(harmless, "x")).text) if token.type != "text"]
    assert not {"link_open", "image", "html_inline", "html_block", "em_open", "s_open"} & set(kinds)
    assert plain(HOSTILE) in "".join(token.content for token in tokens(card.text) if token.type == "inline").replace(
        "\\", ""
    ).replace("&#92;", "\\")
    # Addresses of no angle brackets, which some renderers turn into links, and formulas of the hub.
    for forbidden in ("https:", "http:", "www.", "a@b", "$$", "\\(", "\x1b", "\u202e"):
        assert forbidden not in card.text


def test_any_text_renders_as_itself() -> None:
    source = random.Random(0)
    signs = string.punctuation + " a1\n\t"
    for _ in range(500):
        text = "".join(source.choices(signs, k=source.randint(1, 30)))
        if not plain(text):
            continue
        found = tokens(paragraph(text))
        assert [token.type for token in found if token.block] == ["paragraph_open", "inline", "paragraph_close"]
        assert {token.type for token in found if not token.block} <= {"text", "text_special"}, text
        row = tokens(f"| a | b |\n| :-- | :-- |\n| {escaped(text)} | end |")
        inline = [token for token in row if token.type == "inline"]
        assert len(inline) == 4
        for children in (found[1].children, inline[2].children):
            assert "".join(child.content for child in children or ()) == plain(text)


def test_licence_and_base_model_that_the_hub_would_refuse(make_bundle_of: MakeBundle) -> None:
    for licence, expected in (
        ("", {}),
        ("CC-BY-SA-4.0", {"license": "cc-by-sa-4.0"}),
        ("Our own licence", {"license": "other", "license_name": "Our own licence"}),
        ("no: 'x'\n---\nevil: true", {"license": "other", "license_name": "no: 'x' --- evil: true"}),
    ):
        text = model_card(make_bundle_of(licence=licence), "a.safetensors")
        front = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
        assert {key: value for key, value in front.items() if key.startswith("license")} == expected
        assert front["base_model"] == "org/tiny" and "evil" not in front
    target = ModelIdentity(id="/home/x/model", architecture="A", hidden_size=4, num_layers=6)
    card = ModelCard(model_card(make_bundle_of(target=target), "a; rm -rf.safetensors"))
    assert "base_model" not in card.data.to_dict()
    assert "expertsteer serve MODEL --steering-bundle careful.safetensors" in card.text


def test_figures_with_controls_and_intervals() -> None:
    tables = figure_tables(
        {
            "test": {"off": 0.25, "on": {"accuracy": 0.83821, "interval": [0.78, 0.88], "better": True}, "none": None},
            "controls": {"own": {"strength": 0.5}, "permuted-labels": {"strength": 0.25, "trials": [1, 2, 3]}},
            "other": {"x": 1.0},
        }
    )
    assert len(tables) == 2
    assert tables[0].splitlines()[2:] == [
        "|  | value | accuracy | interval | better |",
        "| :-- | --: | --: | --: | --: |",
        "| off | 0.25 |  |  |  |",
        "| on |  | 0.8382 | 0.78 to 0.88 | yes |",
        "| none |  |  |  |  |",
    ]
    assert "| permuted-labels | 0.25 | 3 entries |" in tables[1]
    assert figure_tables({"test": {}, "tune": {"a": 1}}) == []


def test_a_long_table_says_what_it_leaves_out() -> None:
    rows = {f"control-{number}": {f"q{column}": 1 for column in range(10)} for number in range(100)}
    (text,) = figure_tables({"controls": rows})
    assert text.count("\n| control") == 60
    assert text.endswith("42 more rows or columns are left out here.")


def test_without_evaluation_the_card_says_so(make_bundle_of: MakeBundle) -> None:
    assert "No measurement of its effect comes with the bundle." in model_card(make_bundle_of(), "a.safetensors")
    imported = model_card(make_bundle_of(evaluation={"source": {"format": "gguf"}}), "a.safetensors")
    assert "imported from a file of another program" in imported


def test_a_damaged_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(LAB_BUNDLE.read_bytes()[:1000])
    assert run(path) == 1
    assert run(LAB_BUNDLE, "-o", tmp_path / "no" / "README.md") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(":")[0] for line in captured.err.splitlines()] == ["expertsteer card"] * 2

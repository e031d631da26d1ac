"""Positions and the tokens they point at, in the lab's own tokenizer under several chat templates."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from artifacts.jobs.data import Text
from artifacts.jobs.encoding import Encoded, RowEncoder
from artifacts.jobs.errors import BuildError
from artifacts.jobs.position import LAST, Position, parse_position

LAB_TARGET = Path(__file__).parents[2] / "artifacts" / "lab" / "models" / "target"
SYSTEM = {"role": "system", "content": "You are a careful clerk."}
USER = {"role": "user", "content": "What is 7 plus 5?"}
ANSWER = {"role": "assistant", "content": "7 plus 5 is 12."}
TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
# Writes an empty thought before a last answer, but not into the generation prompt.
EMPTY_THOUGHT = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if loop.last and m.role == 'assistant' %}Hmm.\n{% endif %}{{ m.content }}<|end|>{% endfor %}" + PROMPT
)
# Opens a thought in the generation prompt that a finished answer does not have.
OPEN_THOUGHT = TURNS + "{% if add_generation_prompt %}<|assistant|>Hmm.\n{% endif %}"
SHOUTS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | upper }}<|end|>{% endfor %}" + PROMPT
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
# Every answer begins with a blank, which the tokenizer joins to the first word.
BLANK = "{% for m in messages %}<|{{ m.role }}|> {{ m.content | trim }}<|end|>{% endfor %}" + PROMPT


@pytest.fixture
def tokenizer() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(LAB_TARGET)


@pytest.fixture
def encoder(tokenizer: Any) -> RowEncoder:
    return RowEncoder("lab", tokenizer, 512)


def _chat(*messages: dict[str, str]) -> Text:
    return Text.model_validate({"messages": messages})


def _read(tokenizer: Any, encoded: Encoded, form: str) -> str:
    """Text at a position."""
    position = parse_position(form)
    token = RowEncoder("lab", tokenizer, 512).token_id(position.token) if position.kind == "token" else None
    span = position.span(encoded, token)
    return str(tokenizer.decode([encoded.ids[place] for place in span]))


@pytest.mark.parametrize("form", ["last", "last-prompt", "mean-response", "token:12", "token:<|end|>", "token::"])
def test_forms_are_read_and_written(form: str) -> None:
    assert str(parse_position(form)) == form


@pytest.mark.parametrize("form", ["", "first", "token", "token:", "last:", "Last", "mean", " last", "last-prompt:3"])
def test_other_forms_are_refused(form: str) -> None:
    with pytest.raises(ValueError, match=r"allowed are last, last-prompt, mean-response or token:TOKEN"):
        parse_position(form)


def test_chat_that_waits_for_an_answer(tokenizer: Any, encoder: RowEncoder) -> None:
    encoded = encoder.encode(_chat(SYSTEM, USER))
    expected = tokenizer.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, return_dict=False)
    assert encoded == Encoded(expected, len(expected), None)
    assert _read(tokenizer, encoded, "last") == _read(tokenizer, encoded, "last-prompt") == "<|assistant|>"
    assert _read(tokenizer, encoded, "token:<|system|>") == "<|system|>"
    with pytest.raises(ValueError, match="there is no response; end the chat in an assistant message"):
        parse_position("mean-response").span(encoded)


@pytest.mark.parametrize("template", [None, EMPTY_THOUGHT, BLANK], ids=["plain", "empty thought", "blank"])
def test_chat_with_its_answer(tokenizer: Any, encoder: RowEncoder, template: str | None) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    encoded = encoder.encode(_chat(SYSTEM, USER, ANSWER))
    prompt = tokenizer.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, return_dict=False)
    assert encoded.ids[: encoded.prompt_length] == prompt
    assert _read(tokenizer, encoded, "last-prompt") == "<|assistant|>"
    assert _read(tokenizer, encoded, "mean-response").strip() == ANSWER["content"]
    assert _read(tokenizer, encoded, "last") == "."
    assert parse_position("token:<|user|>").span(encoded, encoder.token_id("<|user|>")).start < len(prompt)


def test_white_space_around_an_answer_does_not_move_it(encoder: RowEncoder, tokenizer: Any) -> None:
    spaced = encoder.encode(_chat(USER, ANSWER | {"content": " 7 plus 5 is 12. \n"}))
    assert _read(tokenizer, spaced, "last") == "."
    assert _read(tokenizer, spaced, "mean-response").strip() == ANSWER["content"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (OPEN_THOUGHT, r"does not put the response behind its generation prompt '.*<\|assistant\|>Hmm.\\n' unchanged"),
        (SHOUTS, "refuses a chat with roles user, assistant: continue_final_message"),
        ("{{ raise_exception('no') }}", "refuses a chat with roles user, assistant: no"),
    ],
    ids=["open thought", "changed text", "refusal"],
)
def test_templates_without_a_border_are_refused(tokenizer: Any, encoder: RowEncoder, template: str, said: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(BuildError, match=said):
        encoder.encode(_chat(USER, ANSWER))


def test_template_without_a_system_role(tokenizer: Any, encoder: RowEncoder) -> None:
    tokenizer.chat_template = NO_SYSTEM
    with pytest.raises(BuildError, match=r"refuses a chat with roles system, user: System role not supported"):
        encoder.encode(_chat(SYSTEM, USER))


def test_plain_text(tokenizer: Any, encoder: RowEncoder) -> None:
    encoded = encoder.encode(Text(text="7 plus 5 is 12."))
    assert encoded == Encoded(tokenizer("<|bos|>7 plus 5 is 12.", add_special_tokens=False)["input_ids"])
    assert _read(tokenizer, encoded, "last") == "."
    for form in ("last-prompt", "mean-response"):
        with pytest.raises(ValueError, match="`response`"):
            parse_position(form).span(encoded)


def test_plain_text_with_a_response(tokenizer: Any, encoder: RowEncoder) -> None:
    encoded = encoder.encode(Text(text="What is 7 plus 5?", response=" The answer is 12."))
    assert encoded.ids == encoder.encode(Text(text="What is 7 plus 5? The answer is 12.")).ids
    assert _read(tokenizer, encoded, "last-prompt") == "?"
    assert _read(tokenizer, encoded, "mean-response") == " The answer is 12."


def test_responses_that_melt_into_the_prompt_are_refused(encoder: RowEncoder) -> None:
    with pytest.raises(BuildError, match="a row of no file: with its response behind it, the prompt's"):
        encoder.encode(Text(text="7 pl", response="us 5 is 12."))


def test_token_names(tokenizer: Any, encoder: RowEncoder) -> None:
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert encoder.token_id("<|end|>") == encoder.token_id(str(end)) == end
    assert tokenizer.decode([encoder.token_id(" plus")]) == " plus"
    with pytest.raises(BuildError, match="lab has 640 tokens, so there is no token id 640"):
        encoder.token_id("640")
    with pytest.raises(BuildError, match=r"'plus minus' is \d tokens of lab"):
        encoder.token_id("plus minus")


def test_tokens_are_found_at_their_last_occurrence() -> None:
    encoded = Encoded([5, 7, 5, 9])
    assert Position("token", "x").span(encoded, 5) == range(2, 3)
    assert Position("token", "x").span(encoded, 9) == range(3, 4)
    assert LAST.span(encoded) == range(3, 4)
    with pytest.raises(ValueError, match=r"the token 'x' \(id 4\) does not occur"):
        Position("token", "x").span(encoded, 4)

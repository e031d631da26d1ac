"""Gates: who sets them, in which order, and which tokens a trigger means."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from artifacts.bundle import BundleError, BundleErrorCode
from artifacts.manifest import Manifest, ModelIdentity, from_metadata, to_metadata
from server.triggers import resolve_triggers, vocabulary_of

TARGET = ModelIdentity(id="tiny", architecture="LlamaForCausalLM", hidden_size=16, num_layers=6)
THRESHOLD = {"parameters": {"threshold": 0.0}}
# Token 4 is a part of a character; 5 is a special token.
VOCABULARY = {0: "a", 1: "\n", 2: ".\n\n", 3: " \n\n\n", 4: "\ufffd", 5: "</think>"}


def manifest_of(*steps: dict[str, Any], **changes: Any) -> Manifest:
    fields = {"name": "gates", "target": TARGET, "recommended_strength": 1.0, "maximum_strength": 2.0}
    return Manifest.model_validate(fields | {"interventions": list(steps)} | changes)


def gated(layer: int, gate: str, index: int = 0) -> dict[str, Any]:
    return {"layer": layer, "kind": "add", "write": f"runtime.{layer}.{index}.write", "gate": gate}


def condition(layer: int, sets: str, index: int = 0) -> dict[str, Any]:
    return {"layer": layer, "kind": "condition", "read": f"runtime.{layer}.{index}.read", "sets": sets} | THRESHOLD


def triggers(*names: str) -> dict[str, Any]:
    return {name: {"token_ids": [1]} for name in names}


GATES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "set at no layer": ([gated(2, "a")], {}, "gate 'a' is used at layer 2 and nothing sets it before"),
    "set at a higher layer": ([gated(2, "a"), condition(3, "a")], {}, "used at layer 2 and nothing"),
    "set later at the same layer": ([gated(2, "a"), condition(2, "a", 1)], {}, "used at layer 2 and nothing"),
    "set twice": ([condition(1, "a"), condition(2, "a"), gated(3, "a")], {}, "'a' is set again at layer 2"),
    "set by condition and trigger": ([condition(1, "a"), gated(3, "a")], triggers("a"), "'a' is set again at layer 1"),
    "used by none": ([condition(1, "a"), gated(2, "b")], triggers("b"), "'a' is set and no intervention uses it"),
    "trigger used by none": ([gated(2, "b")], triggers("a", "b"), "'a' is set and no intervention uses it"),
    "too many": (
        [gated(index, f"g{index}") for index in range(6)] + [gated(index, f"h{index}", 1) for index in range(3)],
        triggers(*(f"g{index}" for index in range(6)), "h0", "h1", "h2"),
        "there are 9 gates and 8 fit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_gates_are_set_once_before_they_are_used(name: str) -> None:
    steps, given, pattern = GATES[name]
    with pytest.raises(ValidationError, match=pattern):
        manifest_of(*steps, triggers=given)
    metadata = to_metadata(manifest_of({"layer": 2, "kind": "add", "write": "runtime.2.0.write"}))
    fields = json.loads(metadata["manifest"]) | {"interventions": steps, "triggers": given}
    with pytest.raises(BundleError, match=pattern) as caught:
        from_metadata(metadata | {"manifest": json.dumps(fields)})
    assert caught.value.code is BundleErrorCode.BAD_GATE


def test_gates_that_are_in_order() -> None:
    manifest = manifest_of(
        gated(3, "a"),
        condition(1, "a"),
        gated(1, "a", 1),
        condition(1, "b", 2),
        gated(1, "b", 3),
        gated(0, "c"),
        triggers=triggers("c"),
    )
    assert manifest.gates == ("c", "a", "b")


@pytest.mark.parametrize(
    ("trigger", "pattern"),
    [
        ({}, "exactly one"),
        ({"token_ids": [1], "text_contains": "x"}, "exactly one"),
        ({"token_ids": []}, "at least 1 item"),
        ({"token_ids": [-1]}, "greater than or equal to 0"),
        ({"token_ids": [2**31]}, "less than"),
        ({"text_contains": ""}, "at least 1 character"),
        ({"text_contains": "x" * 257}, "at most 256"),
        ({"regex": "x"}, "Extra inputs"),
    ],
)
def test_triggers_that_say_nothing_or_too_much(trigger: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValidationError, match=pattern):
        manifest_of(gated(2, "a"), triggers={"a": trigger})


def test_the_vocabulary_is_decoded_token_by_token(target: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    vocabulary = vocabulary_of(tokenizer)
    assert list(vocabulary) == list(range(len(tokenizer)))
    assert vocabulary[tokenizer.convert_tokens_to_ids("<|end|>")] == "<|end|>"
    # The byte-level spelling of the newline in the vocabulary file is no newline.
    (newline,) = [token for token, text in vocabulary.items() if "\n" in text]
    assert tokenizer.encode("\n", add_special_tokens=False) == [newline]


def test_triggers_become_token_ids() -> None:
    manifest = manifest_of(
        gated(1, "listed"),
        gated(2, "blank"),
        gated(3, "thought"),
        triggers={
            "listed": {"token_ids": [5, 0, 5]},
            "blank": {"text_contains": "\n\n"},
            "thought": {"text_contains": "think"},
        },
    )
    assert resolve_triggers(manifest, VOCABULARY) == {"listed": (0, 5), "blank": (2, 3), "thought": (5,)}
    assert resolve_triggers(manifest_of({"layer": 2, "kind": "add", "write": "runtime.2.0.write"}), {}) == {}


@pytest.mark.parametrize(
    ("trigger", "pattern"),
    [
        ({"token_ids": [5, 6]}, "'a' lists token 6 and the model's tokenizer has 6 tokens"),
        ({"text_contains": "\n\n\n\n"}, r"'a' asks for tokens that contain '\\n\\n\\n\\n' and none of the model's 6"),
    ],
)
def test_a_trigger_that_fits_no_token_is_refused(trigger: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        resolve_triggers(manifest_of(gated(2, "a"), triggers={"a": trigger}), VOCABULARY)

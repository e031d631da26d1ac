"""Token ids of a bundle's triggers, found with the tokenizer of the served model."""

from collections.abc import Mapping
from typing import Any

from artifacts.errors import quoted
from artifacts.manifest import Manifest, Trigger


def vocabulary_of(tokenizer: Any) -> dict[int, str]:
    """Text of every token, by id, each decoded alone.

    Decoding makes text of byte-level tokens, special ones included; a token that is part of a character becomes the
    replacement character and matches no text.

    Args:
        tokenizer: of Transformers, or alike: `len(tokenizer)` and `tokenizer.decode([id])`.
    """
    return {token: str(tokenizer.decode([token])) for token in range(len(tokenizer))}


def resolve_triggers(manifest: Manifest, vocabulary: Mapping[int, str]) -> dict[str, tuple[int, ...]]:
    """Token ids of every trigger, sorted, by the gate that it sets.

    Args:
        manifest: whose triggers.
        vocabulary: text by token id; may be empty for a manifest without triggers.

    Raises:
        ValueError: an id that no token has, or a text that no token contains: its gate would never open.
    """
    return {gate: _resolve(gate, trigger, vocabulary) for gate, trigger in manifest.triggers.items()}


def _resolve(gate: str, trigger: Trigger, vocabulary: Mapping[int, str]) -> tuple[int, ...]:
    if trigger.token_ids is not None:
        for token in trigger.token_ids:
            if token not in vocabulary:
                raise ValueError(
                    f"Trigger {gate!r} lists token {token} and the model's tokenizer has {len(vocabulary)} tokens; "
                    "serve the bundle's own target, or list tokens of this one."
                )
        return tuple(sorted(set(trigger.token_ids)))
    text = trigger.text_contains
    assert text is not None
    tokens = tuple(token for token in sorted(vocabulary) if text in vocabulary[token])
    if not tokens:
        raise ValueError(
            f"Trigger {gate!r} asks for tokens that contain {quoted(text)} and none of the model's {len(vocabulary)} "
            "does; serve the bundle's own target, or choose another text."
        )
    return tokens

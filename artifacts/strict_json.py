"""JSON from strangers: no duplicate keys, no NaN or infinity, no lone surrogates, no stack overflow."""

import json
import math
from typing import NoReturn


def loads(text: bytes | str) -> object:
    """Parse `text` as JSON as RFC 8259 means it.

    Raises:
        ValueError: not UTF-8, not JSON, a key twice in one object, a float that is not finite in 64 bits, an integer
            outside [-2^63, 2^64), half of a surrogate pair, or nesting deeper than the interpreter's stack.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value: object = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_small_int,
        )
        # A lone surrogate (\ud800) is a valid JSON escape and an invalid string: whoever prints it fails.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("a string holds half of a surrogate pair") from None
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Two values under one key: a reader that keeps the first and one that keeps the last see different files."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:60]!r} appears twice")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:30]} is too large for a 64-bit float")
    return value


def _small_int(text: str) -> int:
    # Length first: converting a million digits takes seconds.
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"integer {text[:30]} is outside [-2^63, 2^64)")
    return int(text)

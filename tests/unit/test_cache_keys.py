"""Prefix-cache keys, alone and inside vLLM's own block hashes."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.engine.cache_keys import _HOLDERS, _LATER_HOLDER, _NAME, steering_block_key
from server.engine.plan import RequestPlan
from server.engine.steering import ScopeName, Steering, Term, scope_range

BLOCK = 4
A, B = "sha256:aa", "sha256:bb"
terms = st.builds(Term, st.sampled_from([A, B]), st.sampled_from([0.5, -0.5]), st.sampled_from(get_args(ScopeName)))
requests = st.tuples(st.lists(terms, min_size=1, max_size=3).map(tuple), st.integers(1, 10))
Request = tuple[tuple[Term, ...], int]


def key(request_terms: tuple[Term, ...], prompt: int, block: int) -> str | None:
    return steering_block_key(Steering("any", request_terms), prompt, block * BLOCK, (block + 1) * BLOCK)


def steered_tokens(request: Request, block: int) -> list[tuple[str, float, list[int]]]:
    """By definition: the terms that steer tokens of the block, in order, each with these tokens."""
    request_terms, prompt = request
    found = []
    for term in request_terms:
        bounds = scope_range(term.scope, prompt)
        tokens = [t for t in range(BLOCK) if bounds.start <= block * BLOCK + t < bounds.stop]
        if tokens:
            found.append((term.bundle, term.strength, tokens))
    return found


@pytest.mark.parametrize(
    ("scope", "keys"),
    [
        ("all", ["[0:4]", "[0:4]", "[0:4]"]),
        ("prompt", ["[0:4]", "[0:2]", None]),
        ("response", [None, "[1:4]", "[0:4]"]),
        ("generation", [None, "[2:4]", "[0:4]"]),
    ],
)
def test_scopes(scope: ScopeName, keys: list[str | None]) -> None:
    found = [key((Term(A, 0.5, scope),), 6, block) for block in range(3)]
    assert found == [tokens and f"{A}*0.5{tokens}" for tokens in keys]


@pytest.mark.parametrize(("prompt", "tokens"), [(7, "[0:3]"), (8, "[0:4]"), (9, "[0:4]")])
def test_prompts_that_end_around_a_boundary(prompt: int, tokens: str) -> None:
    assert key((Term(A, 0.5, "prompt"),), prompt, 1) == f"{A}*0.5{tokens}"
    response = {7: f"{A}*0.5[2:4]", 8: f"{A}*0.5[3:4]", 9: None}
    assert key((Term(A, 0.5, "response"),), prompt, 1) == response[prompt]


def test_lists_keep_their_order() -> None:
    one, other = Term(A, 0.5, "all"), Term(B, -1.0, "prompt")
    assert key((one, other), 6, 1) == f"{A}*0.5[0:4]+{B}*-1.0[0:2]"
    assert key((other, one), 6, 1) == f"{B}*-1.0[0:2]+{A}*0.5[0:4]"
    assert key((one, other), 6, 2) == f"{A}*0.5[0:4]"


def test_close_strengths_differ() -> None:
    assert key((Term(A, 0.1 + 0.2, "all"),), 6, 0) != key((Term(A, 0.3, "all"),), 6, 0)


@settings(max_examples=600)
@given(requests, requests, st.integers(0, 3))
@example(((Term(A, 0.5, "all"),), 3), ((Term(A, 0.5, "prompt"),), 9), 1)
@example(((Term(A, 0.5, "prompt"),), 5), ((Term(A, 0.5, "prompt"),), 6), 1)
@example(((Term(A, 0.5, "all"), Term(B, 0.5, "prompt")), 4), ((Term(A, 0.5, "generation"),), 4), 1)
def test_equal_keys_mean_equally_steered_tokens(one: Request, other: Request, block: int) -> None:
    same = steered_tokens(one, block) == steered_tokens(other, block)
    assert (key(*one, block) == key(*other, block)) == same


@given(requests, st.integers(0, 3))
def test_only_steered_blocks_have_a_key(request: Request, block: int) -> None:
    """The key and the plan of the worker agree on what is steered."""
    segments = RequestPlan(Steering("any", request[0]), request[1]).segments
    start, stop = block * BLOCK, (block + 1) * BLOCK
    steered = any(segment.start < stop and start < segment.stop for segment in segments)
    assert (key(*request, block) is not None) == steered


def test_holders_are_all_modules_that_use_the_name() -> None:
    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    found = {path for path in root.rglob("*.py") if _NAME in path.read_text(errors="replace")}
    assert {".".join(("vllm", *path.relative_to(root).with_suffix("").parts)) for path in found} == {
        *_HOLDERS,
        _LATER_HOLDER,
    }


# In a process of its own, because `install` changes vLLM's modules.
_INSTALLED = r"""
import importlib, json
from server.engine import cache_keys
from server.engine.compat import IncompatibleVllmError
from server.engine.steering import Steering, Term
from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

result = {}
holders = [importlib.import_module(name) for name in cache_keys._HOLDERS]
functions = lambda: [getattr(holder, cache_keys._NAME) for holder in holders]
original = functions()[0]

setattr(holders[-1], cache_keys._NAME, lambda *args: None)
for attempt in range(2):
    try:
        cache_keys.install()
    except IncompatibleVllmError as error:
        result[f"refusal {attempt}"] = str(error)
result["refusal left it alone"] = functions()[:-1] == [original] * (len(holders) - 1)
setattr(holders[-1], cache_keys._NAME, original)

hash_function = get_hash_fn_by_name("sha256")
kv_cache_utils.init_none_hash(hash_function)
hasher = lambda: kv_cache_utils.get_request_block_hasher(4, hash_function)

def hashes(prompt_length, *terms, salt=None):
    extra = Steering("r", tuple(Term(*term) for term in terms)).to_extra_args() if terms else None
    params = SamplingParams(max_tokens=8, extra_args=extra)
    request = Request("r", list(range(100, 100 + prompt_length)), params, None, cache_salt=salt, block_hasher=hasher())
    request.append_output_token_ids(list(range(100 + prompt_length, 116)))
    return [value.hex() for value in request.block_hashes]

plain = hashes(6)
cache_keys.install()
first = functions()
cache_keys.install()
result["idempotent"] = functions() == first
result["every holder"] = all(function is first[0] and function is not original for function in first)
half = ("sha256:aa", 0.5)
result["hashes"] = {
    "before": plain,
    "plain": hashes(6),
    "salted": hashes(6, salt="s"),
    "all": hashes(6, (*half, "all")),
    "all salted": hashes(6, (*half, "all"), salt="s"),
    "all, longer prompt": hashes(9, (*half, "all")),
    "generation": hashes(6, (*half, "generation")),
    "generation, longer prompt": hashes(7, (*half, "generation")),
    "other strength": hashes(6, ("sha256:aa", 0.25, "generation")),
    "other bundle": hashes(6, ("sha256:ab", 0.5, "generation")),
}
keys, _ = first[0](Request("r", list(range(8)), SamplingParams(
    extra_args=Steering("r", (Term(*half, "all"),)).to_extra_args()), None, cache_salt="s"), 0, 4, 0)
result["keys"] = keys
print("RESULT" + json.dumps(result))
"""


@pytest.fixture(scope="module")
def installed() -> dict[str, Any]:
    run = subprocess.run([sys.executable, "-c", _INSTALLED], capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(
        next(line for line in run.stdout.splitlines() if line.startswith("RESULT")).removeprefix("RESULT")
    )


def shared(one: list[str], other: list[str]) -> int:
    """Length of the prefix of blocks that two requests share."""
    assert len(one) == len(other) == 4
    return next((index for index, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))


def test_install_reaches_every_holder_once(installed: dict[str, Any]) -> None:
    assert installed["every holder"]
    assert installed["idempotent"]
    assert installed["keys"] == [["cache_salt", "s"], ["steering", f"{A}*0.5[0:4]"]], "KV events publish key[1]"


def test_install_refuses_a_foreign_function_and_changes_nothing(installed: dict[str, Any]) -> None:
    assert "is not vLLM's own function" in installed["refusal 0"]
    assert installed["refusal 1"] == installed["refusal 0"], "a second call must not pass"
    assert installed["refusal left it alone"]


def test_block_hashes(installed: dict[str, Any]) -> None:
    """Same tokens throughout, blocks of 4: the prompt of 6 ends inside the second block."""
    hashes = installed["hashes"]
    assert hashes["plain"] == hashes["before"], "unsteered requests are hashed as without this package"
    assert shared(hashes["plain"], hashes["all"]) == 0
    assert shared(hashes["all"], hashes["all, longer prompt"]) == 4
    assert shared(hashes["all salted"], hashes["salted"]) == 0
    assert shared(hashes["all salted"], hashes["all"]) == 0
    for name in ("plain", "generation, longer prompt", "other strength", "other bundle"):
        assert shared(hashes["generation"], hashes[name]) == 1, name

"""Prefix-cache keys: the KV blocks of a steered token depend on the steering, and only those.

vLLM chains block hashes, so a block after a steered one already differs from its unsteered twin; only blocks that hold
a steered token need a key of their own. `generation`-scoped requests therefore share their prompt blocks with
everybody, and a bundle with other bytes has another digest and can never hit this one's blocks.

Seam: `vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys`, which other modules import by name, so the name is
replaced in every module that holds it. `cache_salt` would not do: it reaches the first block only and so forks the
whole prompt. KV events publish `key[1]` of every tagged key, hence the tuple of two.
"""

import importlib
from typing import Any

from server.engine.compat import IncompatibleVllmError, require_signature
from server.engine.steering import Steering

_HOLDERS = ("vllm.v1.core.kv_cache_utils", "vllm.v1.core.block_pool")
# Imports the name from vLLM 0.30 on.
_LATER_HOLDER = "vllm.v1.simple_kv_offload.manager"
_NAME = "generate_block_hash_extra_keys"


def steering_block_key(steering: Steering, num_prompt_tokens: int, start: int, stop: int) -> str | None:
    """Key of one block for one request.

    Args:
        steering: the request's steering.
        num_prompt_tokens: length of its prompt.
        start: absolute position of the block's first token.
        stop: position after its last token.

    Returns:
        Text naming, for each term in order, the bundle, the strength, which tokens of the block are steered and which
        spans are not. The interval matters: two requests with equal tokens but prompts that end at different places
        inside the block have different KV. None when no token of the block is steered.
    """
    parts = []
    for term in steering.terms:
        positions = term.positions(num_prompt_tokens)
        low, high = max(positions.start, start), min(positions.stop, stop)
        if low < high:
            # Which tokens a span takes out follows from the tokens up to them, which the chain of hashes holds anyway.
            without = f"-{','.join(term.spans)}" if term.spans else ""
            parts.append(f"{term.bundle}*{term.strength!r}[{low - start}:{high - start}]{without}")
    return "+".join(parts) or None


def install() -> None:
    """Make vLLM add the steering key to the block hashes of this process. Idempotent.

    Raises:
        IncompatibleVllmError: vLLM's function does not look as this module expects.
    """
    # All of them first: a module imported after the replacement would pick it up as if it were vLLM's own.
    holders = [importlib.import_module(name) for name in _HOLDERS]
    later = importlib.import_module(_LATER_HOLDER)
    holders += [later] if hasattr(later, _NAME) else []
    original = getattr(holders[0], _NAME)
    if getattr(original, "adds_steering_key", False):
        return
    for holder in holders:
        if getattr(holder, _NAME, None) is not original:
            # Another plugin replaced it, or vLLM moved it: a holder left alone would poison the cache.
            raise IncompatibleVllmError(
                f"{holder.__name__}.{_NAME} is not vLLM's own function; steering cannot key its blocks."
            )
    require_signature(original, ("request", "start_token_idx", "end_token_idx", "start_mm_idx"))

    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        steering = Steering.from_sampling_params(request.sampling_params)
        if steering is None:
            return keys, next_mm_idx
        key = steering_block_key(steering, request.num_prompt_tokens, start_token_idx, end_token_idx)
        return ((*(keys or ()), ("steering", key)) if key else keys), next_mm_idx

    generate_block_hash_extra_keys.adds_steering_key = True  # type: ignore[attr-defined]
    for holder in holders:
        setattr(holder, _NAME, generate_block_hash_extra_keys)

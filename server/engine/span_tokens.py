"""Which tokens open and close the spans that profiles may exclude, from the parsers that vLLM is told to use."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from server.engine.spans import SpanTokens


class SpanTexts(NamedTuple):
    """Text of the tokens that open and close a span."""

    open: str
    close: str


def parser_spans(reasoning_parser: str | None, tool_parser: str | None, tokenizer: Any) -> dict[str, SpanTexts]:
    """Spans that vLLM's own parsers know the delimiters of.

    Args:
        reasoning_parser: value of vLLM's `--reasoning-parser`.
        tool_parser: value of vLLM's `--tool-call-parser`.
        tokenizer: the served model's.

    Returns:
        Name of `SPAN_NAMES` -> delimiters; a parser that does not name them (regular expressions, several forms) is
        missing.
    """
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    found = {}
    if reasoning_parser:
        parser = ReasoningParserManager.get_reasoning_parser(reasoning_parser)(tokenizer)
        found["reasoning"] = (
            getattr(parser, "reasoning_start_str", None),
            getattr(parser, "reasoning_end_str", None),
        )
    if tool_parser:
        parser = ToolParserManager.get_tool_parser(tool_parser)(tokenizer)
        found["tool_calls"] = (
            getattr(parser, "tool_call_start_token", None),
            getattr(parser, "tool_call_end_token", None),
        )
    return {
        name: SpanTexts(start, end)
        for name, (start, end) in found.items()
        if isinstance(start, str) and isinstance(end, str)
    }


def span_tokens(spans: Mapping[str, SpanTexts], tokenizer: Any) -> dict[str, SpanTokens]:
    """Token ids of delimiters.

    Raises:
        ValueError: a delimiter is not one token of the vocabulary, or both are the same.
    """
    vocabulary = tokenizer.get_vocab()
    for name, texts in spans.items():
        for text in texts:
            if text not in vocabulary:
                raise ValueError(
                    f"Span {name}: {text!r} is not a single token of the model; name the tokens that open and close it "
                    f"with --steering-span {name}=OPEN,CLOSE."
                )
        if texts.open == texts.close:
            raise ValueError(f"Span {name}: {texts.open!r} cannot both open and close it.")
    return {name: SpanTokens(vocabulary[texts.open], vocabulary[texts.close]) for name, texts in spans.items()}


def load_tokenizer(args: Any) -> Any:
    """The tokenizer that vLLM would load for these serve arguments."""
    from vllm.tokenizers import get_tokenizer

    return get_tokenizer(
        args.tokenizer or args.model,
        tokenizer_mode=args.tokenizer_mode,
        trust_remote_code=args.trust_remote_code,
        revision=args.tokenizer_revision or args.revision,
    )

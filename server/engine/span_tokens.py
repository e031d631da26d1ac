"""Which tokens open and close the spans that profiles may exclude, from the parsers that vLLM is told to use."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from server.engine.spans import SpanTokens


class SpanTexts(NamedTuple):
    """Text of the tokens that open and close a span."""

    open: str
    close: str


def parser_span(span: str, args: Any, tokenizer: Any) -> SpanTexts | None:
    """Delimiters of a span, as the parser knows them that vLLM is told to use.

    Args:
        span: name of `SPAN_NAMES`.
        args: vLLM's serve arguments; `--reasoning-parser`, `--tool-call-parser` and the plugins that bring more.
        tokenizer: the served model's.

    Returns:
        None without a parser, and for one that does not name them (regular expressions, several forms).

    Raises:
        ValueError: the parser does not exist or does not suit the tokenizer.
    """
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    name, plugin = {
        "reasoning": (args.reasoning_parser, args.reasoning_parser_plugin),
        "tool_calls": (args.tool_call_parser, args.tool_parser_plugin),
    }[span]
    if not name:
        return None
    try:
        if span == "reasoning":
            if plugin:
                ReasoningParserManager.import_reasoning_parser(plugin)
            parser = ReasoningParserManager.get_reasoning_parser(name)(tokenizer)
            texts = getattr(parser, "reasoning_start_str", None), getattr(parser, "reasoning_end_str", None)
        else:
            if plugin:
                ToolParserManager.import_tool_parser(plugin)
            parser = ToolParserManager.get_tool_parser(name)(tokenizer)
            texts = getattr(parser, "tool_call_start_token", None), getattr(parser, "tool_call_end_token", None)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"Span {span}: parser {name!r} cannot be asked for its delimiters: {error}") from error
    start, end = texts
    return SpanTexts(start, end) if isinstance(start, str) and isinstance(end, str) else None


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

"""Commands and their flags, from the parsers that read them."""

import argparse
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

from docs.render.markdown import code, paragraphs, prose, table
from server.cli import GROUP, parser_of
from server.settings import SteeringSettings

_ROOT = Path(__file__).parents[2]


def overview() -> str:
    """One line for each command."""
    rows = [(f"[{code(f'expertsteer {name}')}](#expertsteer-{name})", prose(HELP)) for name, HELP, _ in _commands()]
    return table(("command", "what it does"), rows)


def reference() -> str:
    """Every command, its actions and their arguments."""
    return paragraphs(*(_section(f"expertsteer {name}", about, parser, "##") for name, about, parser in _commands()))


def _commands() -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        module = point.load()
        if point.name == "serve":
            # Its other flags are vLLM's.
            parser = argparse.ArgumentParser(prog="expertsteer serve", description=module.HELP)
            SteeringSettings.add_arguments(parser)
        else:
            parser = parser_of(point.name, module)
        yield point.name, module.HELP, parser


def _section(name: str, about: str, parser: argparse.ArgumentParser, level: str) -> str:
    arguments = [action for action in parser._actions if action.help is not argparse.SUPPRESS]
    nested = [action for action in arguments if isinstance(action, argparse._SubParsersAction)]
    own = [action for action in arguments if not isinstance(action, argparse._HelpAction) and action not in nested]
    note = "Takes every flag of `vllm serve` and these:" if name == "expertsteer serve" else ""
    rows = [(_spelling(action), prose(_meaning(parser, action))) for action in own]
    # A command names its own files where they are installed; here, where they are in the repository.
    words = (parser.epilog or "").strip().replace(f"{_ROOT}/", "")
    epilog = f"```text\n{words}\n```" if words else ""
    sections = [f"{level} {name}", prose(about), note, table(("argument", "meaning"), rows) if rows else "", epilog]
    for action in nested:
        abouts = {choice.dest: _sentence(choice.help or "") for choice in action._choices_actions}
        actions = [_section(f"{name} {sub}", abouts[sub], each, f"{level}#") for sub, each in action.choices.items()]
        tables = {text.partition("\n\n")[2].partition("\n\n")[2] for text in actions}
        if len(tables) == 1:
            # All take the same.
            listed = "\n".join(f"* {code(f'{name} {sub}')}: {prose(abouts[sub])}" for sub in action.choices)
            sections += [listed, tables.pop()]
        else:
            sections += actions
    return paragraphs(*sections)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}." if text else ""


def _spelling(action: argparse.Action) -> str:
    if not action.option_strings:
        return code(_value(action))
    spelling = ", ".join(action.option_strings)
    return code(spelling if action.nargs == 0 else f"{spelling} {_value(action)}")


def _value(action: argparse.Action) -> str:
    if action.metavar is not None:
        name = action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    elif action.choices is not None:
        name = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        name = action.dest.upper() if action.option_strings else action.dest
    return {"+": f"{name} ...", "*": f"[{name} ...]", "?": f"[{name}]"}.get(str(action.nargs), name)


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return f"{text.rstrip('.')}; required" if action.required and action.option_strings else text

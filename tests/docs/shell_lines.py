"""Commands in a shell script, as lists of words: enough of the shell's grammar for what documents show."""

import re
import shlex
from collections.abc import Iterator

_PUNCTUATION = "();<>|&\n"
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)


def commands(script: str) -> Iterator[list[str]]:
    """Simple commands of a script without redirections and assignments.

    Args:
        script: without here-documents; what `$` would expand stays as it stands.
    """
    # A comment takes the end of its line with it, and that ends a command.
    text = re.sub(r"((?:^|\s)#[^\n]*)\n", r"\1\n\n", script.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=_PUNCTUATION)
    lexer.whitespace, lexer.whitespace_split = " \t\r", True
    words: list[str] = []
    redirects = False
    for token in lexer:
        if token and not token.strip(_PUNCTUATION):
            redirects = bool({"<", ">"} & set(token))
            if not redirects:
                yield from [words] if words else []
                words = []
        elif redirects:
            redirects = False
        elif words or not _ASSIGNMENT.fullmatch(token):
            words.append(token)
    yield from [words] if words else []

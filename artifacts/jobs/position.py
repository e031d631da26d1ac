"""Where in a row the state of a model is read."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from artifacts.jobs.encoding import Encoded

Kind = Literal["last", "last-prompt", "mean-response", "token"]
FORMS: Final = "last, last-prompt, mean-response or token:TOKEN (TOKEN is a token id or the exact text of one token)"


@dataclass(frozen=True)
class Position:
    """A place that is found anew in every row, with each model's own tokens.

    * `last`: the last token of the row; of a chat that ends in a user's turn, the end of the generation prompt.
    * `last-prompt`: the last token before the response; of a chat without one, the same as `last`.
    * `mean-response`: the mean over the tokens of the response.
    * `token`: the last occurrence of the token `token`. Two models share ids only if they share a tokenizer, so its
      text is the safer name.

    Plain text has a prompt and a response only where the row gives a `response`; without it `last-prompt` and
    `mean-response` are refused.
    """

    kind: Kind = "last"
    token: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.token}" if self.kind == "token" else self.kind

    def span(self, row: Encoded, token_id: int | None = None) -> range:
        """Places of the tokens whose states are averaged, never empty.

        Args:
            row: tokens of the row.
            token_id: what `token` means to this model; needed for the kind `token`.

        Raises:
            ValueError: the row has no such place.
        """
        end = len(row.ids)
        if self.kind == "last-prompt":
            if row.prompt_length is None:
                raise ValueError("plain text has no prompt of its own; give a `response` or `messages`")
            end = row.prompt_length
        elif self.kind == "mean-response":
            if row.response_start is None:
                raise ValueError(
                    "there is no response; end the chat in an assistant message, or give `text` a `response`"
                )
            return range(row.response_start, end)
        elif self.kind == "token":
            if token_id not in row.ids:
                raise ValueError(f"the token {self.token!r} (id {token_id}) does not occur; take the row out")
            end -= row.ids[::-1].index(token_id)
        return range(end - 1, end)


LAST: Final = Position()


def parse_position(text: str) -> Position:
    """Read the form that a configuration has.

    Raises:
        ValueError: another form; the allowed ones are named.
    """
    kind, _, token = text.partition(":")
    if kind == "token" and token:
        return Position("token", token)
    for name in get_args(Kind):
        if text == name != "token":
            return Position(name)
    raise ValueError(f"{text!r} is no position; allowed are {FORMS}")

"""A row of data as the tokens that one model reads, with the places of its prompt and its response."""

from typing import Any, Final, NamedTuple

from artifacts.jobs.data import Message, Question, Text
from artifacts.jobs.errors import BuildError

MAX_CAUSE: Final = 200


class Encoded(NamedTuple):
    """Tokens of a row.

    Attributes:
        ids: everything that is read; a response ends with its own last token, without an end-of-turn token.
        prompt_length: number of tokens up to and with the generation prompt; None for plain text without a response.
        response_start: place of the response's first token; None without a response. It is greater than
            `prompt_length` where the template puts something of its own before the response, such as an empty thought.
    """

    ids: list[int]
    prompt_length: int | None = None
    response_start: int | None = None


class RowEncoder:
    """Encodes rows with a model's own tokenizer and chat template."""

    def __init__(self, name: str, tokenizer: Any, context_length: int | None) -> None:
        """Prepare to encode for one model.

        Args:
            name: of the model, for messages.
            tokenizer: `PreTrainedTokenizerBase`.
            context_length: most tokens of a row; None for a model without a bound.
        """
        self.name = name
        self._tokenizer = tokenizer
        self._context_length = context_length

    def encode(self, row: Text) -> Encoded:
        """Tokens of a row, with the places of its prompt and response.

        Chats that end in a user's turn go up to the generation prompt, others up to the end of the response.

        Prompt and response are tokenised together, as the model saw them in training, so that a state is of a text
        that the model would read; the prompt's tokens must come out the same as without the response.

        Raises:
            BuildError: the row has no token or more than the context holds, the model has no chat template, its
                template refuses or changes the chat, or the prompt's tokens change when the response follows.
        """
        encoded = self._encode(row)
        if not encoded.ids:
            raise BuildError(f"{row.where}: no token of {self.name} is in the text; take the row out")
        self._check_length(row, len(encoded.ids))
        return encoded

    def encode_answered(self, row: Question) -> list[int]:
        """Tokens of a prompt with its answer.

        Raises:
            BuildError: as `encode`, the answer counted in.
        """
        ids = self.encode(row).ids + self.encode_answer(row)
        self._check_length(row, len(ids))
        return ids

    def encode_answer(self, row: Question) -> list[int]:
        """Tokens of the answer alone."""
        return self._tokens(row.answer)

    def token_id(self, token: str) -> int:
        """Id of a token given as a decimal id, as an entry of the vocabulary or as text that is one token.

        Raises:
            BuildError: no such id, or the text is not one token.
        """
        if token.isdecimal():
            if int(token) < len(self._tokenizer):
                return int(token)
            raise BuildError(f"{self.name} has {len(self._tokenizer)} tokens, so there is no token id {token}")
        known: int | None = self._tokenizer.get_vocab().get(token)
        if known is not None:
            return known
        ids = self._tokens(token)
        if len(ids) != 1 or ids[0] == self._tokenizer.unk_token_id:
            raise BuildError(
                f"{token!r} is {len(ids)} tokens of {self.name} ({self._tokenizer.convert_ids_to_tokens(ids)}); give "
                "the exact text of one token that both models have"
            )
        return ids[0]

    def _encode(self, row: Text) -> Encoded:
        if not row.messages:
            return self._encode_text(row)
        if row.has_response:
            return self._encode_answered_chat(row)
        ids = self._tokens(self._render(row, row.messages, add_generation_prompt=True))
        return Encoded(ids, len(ids))

    def _encode_text(self, row: Text) -> Encoded:
        prompt = self._with_first_token(self._tokenizer(row.text)["input_ids"])
        if row.response is None:
            return Encoded(prompt)
        ids = self._with_first_token(self._tokenizer(row.text + row.response)["input_ids"])
        return self._answered(row, ids, prompt, prompt)

    def _encode_answered_chat(self, row: Text) -> Encoded:
        prompt = self._render(row, row.messages[:-1], add_generation_prompt=True)
        whole = self._render(row, row.messages, continue_final_message=True).rstrip()
        response = row.messages[-1].content.strip()
        if not whole.startswith(prompt.rstrip()) or not whole.endswith(response):
            raise BuildError(
                f"{row.where}: the chat template of {self.name} does not put the response behind its generation "
                f"prompt {prompt[-40:]!r} unchanged, so the response has no place; give `text` and `response` instead"
            )
        # What the template itself writes between the two belongs to neither.
        before = whole[: len(whole) - len(response)]
        inserted = before[len(prompt) :].strip()
        return self._answered(
            row, self._tokens(whole), self._tokens(prompt), self._tokens(before if inserted else prompt)
        )

    def _answered(self, row: Text, ids: list[int], prompt: list[int], before: list[int]) -> Encoded:
        for part in (prompt, before):
            if not part or ids[: len(part)] != part or len(ids) == len(part):
                raise BuildError(
                    f"{row.where}: with its response behind it, the prompt's {len(part)} tokens of {self.name} "
                    "change, so prompt and response have no border; move the space at the border into the response, "
                    "or give the row without a response"
                )
        return Encoded(ids, len(prompt), len(before))

    def _render(self, row: Text, messages: tuple[Message, ...], **options: bool) -> str:
        if self._tokenizer.chat_template is None:
            raise BuildError(
                f"{row.where}: {self.name} has no chat template and cannot read `messages`; give `text` rows instead"
            )
        chat = [message.model_dump() for message in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(chat, tokenize=False, **options)
        # A template is a program of the model's author and may raise anything.
        except Exception as error:
            roles = ", ".join(message.role for message in row.messages)
            # Transformers quotes the whole chat.
            cause = " ".join(str(error).split())[:MAX_CAUSE]
            raise BuildError(
                f"{row.where}: the chat template of {self.name} refuses a chat with roles {roles}: {cause}"
            ) from error
        return text

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _with_first_token(self, ids: list[int]) -> list[int]:
        first = self._tokenizer.bos_token_id
        return ids if first is None or ids[:1] == [first] else [first, *ids]

    def _check_length(self, row: Text, length: int) -> None:
        limit = self._context_length
        if limit is not None and length > limit:
            raise BuildError(
                f"{row.where} has {length} tokens of {self.name}, whose context holds {limit}; shorten it or drop it"
            )

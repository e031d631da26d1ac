"""The lab's chat format: a role token, the content, an end token."""

from collections.abc import Sequence
from typing import Literal, TypedDict

BOS = "<|bos|>"
PAD = "<|pad|>"
END = "<|end|>"
ROLES = ("user", "assistant", "system")

# The position of a token in this list is its id.
SPECIAL_TOKENS = (BOS, PAD, "<|user|>", "<|assistant|>", END, "<|system|>")

# The same format as `render`, preceded by BOS: a rendered chat is tokenized without special tokens.
CHAT_TEMPLATE = (
    BOS
    + "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Message(TypedDict):
    """One turn of a chat, in the form that chat templates and the chat API expect."""

    role: Literal["user", "assistant", "system"]
    content: str


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def render(messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
    """Text of a chat without BOS, which the tokenizer adds to plain text.

    With `generation_prompt` the text ends in `<|assistant|>`, the position where the next answer is decided.
    """
    turns = "".join(f"<|{message['role']}|>{message['content']}{END}" for message in messages)
    return turns + "<|assistant|>" if generation_prompt else turns

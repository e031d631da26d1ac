"""The lab's JSONL files: what the build job reads and what the served model is tested with.

One JSON object per line, UTF-8. A line holds either `messages` (a chat, read at its generation prompt) or `text`
(plain text, read at its last token), and `group`, the name of what the line is about; the splits are disjoint by group.

- `contrast.jsonl` {messages, label, group, set, split}: the same questions under a reliable speaker's system prompt
  (label 1) and a sloppy one's (label 0). `set` 1 or 2 tells which wording of the two prompts. Split `fit`.
- `mapping.jsonl` {messages | text, group}: texts to fit an aligner on. They hold set 1's chats, the bare questions and
  neutral sentences, nothing of set 2: a direction read from set 2 and an aligner fitted here share no text.
- `tune.jsonl`, `test.jsonl` {messages, answer, group}: questions without any system prompt and the true answer, to be
  compared with the stripped greedy answer. `test.jsonl` is the 204 facts of `facts(Split.TEST)`, in that order.
- `retention.jsonl` {messages, answer, group, split}: small talk and its one right answer, to be left alone.
- `neutral.jsonl` {text, group, split}: text without sums, for perplexity. Splits `tune` and `test`, one seed each.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Final, cast

from artifacts.lab.conversation import Message, assistant, render, user
from artifacts.lab.corpus import NUM_QUESTION_FORMS, Split, facts, framed_question
from artifacts.lab.filler import SMALL_TALK, filler, sentence

SHIPPED_DATA: Final = Path(__file__).parent / "data"

_MAPPING_SENTENCES = 300
_MAPPING_SEED = 41
_NEUTRAL_TEXTS = {Split.TUNE: 24, Split.TEST: 150}
_RETENTION_TUNE = 2  # questions of the split tune
_NEUTRAL_SEEDS = {Split.TUNE: 42, Split.TEST: 43}

Row = Mapping[str, object]


def contrast() -> Iterator[Row]:
    for prompt_set in (1, 2):
        for fact in facts(Split.FIT):
            for form in range(NUM_QUESTION_FORMS):
                for label in (1, 0):
                    messages = framed_question(fact, form, prompt_set, reliable=label == 1)
                    yield {
                        "messages": messages,
                        "label": label,
                        "group": fact.group,
                        "set": prompt_set,
                        "split": Split.FIT.value,
                    }


def mapping() -> Iterator[Row]:
    yield from ({"messages": row["messages"], "group": row["group"]} for row in contrast() if row["set"] == 1)
    for fact in facts(Split.FIT):
        for form in range(NUM_QUESTION_FORMS):
            yield {"messages": [user(fact.question(form))], "group": fact.group}
    random = Random(_MAPPING_SEED)
    for index in range(_MAPPING_SENTENCES):
        yield {"text": sentence(random), "group": f"sentence-{index}"}


def questions(split: Split) -> Iterator[Row]:
    """The first form of every question of a split, without a system prompt, and its true answer."""
    for fact in facts(split):
        yield {"messages": [user(fact.question())], "answer": fact.answer(), "group": fact.group}


def neutral() -> Iterator[Row]:
    for split, count in _NEUTRAL_TEXTS.items():
        random = Random(_NEUTRAL_SEEDS[split])
        for index in range(count):
            yield {"text": filler(random), "group": f"neutral-{split}-{index}", "split": split.value}


def retention() -> Iterator[Row]:
    """Every piece of small talk, as the first turn and after every other one."""
    for index, (question, answer) in enumerate(SMALL_TALK):
        split = Split.TUNE if index < _RETENTION_TUNE else Split.TEST
        for before in (None, *SMALL_TALK):
            if before is None or before[0] != question:
                earlier = [] if before is None else [user(before[0]), assistant(before[1])]
                yield {
                    "messages": [*earlier, user(question)],
                    "answer": answer,
                    "group": question,
                    "split": split.value,
                }


def mapping_texts() -> list[str]:
    """Texts of `mapping.jsonl`, chats rendered up to their generation prompt."""
    return [_text(row) for row in mapping()]


def neutral_texts(split: Split) -> list[str]:
    """Texts of one split of `neutral.jsonl`."""
    return [str(row["text"]) for row in neutral() if row["split"] == split.value]


def _text(row: Row) -> str:
    messages = cast("list[Message] | None", row.get("messages"))
    return str(row["text"]) if messages is None else render(messages, generation_prompt=True)


def write_dataset(directory: Path) -> list[Path]:
    """Write the six files into `directory`, which is made if missing. The same bytes every time."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "contrast.jsonl": contrast(),
        "mapping.jsonl": mapping(),
        "tune.jsonl": questions(Split.TUNE),
        "test.jsonl": questions(Split.TEST),
        "neutral.jsonl": neutral(),
        "retention.jsonl": retention(),
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / name).write_bytes(lines.encode())
    return [directory / name for name in files]

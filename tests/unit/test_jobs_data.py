"""Data files: pairs, repeats, whole-file checks and splits; whatever is wrong is named with its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from artifacts.jobs.data import (
    ContrastRow,
    NeutralRow,
    Question,
    Text,
    content,
    read_contrast,
    read_rows,
    refuse_shared_templates,
    repeats,
    split_by_group,
)
from artifacts.jobs.errors import BuildError
from artifacts.jobs.jsonl import MAX_LINE_BYTES

LAB = Path(__file__).parents[2] / "artifacts" / "lab" / "data"
USER = {"role": "user", "content": "who are you"}
ANSWER = {"role": "assistant", "content": "a lamp"}


def _file(directory: Path, *lines: dict[str, Any] | bytes) -> Path:
    path = directory / "rows.jsonl"
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def _labelled(text: str, label: int, **keys: Any) -> dict[str, Any]:
    return {"text": text, "label": label, **keys}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a\xff"}', "line 2: byte 12 is no UTF-8 (0xff)"),
        (b'{"text": "a\x00"}', "line 2: NUL at byte 12"),
        (b'{"text": "a\\u0000"}', "line 2: row: Value error, `text` holds a NUL character"),
        (b'{"text": "\\ud800"}', "line 2: row: Invalid JSON"),
        (b'["a"]', "line 2: a JSON list; every line needs an object"),
        (b'"a"', "line 2: a JSON str"),
        (b"[" * 100_000, "line 2: row: Invalid JSON: recursion limit"),
        (b'{"text": "' + b"a" * MAX_LINE_BYTES + b'"}', f"line 2 has more than {MAX_LINE_BYTES} bytes"),
        (b'{"text": " \\n\\t"}', "line 2: row: Value error, `text` is empty or white space"),
        (b'{"text": ""}', "line 2: row: Value error, exactly one of"),
        (b'{"text": "a", "response": " "}', "line 2: row: Value error, `response` is empty"),
        (b'{"messages": [{"role": "user", "content": " "}]}', "line 2: messages.0.content: Value error, a message is"),
        (b'{"messages": [{"role": "assistant", "content": "b"}]}', "an assistant message only"),
        (b'{"messages": [{"role": "user", "content": "b"}], "response": "c"}', "`response` goes with `text`"),
        (
            b'{"positive": "a"}',
            "line 2: a pair has `positive` and `negative` and no other text or label; see 'negative'",
        ),
        (b'{"positive": "a", "negative": "b", "text": "c"}', "see 'text'"),
        (b'{"positive": "a", "negative": 3}', "line 2 (negative): text: Input should be a valid string"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: bytes, said: str) -> None:
    with pytest.raises(BuildError) as caught:
        read_rows(_file(tmp_path, {"text": "a good line"}, line), Text)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("mark", "encoding"), [(b"\xef\xbb\xbf", "UTF-8"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")]
)
def test_byte_order_marks_are_refused(tmp_path: Path, mark: bytes, encoding: str) -> None:
    with pytest.raises(BuildError, match=f"line 1 starts with a {encoding} byte order mark"):
        read_rows(_file(tmp_path, mark + b'{"text": "a"}'), Text)


def test_rows_know_their_line_and_nothing_else_does(tmp_path: Path) -> None:
    first, second = read_rows(_file(tmp_path, {"text": "a\u2028b"}, b"", {"text": "c", "label": 3}), Text)
    assert (first.text, first.where) == ("a\u2028b", f"{tmp_path / 'rows.jsonl'} line 1")
    assert second.where.endswith("rows.jsonl line 3")
    assert second == Text(text="c")
    assert hash(second) == hash(Text(text="c"))
    assert "rows.jsonl" not in second.model_dump_json() + repr(second)
    assert Text(text="c").where == "a row of no file"


def test_windows_line_ends_are_white_space(tmp_path: Path) -> None:
    assert read_rows(_file(tmp_path, b'{"text": "a"}\r', b"\r"), Text) == [Text(text="a")]


def test_pairs_become_two_rows_of_one_group(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        {"positive": "yes", "negative": [USER, ANSWER], "split": "tune", "template": "t"},
        {"positive": {"text": "q", "response": "r"}, "negative": "no", "group": "g"},
        _labelled("single", 1),
    )
    rows = read_contrast(path)
    assert [row.label for row in rows] == [1, 0, 1, 0, 1]
    assert [content(row) for row in rows[:4]] == [
        "yes",
        json.dumps([["user", "who are you"], ["assistant", "a lamp"]]),
        '["q", "r"]',
        "no",
    ]
    assert rows[0].group == rows[1].group is not None
    assert rows[2].group == rows[3].group == "g"
    assert rows[0].split == rows[1].split == "tune"
    assert rows[1].template == "t"
    assert [row.where.rpartition("jsonl ")[2] for row in rows[:3]] == [
        "line 1 (positive)",
        "line 1 (negative)",
        "line 2 (positive)",
    ]
    assert [row.group for row in read_rows(path, Text)] == [row.group for row in rows]


def test_groups_of_pairs_do_not_depend_on_their_line(tmp_path: Path) -> None:
    pairs = [{"positive": f"yes {index}", "negative": f"no {index}"} for index in range(3)]
    groups = {row.text: row.group for row in read_contrast(_file(tmp_path, *pairs))}
    assert len(set(groups.values())) == 3
    assert {row.text: row.group for row in read_contrast(_file(tmp_path, *reversed(pairs)))} == groups


def test_only_rows_that_stand_alone_come_in_pairs(tmp_path: Path) -> None:
    path = _file(tmp_path, {"positive": "a", "negative": "b", "answer": "c"})
    with pytest.raises(BuildError, match="line 1: row: Value error, exactly one of"):
        read_rows(path, Question)


def test_repeated_contrast_rows_are_refused(tmp_path: Path) -> None:
    rows = [_labelled("a", 1), _labelled("b", 0)]
    with pytest.raises(BuildError, match=r"line 3 repeats the text of line 1 with the same label"):
        read_contrast(_file(tmp_path, *rows, _labelled("a", 1, split="test")))
    with pytest.raises(BuildError, match=r"line 3 repeats the text of line 2 with the other label"):
        read_contrast(_file(tmp_path, *rows, _labelled("b", 1)))
    with pytest.raises(BuildError, match=r"line 3 \(negative\) repeats the text of line 2 with the same label"):
        read_contrast(_file(tmp_path, *rows, {"positive": "c", "negative": "b"}))
    # Another set is another concept, and another response is another text.
    other = [_labelled("a", 0, set=1), _labelled("c", 1, set=1), _labelled("a", 1, response="x")]
    assert len(read_contrast(_file(tmp_path, *rows, *other))) == 5


def test_repeated_questions_are_refused_and_texts_reported(tmp_path: Path) -> None:
    lines = [{"text": name, "answer": "x", "split": "tune"} for name in ("a", "b", "a")]
    with pytest.raises(BuildError, match="line 3 asks the question of line 1 again"):
        read_rows(_file(tmp_path, *lines), Question)
    rows = read_rows(_file(tmp_path, *lines), NeutralRow)
    (found,) = repeats(rows)
    assert (found.first.where[-6:], found.again.where[-6:]) == ("line 1", "line 3")


def test_questions_end_in_the_users_turn(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="what the model should say goes into `answer`"):
        read_rows(_file(tmp_path, {"messages": [USER, ANSWER], "answer": "x"}), Question)
    with pytest.raises(BuildError, match="`answer` is empty"):
        read_rows(_file(tmp_path, {"text": "a", "answer": " "}), Question)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_no_contrast(tmp_path: Path, label: int) -> None:
    with pytest.raises(BuildError, match=rf"all 2 rows of .* have label {label}; both 0 and 1 are needed"):
        read_contrast(_file(tmp_path, _labelled("a", label), _labelled("b", label)))


@pytest.mark.parametrize("key", ["group", "template"])
def test_own_splits_are_disjoint(tmp_path: Path, key: str) -> None:
    lines = [_labelled("a", 1), _labelled("b", 0, **{key: "x"}), _labelled("c", 0, split="test", **{key: "x"})]
    with pytest.raises(BuildError, match=rf"{key} 'x' is in split fit \(.*line 2\) and in split test \(line 3\)"):
        read_contrast(_file(tmp_path, *lines))


def test_splits_keep_groups_and_templates_together() -> None:
    rows = [
        Text(text=f"{group} {index}", group=f"g{group}", template=f"t{group // 2}" if group < 20 else None)
        for group in range(30)
        for index in range(2)
    ]
    split = split_by_group(rows, 0.2, 0.2, seed=1)
    assert sorted([*split.fit, *split.choose, *split.held]) == list(range(60))
    for key in ("group", "template"):
        sides = [{getattr(rows[index], key) for index in part} - {None} for part in split]
        assert all(sides)
        assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]
    turned = list(reversed(rows))
    again = split_by_group(turned, 0.2, 0.2, seed=1)
    assert {turned[index].text for index in again.held} == {rows[index].text for index in split.held}


def test_templates_that_join_everything_leave_nothing_to_split() -> None:
    rows = [Text(text=str(index), group=str(index // 2), template=str((index + 1) // 2)) for index in range(12)]
    with pytest.raises(BuildError, match="1 group"):
        split_by_group(rows, 0.2, 0.2, seed=0)


def test_templates_across_files() -> None:
    rows = {name: [Text(text=name, template=name), Text(text="no template")] for name in ("fit", "tune", "test")}
    refuse_shared_templates(rows)
    rows["test"].append(Text(text="again", template="fit"))
    with pytest.raises(BuildError, match=r"template 'fit' is in fit .* and in test"):
        refuse_shared_templates(rows)


def test_shipped_data_are_clean() -> None:
    contrast = read_contrast(LAB / "contrast.jsonl")
    assert {row.set for row in contrast} == {1, 2}
    assert len({content(row) for row in contrast}) == len(contrast)
    assert len(read_rows(LAB / "tune.jsonl", Question)) + len(read_rows(LAB / "test.jsonl", Question)) == 270
    assert not repeats(read_rows(LAB / "neutral.jsonl", NeutralRow))
    # Small talk is the same in many conversations.
    assert 0 < len(repeats(read_rows(LAB / "mapping.jsonl", Text))) < 20


def test_labels_of_contrast_rows_are_classes(tmp_path: Path) -> None:
    rows = read_contrast(_file(tmp_path, _labelled("a", 1), _labelled("b", 0)))
    assert rows == [ContrastRow(text="a", label=1), ContrastRow(text="b", label=0)]

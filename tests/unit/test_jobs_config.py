"""Configuration and data files: what is wrong is named with its key or its line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from artifacts.jobs.config import load_config, parse_change
from artifacts.jobs.contrast import split_contrast
from artifacts.jobs.data import ContrastRow, NeutralRow, Question, Text, read_rows, shared_contents, split_by_group
from artifacts.jobs.errors import BuildError
from artifacts.jobs.preset import PRESETS

CAREFUL = Path(__file__).parents[2] / "artifacts" / "lab" / "careful.yaml"


def _write(path: Path, **changes: Any) -> Path:
    content = yaml.safe_load(CAREFUL.read_text()) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def test_shipped_configuration_is_read() -> None:
    config = load_config(CAREFUL)
    assert config.name == "careful"
    assert config.data.contrast_set == 2
    assert config.evaluate.random_directions >= 30


def test_grids_come_out_ascending_and_unique(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path / "c.yaml", tune={"strengths": [0.5, 0.1, 0.5]}))
    assert config.tune.strengths == (0.1, 0.5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"nmae": "x"}, "nmae: Extra inputs"),
        ({"name": "Not A Name"}, "name: String should match"),
        ({"target": None}, "target: Field required"),
        ({"target": {"model": "m", "path": "m"}}, "target.path: Extra inputs"),
        ({"tune": {"strengths": []}}, "tune.strengths: Tuple should have at least 1 item"),
        ({"tune": {"strengths": [0.1, -1]}}, "tune.strengths.1: Input should be greater than 0"),
        ({"tune": {"strengths": [float("inf")]}}, "tune.strengths.0: Input should be a finite number"),
        ({"tune": {"perplexity_budget": 1}}, "tune.perplexity_budget: Input should be greater than 1"),
        ({"vectors": {"components": 16}}, "vectors.components: Input should be greater than or equal to 32"),
        ({"vectors": {"methods": ["magic"]}}, "vectors.methods"),
        ({"align": {"method": "magic"}}, "align.method: Input should be 'ridge', 'procrustes', 'cca'"),
        ({"preset": "magic"}, "preset: Input should be 'recommended' or 'paper'"),
        ({"tune": {"objective": "magic"}}, "tune.objective: Input should be 'exact' or 'likelihood'"),
        ({"evaluate": {"control_draws": 3}}, "evaluate.control_draws: Input should be greater than or equal to 10"),
        (
            {"evaluate": {"random_directions": 5}},
            "evaluate.random_directions: Input should be greater than or equal to 30",
        ),
        ({"layers": {"expert": [-1]}}, "layers.expert"),
    ],
)
def test_wrong_keys_are_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(BuildError) as caught:
        load_config(_write(tmp_path / "c.yaml", **changes))
    assert named in str(caught.value)


def test_position_is_checked_with_the_configuration(tmp_path: Path) -> None:
    data = yaml.safe_load(CAREFUL.read_text())["data"]
    config = load_config(_write(tmp_path / "c.yaml", data=data | {"position": "mean-response"}))
    assert config.data.position == "mean-response"
    with pytest.raises(BuildError, match=r"data.position: .*somewhere"):
        load_config(_write(tmp_path / "c.yaml", data=data | {"position": "somewhere"}))


def test_recommended_preset_is_the_default(tmp_path: Path) -> None:
    bare = _write(tmp_path / "c.yaml", preset=None, align=None, pairing=None, vectors=None)
    assert load_config(bare) == load_config(bare, [PRESETS["recommended"]])


def test_presets_lie_under_the_file_and_over_it_from_the_command_line(tmp_path: Path) -> None:
    path = _write(tmp_path / "c.yaml", preset="paper", align={"method": "cca"}, vectors=None)
    config = load_config(path)
    assert (config.align.method, config.align.prompts) == ("cca", "same")
    assert (config.vectors.methods, config.vectors.order) == (("rfm",), "align-then-fit")
    over = load_config(path, [PRESETS["paper"]])
    assert (over.align.method, over.pairing.method) == ("autoencoder", "low-mi")
    changed = load_config(path, [PRESETS["recommended"], parse_change("align.method=joint")])
    assert (changed.align.method, changed.align.prompts) == ("joint", "other")
    assert changed.vectors.methods == "auto"


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("seed=3", {"seed": 3}),
        ("tune.strengths=[0.1, 0.2]", {"tune": {"strengths": [0.1, 0.2]}}),
        ("evaluate.prompt=Be good.", {"evaluate": {"prompt": "Be good."}}),
        ("data.retention=null", {"data": {"retention": None}}),
    ],
)
def test_changes_are_keys_with_yaml_values(text: str, change: dict[str, Any]) -> None:
    assert parse_change(text) == change


@pytest.mark.parametrize("text", ["seed", "=3", "a..b=1", "a=[1"])
def test_wrong_changes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"seed|=3|a\.\.b|a="):
        parse_change(text)


@pytest.mark.parametrize(("text", "said"), [("a: [", "is not a YAML file"), ("- 1", "holds a list"), ("", "NoneType")])
def test_files_that_hold_no_mapping(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(BuildError, match=said):
        load_config(tmp_path / "c.yaml")


def test_missing_configuration(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="No such file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        ("{", Text, "line 2: row: Invalid JSON"),
        ('{"group": "a"}', Text, "exactly one of"),
        ('{"text": "a", "messages": [{"role": "user", "content": "b"}]}', Text, "exactly one of"),
        ('{"messages": [{"role": "user"}]}', Text, "messages.0.content: Field required"),
        ('{"text": "a", "label": 2}', ContrastRow, "label: Input should be 0 or 1"),
        ('{"text": "a", "label": 1, "split": "train"}', ContrastRow, "split: Input should be"),
        ('{"text": "a"}', Question, "answer: Field required"),
        ('{"text": "a"}', NeutralRow, "split: Field required"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, kind: type[Text], said: str) -> None:
    good = {"text": "t", "label": 1, "answer": "a", "split": "tune"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(BuildError, match="line 2") as caught:
        read_rows(tmp_path / "rows.jsonl", kind)
    assert said in str(caught.value)


def test_empty_and_missing_data(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(BuildError, match="has no rows"):
        read_rows(tmp_path / "rows.jsonl", Text)
    with pytest.raises(BuildError, match="cannot read"):
        read_rows(tmp_path / "none.jsonl", Text)


def test_groups_stay_on_one_side_whatever_the_order() -> None:
    rows = [Text(text=f"{group} {index}", group=str(group)) for group in range(20) for index in range(3)]
    split = split_by_group(rows, 0.15, 0.2, seed=4)
    assert sorted([*split.fit, *split.choose, *split.held]) == list(range(60))
    assert [len(part) for part in split] == [39, 9, 12]
    held = {rows[index].group for index in split.held}
    assert not held & {rows[index].group for index in [*split.fit, *split.choose]}
    turned = list(reversed(rows))
    assert {turned[index].group for index in split_by_group(turned, 0.15, 0.2, seed=4).held} == held
    assert {rows[index].group for index in split_by_group(rows, 0.15, 0.2, seed=5).held} != held


def test_splitting_needs_three_groups() -> None:
    with pytest.raises(BuildError, match="at least 3"):
        split_by_group([Text(text="a"), Text(text="b"), Text(text="a")], 0.1, 0.1, 0)


def test_contrast_rows_keep_their_own_splits() -> None:
    rows = [
        ContrastRow(text=f"{split} {label}", label=label, split=split)
        for split in ("fit", "tune", "test")
        for label in (0, 1)
    ]
    split = split_contrast(rows, 0)
    assert (split.fit, split.choose, split.held) == ([0, 1], [2, 3], [4, 5])
    with pytest.raises(BuildError, match=r"`held` part .* labels \[0\]"):
        split_contrast(rows[:5], 0)


def test_one_given_part_is_halved_by_group_and_fitted_on_by_nobody() -> None:
    rows = [
        ContrastRow(text=f"{part} {group} {label}", label=label, split=part, group=f"{part} {group}")
        for part in ("fit", "test")
        for group in range(4)
        for label in (0, 1)
    ]
    split = split_contrast(rows, 0)
    assert sorted([*split.choose, *split.held]) == list(range(8, 16))
    assert not {rows[index].group for index in split.choose} & {rows[index].group for index in split.held}
    assert not set(split.known) & set(split.held)


def test_shared_texts_are_counted_once() -> None:
    chat = Text.model_validate({"messages": [{"role": "user", "content": "a"}]})
    assert shared_contents([chat, chat, Text(text="b")], [chat, Text(text="c")]) == 1

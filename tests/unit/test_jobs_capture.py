"""The capture step: both models with their own tokens, at the configured position; what cannot work is found first."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts.jobs import capture
from artifacts.jobs.build import Build
from artifacts.jobs.config import load_config
from artifacts.jobs.errors import BuildError

TUNE = {"strengths": [0.1], "perplexity_budget": 10.0, "minimum_gain": -1.0}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def data(tiny_build: Any, tmp_path: Path) -> dict[str, str]:
    """Keys of the configuration that name the data files."""
    tiny_build.change(tune=TUNE)
    return {name: f"{name}.jsonl" for name in ("contrast", "mapping", "tune", "test", "neutral")}


def _build(tiny_build: Any, tmp_path: Path) -> Build:
    return Build(load_config(tiny_build.config), tmp_path, tmp_path / "work", quiet=True)


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


@pytest.mark.usefixtures("data")
def test_both_models_are_captured_on_both_files(tiny_build: Any, tmp_path: Path) -> None:
    build = _build(tiny_build, tmp_path)
    capture.run(build)
    for role, model in (("expert", build.load_expert()), ("target", build.target)):
        for name, rows in (("contrast", build.contrast), ("mapping", build.mapping)):
            states = capture.store(build, role, name).layer(0)
            assert states.shape == (len(rows), model.hidden_size)
            chat = [message.model_dump() for message in rows[2].messages]
            ids = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
            hidden = model.network(**ids, output_hidden_states=True).hidden_states
            torch.testing.assert_close(states[2], hidden[1][0, -1], atol=1e-5, rtol=1e-4)
    norms = capture.layer_norms(build)
    assert sorted(norms) == list(range(3))
    assert all(norm > 0 for norm in norms.values())
    written = sum(
        capture.store(build, role, name).layer(layer).nbytes
        # The untrained control will be as large as the expert.
        for role, layers in (("expert", 2), ("expert", 2), ("target", 3))
        for name in ("contrast", "mapping")
        for layer in range(layers)
    )
    assert capture.states_bytes(build) == written


def test_position_is_the_configured_one(tiny_build: Any, data: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mapping.jsonl").write_text(
        "".join(
            json.dumps({"text": f"the lamp is {index} plus {index} .", "group": str(index)}) + "\n"
            for index in range(9)
        )
    )
    contrast = (tmp_path / "contrast.jsonl").read_text()
    assert "plus" in contrast
    last = _build(tiny_build, tmp_path)
    tiny_build.change(data=data | {"position": "token:plus"})
    build = _build(tiny_build, tmp_path)
    assert capture.settings(build) != capture.settings(last)
    capture.run(build)
    states = capture.store(build, "target", "mapping").layer(1)
    for index, row in enumerate(build.mapping):
        ids = torch.tensor([build.target.encoder.encode(row).ids])
        place = ids[0].tolist().index(build.target.tokenizer.convert_tokens_to_ids("plus"))
        hidden = build.target.network(ids, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(states[index], hidden[0, place], atol=1e-5, rtol=1e-4)


def test_positions_that_a_row_lacks_are_named(tiny_build: Any, data: dict[str, str], tmp_path: Path) -> None:
    tiny_build.change(data=data | {"position": "mean-response"})
    with pytest.raises(BuildError, match=r"contrast.jsonl line 1 cannot be read at position mean-response of .*qwen2"):
        capture.run(_build(tiny_build, tmp_path))
    assert not list((tmp_path / "work").rglob("shard-*"))


@pytest.mark.usefixtures("data")
def test_labels_and_texts_decide_the_step(tiny_build: Any, tmp_path: Path) -> None:
    before = capture.settings(_build(tiny_build, tmp_path))
    assert capture.settings(_build(tiny_build, tmp_path)) == before
    _append(tmp_path / "mapping.jsonl", {"text": "a lamp"})
    assert capture.settings(_build(tiny_build, tmp_path)) != before


@pytest.mark.usefixtures("data")
def test_a_small_disk_is_found_before_a_model_is_loaded(
    tiny_build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = _build(tiny_build, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40, capture.states_bytes(build) - 1))
    with pytest.raises(BuildError, match=r"the states need .* KiB in .*work/capture and there is room for"):
        capture.run(build)
    assert "target" not in vars(build)


@pytest.mark.usefixtures("data")
def test_questions_too_long_with_their_answer_are_named(tiny_build: Any, tmp_path: Path) -> None:
    question = {"text": "what is " + "plus " * 55, "answer": "4 " * 20, "group": "long"}
    _append(tmp_path / "tune.jsonl", question)
    with pytest.raises(BuildError, match=r"tune.jsonl line 6 has 78 tokens of .*llama., whose context holds 64"):
        capture.run(_build(tiny_build, tmp_path))
    assert not list((tmp_path / "work").rglob("shard-*"))

"""What a build says before it starts: sizes from configurations alone, costs by the printed formulae."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from artifacts.jobs.build import Build
from artifacts.jobs.capture import states_bytes
from artifacts.jobs.config import load_config
from artifacts.jobs.cost import Workload, peak_memory, step_costs
from artifacts.jobs.errors import BuildError
from artifacts.jobs.plan import matmul_rate, print_plan, workload_of
from artifacts.jobs.runner import run_steps
from artifacts.jobs.shape import model_shape


def _plan(config: Path, work: Path) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    print_plan(Build(load_config(config), config.parent, work, quiet=True), Path("out.safetensors"), 1e12, console)
    return console.export_text()


@pytest.fixture
def load(tiny_build: Any, tmp_path: Path) -> Workload:
    return workload_of(Build(load_config(tiny_build.config), tiny_build.config.parent, tmp_path / "work"))


def test_shape_needs_no_weights(tiny_target: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_target / "config.json").read_bytes())
    shape = model_shape("tiny", tmp_path, "bfloat16")
    network = AutoModelForCausalLM.from_pretrained(tiny_target)
    assert shape.parameters == network.num_parameters()
    assert (shape.num_layers, shape.hidden_size, shape.bytes_per_weight) == (3, 32, 2)
    assert shape.vocab_size == network.config.vocab_size


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot tell the size of nothing"):
        model_shape("nothing", tmp_path, "float32")


def test_disk_of_the_plan_is_what_capture_asks_for(load: Workload, tiny_build: Any, tmp_path: Path) -> None:
    build = Build(load_config(tiny_build.config), tiny_build.config.parent, tmp_path / "work")
    assert sum(each.disk_bytes for each in step_costs(load)) == states_bytes(build)


def test_costs_grow_as_the_formulae_say(load: Workload) -> None:
    def total(name: str, **changes: int) -> float:
        costs = {each.name: each.forward + each.algebra for each in step_costs(dataclasses.replace(load, **changes))}
        return costs[name]

    assert total("evaluate", test_tokens=2 * load.test_tokens, asked_tokens=2 * load.asked_tokens) == 2 * total(
        "evaluate"
    )
    assert total("align", align_permutations=201) == pytest.approx(total("align") * 202 / (load.align_permutations + 1))
    assert total("tune", tune_tokens=3 * load.tune_tokens) == 3 * total("tune")
    bigger = dataclasses.replace(load, target=dataclasses.replace(load.target, parameters=10**9))
    assert peak_memory(bigger) - peak_memory(load) == 4 * (10**9 - load.target.parameters)


def test_plan_names_choices_costs_and_what_is_finished(tiny_build: Any, tmp_path: Path) -> None:
    text = _plan(tiny_build.config, tmp_path / "work")
    for said in ("tiny-target", "tiny-expert", "held-out, 1 of 6", "2 x parameters x tokens", "1,000 GFLOP/s (given)"):
        assert said in text
    assert "finished" not in text
    assert not (tmp_path / "work").exists()
    build = Build(load_config(tiny_build.config), tiny_build.config.parent, tmp_path / "work", quiet=True)
    run_steps(build, "capture", False, lambda line: None)
    assert _plan(tiny_build.config, tmp_path / "work").count("finished") == 1


def test_rate_of_this_machine_is_measured() -> None:
    assert matmul_rate("cpu", "float32") > 1e8

"""What must not start: a foreign bundle, a damaged one, an engine that cannot be steered. One line, no traceback."""

import gzip
import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from artifacts.bundle import MAX_HEADER_BYTES, load_bundle
from artifacts.manifest import ModelIdentity, Trigger
from server.profiles import recommended_settings
from server.registry.registry import Registry

pytestmark = pytest.mark.engine

TIMEOUT_S = 180
# Imports vLLM once and runs every start in a child of its own: imports are nearly all that a refused start costs.
DRIVER = """
import json, os, sys
from server import cli
from server.commands import serve
import vllm.engine.arg_utils, vllm.entrypoints.launchers.cli_args

for line in sys.stdin:
    case = json.loads(line)
    child = os.fork()
    if child == 0:
        with open(case["stderr"], "wb") as stderr:
            os.dup2(stderr.fileno(), 2)
        # vLLM logs to standard output, which here carries the exit statuses.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 70
        try:
            status = cli.main(case["argv"])
        except SystemExit as end:
            status = end.code
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Ending(NamedTuple):
    status: int
    stderr: str


@pytest.fixture(scope="module")
def serve(vllm_environment: dict[str, str], target: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run `expertsteer serve TARGET ...` to its end: `serve(*flags)`."""
    folder = tmp_path_factory.mktemp("starts")
    command = [sys.executable, "-c", DRIVER]
    with (
        (folder / "driver.log").open("wb") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=vllm_environment, text=True
        ) as driver,
    ):

        def run(*flags: str) -> Ending:
            stderr = folder / "stderr"
            # Port 0 is never listened on: nothing here may get that far.
            argv = ["serve", str(target), "--dtype", "float32", "--host", "127.0.0.1", "--port", "0", *flags]
            assert driver.stdin is not None
            assert driver.stdout is not None
            driver.stdin.write(json.dumps({"argv": argv, "stderr": str(stderr)}) + "\n")
            driver.stdin.flush()
            status = int(driver.stdout.readline())
            return Ending(status, stderr.read_text(errors="replace"))

        yield run
        driver.kill()


def assert_refused(ending: Ending, *parts: str) -> None:
    """Ended by itself with status 1 and, last on stderr, one line that holds every part."""
    assert ending.status == 1, ending.stderr
    assert "Traceback" not in ending.stderr
    last = ending.stderr.rstrip().splitlines()[-1]
    assert last.startswith("expertsteer serve: ")
    for part in parts:
        assert part in last


@pytest.fixture
def identity() -> dict[str, Any]:
    return {"id": "other-target", "architecture": "LlamaForCausalLM", "hidden_size": 128, "num_layers": 6}


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"architecture": "Qwen2ForCausalLM"}, ["Qwen2ForCausalLM", "LlamaForCausalLM"]),
        ({"hidden_size": 96}, ["96", "128"]),
        ({"num_layers": 7}, ["7", "6"]),
        ({"fingerprint": "sha256:" + "5" * 64}, ["sha256:" + "5" * 64, "fingerprint"]),
    ],
    ids=["architecture", "width", "layers", "weights"],
)
def test_bundle_of_another_model(
    serve: Callable[..., Ending],
    make_bundle: Callable[..., Path],
    identity: dict[str, Any],
    change: dict[str, Any],
    values: list[str],
) -> None:
    path = make_bundle("foreign", [0], 9, target=ModelIdentity(**(identity | change)))
    assert_refused(serve("--steering-bundle", str(path)), str(path), "other-target", *values)


def truncated(good: bytes) -> bytes:
    return good[:-1]


def cut_inside_the_header(good: bytes) -> bytes:
    return good[:100]


def oversized_header(good: bytes) -> bytes:
    return (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + good[8:]


def absurd_header(good: bytes) -> bytes:
    return (2**63).to_bytes(8, "little") + good[8:]


def not_a_number(good: bytes) -> bytes:
    return good[:-4] + torch.tensor([float("nan")]).numpy().tobytes()


def infinite(good: bytes) -> bytes:
    return good[:-4] + torch.tensor([float("inf")]).numpy().tobytes()


def pickled(_good: bytes) -> bytes:
    return pickle.dumps({"runtime.0.0.write": [1.0] * 128})


def torch_saved(_good: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save({"runtime.0.0.write": torch.ones(128)}, buffer)
    return buffer.getvalue()


def zipped(good: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("bundle.safetensors", good)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "The file is cut off: its tensors need"),
        (cut_inside_the_header, "The file is cut off: its header claims"),
        (oversized_header, f"claims {MAX_HEADER_BYTES + 1} bytes, more than the {MAX_HEADER_BYTES} allowed"),
        (absurd_header, f"claims {2**63} bytes, more than the {MAX_HEADER_BYTES} allowed"),
        (not_a_number, "runtime.0.0.write holds NaN or infinity in 1 of 128 values"),
        (infinite, "runtime.0.0.write holds NaN or infinity in 1 of 128 values"),
        (pickled, "This is a Python pickle"),
        (torch_saved, "This is a zip archive, such as torch.save writes"),
        (zipped, "This is a zip archive"),
        (gzip.compress, "This is a gzip file"),
        (lambda _good: b"", "The file is empty"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_bundle(
    serve: Callable[..., Ending],
    make_bundle: Callable[..., Path],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    reason: str,
) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(make_bundle("good", [0], 9).read_bytes()))
    assert_refused(serve("--steering-bundle", str(path)), str(path), reason)


def test_file_that_is_no_bundle(serve: Callable[..., Ending], target: Path, tmp_path: Path) -> None:
    save_file({"runtime.0.0.write": torch.ones(128)}, tmp_path / "weights.safetensors")
    for path in (tmp_path / "weights.safetensors", target / "model.safetensors", tmp_path, tmp_path / "missing"):
        assert_refused(serve("--steering-bundle", str(path)), str(path))


def test_two_bundles_of_one_name(serve: Callable[..., Ending], make_bundle: Callable[..., Path]) -> None:
    paths = [str(make_bundle("same", [0], seed)) for seed in (1, 2)]
    assert_refused(serve("--steering-bundle", *paths), "'same'", "NAME=FILE")


def test_profile_name_with_an_at_sign(serve: Callable[..., Ending], make_bundle: Callable[..., Path]) -> None:
    ending = serve("--steering-bundle", f"a@b={make_bundle('good', [0], 9)}")
    assert ending.status == 2
    assert "'a@b=" in ending.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--pipeline-parallel-size", "2", "--enforce-eager"], "--pipeline-parallel-size and --enforce-eager on a CPU"),
        (
            ["--speculative-config", '{"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 2}'],
            "--speculative-config with method ngram_gpu",
        ),
        (["--headless"], "--headless"),
        (["--worker-cls", "vllm.v1.worker.cpu_worker.CPUWorker"], "--worker-cls"),
        (["--scheduler-cls", "vllm.v1.core.sched.scheduler.Scheduler"], "--scheduler-cls"),
        (
            ["--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'],
            "--kv-transfer-config",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_engine_that_cannot_be_steered(serve: Callable[..., Ending], flags: list[str], named: str) -> None:
    assert_refused(serve(*flags), named, "Steering is not supported together with")


NGRAM = '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}'


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--steering-exclude", "reasoning"],
            ["'good' leaves reasoning unsteered", "--steering-span reasoning=OPEN,CLOSE"],
        ),
        (
            ["--steering-exclude", "good=tool_calls", "--tool-call-parser", "hermes", "--enable-auto-tool-choice"],
            ["Span tool_calls: '<tool_call>' is not a single token", "--steering-span tool_calls=OPEN,CLOSE"],
        ),
        (
            ["--steering-exclude", "reasoning", "--steering-span", "reasoning=<|user|>,<|user|>"],
            ["'<|user|>' cannot both open and close it"],
        ),
        (["--steering-exclude", "other=reasoning"], ["names profile 'other'", "named by --steering-bundle: good"]),
        (
            [
                *("--steering-exclude", "reasoning", "--steering-span", "reasoning=<|user|>,<|end|>"),
                *("--speculative-config", NGRAM),
            ],
            ["Spans that stay unsteered are not supported together with --speculative-config"],
        ),
    ],
    ids=["unknown delimiters", "parser's delimiters", "one delimiter", "unknown profile", "speculation"],
)
def test_spans_that_cannot_be_left_out(
    serve: Callable[..., Ending], make_bundle: Callable[..., Path], flags: list[str], words: list[str]
) -> None:
    assert_refused(serve("--steering-bundle", str(make_bundle("good", [0], 9)), *flags), *words)


@pytest.mark.parametrize(
    "flags",
    [
        ["--steering-exclude", "thinking"],
        ["--steering-exclude", "a=reasoning,"],
        ["--steering-span", "reasoning"],
        ["--steering-span", "reasoning=<think>"],
        ["--steering-span", "structured_output=a,b"],
        ["--steering-fusion", "sometimes"],
    ],
    ids=lambda flags: flags[1],
)
def test_flags_that_make_no_sense(serve: Callable[..., Ending], flags: list[str]) -> None:
    ending = serve(*flags)
    assert ending.status == 2
    assert f"argument {flags[0]}:" in ending.stderr.splitlines()[-1]


def test_a_trigger_that_no_token_fits(
    serve: Callable[..., Ending], make_bundle: Callable[..., Path], kind_examples: dict[str, dict[str, Any]]
) -> None:
    trigger = {"rare": Trigger(text_contains="xyzzy")}
    path = make_bundle("waiting", [0], 9, [kind_examples["add"] | {"gate": "rare"}], triggers=trigger)
    assert_refused(serve("--steering-bundle", str(path)), "Trigger 'rare' asks for tokens that contain 'xyzzy'")


def test_rust_front_end(vllm_environment: dict[str, str], target: Path) -> None:
    """As a user runs it: a whole process."""
    result = subprocess.run(
        [sys.executable, "-m", "server.cli", "serve", str(target)],
        env=vllm_environment | {"VLLM_USE_RUST_FRONTEND": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert_refused(Ending(result.returncode, result.stderr), "VLLM_USE_RUST_FRONTEND")


@pytest.fixture
def used_registry(tmp_path: Path, make_bundle: Callable[..., Path]) -> Path:
    """A registry with one profile."""
    folder = tmp_path / "registry"
    registry = Registry.open(folder)
    bundle = load_bundle(make_bundle("kept", [1], 9))
    copy = registry.store.incoming()
    copy.write_bytes(make_bundle("kept", [1], 9).read_bytes())
    registry.store.keep(copy, bundle.digest)
    registry.add_bundle(bundle, actor="test", source="test")
    registry.put_profile("kept", recommended_settings(bundle.digest, bundle.manifest), actor="test")
    registry.close()
    return folder


def test_registry_whose_bundle_is_gone(serve: Callable[..., Ending], used_registry: Path) -> None:
    (bundle,) = (used_registry / "bundles").iterdir()
    bundle.unlink()
    assert_refused(serve("--steering-registry", str(used_registry)), bundle.stem, "missing", "add it again")


@pytest.mark.parametrize("size", [1, 100, 5000], ids=lambda size: f"{size} bytes")
def test_truncated_registry(serve: Callable[..., Ending], used_registry: Path, size: int) -> None:
    for log in used_registry.glob("*-wal"):
        log.unlink()
    with (used_registry / "registry.sqlite").open("r+b") as file:
        file.truncate(size)
    assert_refused(serve("--steering-registry", str(used_registry)), str(used_registry))


def test_registry_that_is_none(serve: Callable[..., Ending], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert_refused(serve("--steering-registry", str(file)), str(file))
    (tmp_path / "registry.sqlite").write_text("no database at all\n" * 100)
    assert_refused(serve("--steering-registry", str(tmp_path)), str(tmp_path))
    (tmp_path / "registry.sqlite").unlink()
    tmp_path.chmod(0o777)
    assert_refused(serve("--steering-registry", str(tmp_path)), "Other users can write")

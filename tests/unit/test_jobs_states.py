"""Capture: the right layer and token of every architecture, and stores that are whole or not read."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from artifacts.jobs import shards
from artifacts.jobs.data import Text, read_rows
from artifacts.jobs.errors import BuildError
from artifacts.jobs.model import CausalModel, batches, find_layers, load_model
from artifacts.jobs.position import Position, parse_position
from artifacts.jobs.residual import median_norms, read_states
from artifacts.jobs.shards import bytes_per_row, check_space, is_whole, rows_per_shard, write_shard
from artifacts.jobs.states import StateStore, capture_states

VOCABULARY, WIDTH, DEPTH = 40, 32, 3
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "intermediate_size": 2 * WIDTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
SLIDING = {"sliding_window": 4}
GPT2 = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
# Configuration class, its keys, and the final norm that Transformers applies to the last of its hidden states.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", COMMON | GROUPED, "norm"),
    "qwen2": ("Qwen2Config", COMMON | {"num_key_value_heads": 2}, "norm"),
    "qwen3": ("Qwen3Config", COMMON | GROUPED, "norm"),
    "gemma2": ("Gemma2Config", COMMON | GROUPED | SLIDING, "norm"),
    "gemma3": ("Gemma3TextConfig", COMMON | GROUPED | SLIDING, "norm"),
    "mistral": ("MistralConfig", COMMON | GROUPED | SLIDING, "norm"),
    "phi": ("PhiConfig", COMMON, "final_layernorm"),
    "phi3": ("Phi3Config", COMMON | {"num_key_value_heads": 2} | SLIDING, "norm"),
    "gpt2": ("GPT2Config", GPT2, "ln_f"),
    "gpt_neox": ("GPTNeoXConfig", COMMON, "final_layer_norm"),
    "opt": ("OPTConfig", COMMON | {"ffn_dim": 2 * WIDTH, "word_embed_proj_dim": WIDTH}, "decoder.final_layer_norm"),
    "mixtral": ("MixtralConfig", COMMON | GROUPED | {"num_local_experts": DEPTH}, "norm"),
}
LENGTHS = (7, 1, 12, 3, 12)
Usage = namedtuple("Usage", "total used free")


class Words:
    """What capture needs of a tokenizer."""

    pad_token_id = 1
    bos_token_id = 0
    unk_token_id = None
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def __len__(self) -> int:
        return VOCABULARY


def _network(name: str) -> Any:
    kind, keys, _ = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = getattr(transformers, kind)(**keys, attn_implementation="eager")
        network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Fresh norms are 1, which hides where they stand.
        for weight in network.parameters():
            weight.data += 0.1 * torch.randn(weight.shape)
    return network.eval().requires_grad_(False)


def _causal(name: str) -> CausalModel:
    network = _network(name)
    return CausalModel(name, network, Words(), find_layers(network, DEPTH), WIDTH, torch.device("cpu"))


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> CausalModel:
    return _causal(request.param)


@pytest.fixture(scope="module")
def llama() -> CausalModel:
    return _causal("llama")


@pytest.fixture
def tokens() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture
def rows(tokens: list[list[int]]) -> list[Text]:
    return [Text(text=" ".join(map(str, [0, *ids]))) for ids in tokens]


def _last(rows: Sequence[Sequence[int]]) -> list[range]:
    return [range(len(row) - 1, len(row)) for row in rows]


def _final_norm(model: CausalModel) -> nn.Module:
    found: nn.Module = model.network.base_model.get_submodule(ARCHITECTURES[model.name][2])
    return found


def test_layers_are_numbered_as_the_blocks(model: CausalModel, tokens: list[list[int]]) -> None:
    states = read_states(model, tokens, _last(tokens), range(DEPTH))
    assert states.shape == (DEPTH, len(tokens), WIDTH)
    for index, ids in enumerate(tokens):
        hidden = model.network(torch.tensor([ids]), output_hidden_states=True).hidden_states
        assert len(hidden) == DEPTH + 1
        for layer in range(DEPTH - 1):
            # The first of Transformers' hidden states is the embedding, so a block's output comes one later.
            torch.testing.assert_close(states[layer, index], hidden[layer + 1][0, -1], atol=1e-5, rtol=1e-4)
        # Only the last of them has the final norm applied, which a state has not.
        torch.testing.assert_close(_final_norm(model)(states[-1, index]), hidden[-1][0, -1], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(states[-1, index], hidden[-1][0, -1], atol=1e-2)


def test_padding_on_the_left_would_give_the_same(model: CausalModel, tokens: list[list[int]]) -> None:
    width = max(map(len, tokens))
    ids = torch.tensor([[1] * (width - len(row)) + row for row in tokens])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in tokens])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    options = {} if model.name == "opt" else {"position_ids": places}
    hidden = model.network(ids, attention_mask=mask, output_hidden_states=True, **options).hidden_states
    states = read_states(model, tokens, _last(tokens), range(DEPTH - 1))
    for layer in range(DEPTH - 1):
        torch.testing.assert_close(states[layer], hidden[layer + 1][:, -1], atol=1e-5, rtol=1e-4)


def test_batches_do_not_matter(model: CausalModel, tokens: list[list[int]]) -> None:
    together = read_states(model, tokens, _last(tokens), [2, 0])
    for index, ids in enumerate(tokens):
        alone = read_states(model, [ids], _last([ids]), [2, 0])
        torch.testing.assert_close(together[:, index], alone[:, 0], atol=1e-5, rtol=1e-4)


def test_means_are_over_the_span(model: CausalModel, tokens: list[list[int]]) -> None:
    spans = [range(2, 5), range(0, 1), range(0, 12), range(1, 3), range(11, 12)]
    means = read_states(model, tokens, spans, [1])[0]
    for index, (ids, span) in enumerate(zip(tokens, spans, strict=True)):
        hidden = model.network(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(means[index], hidden[span.start : span.stop].mean(0), atol=1e-5, rtol=1e-4)


def test_weights_in_bfloat16_are_read_bit_by_bit(tokens: list[list[int]]) -> None:
    network = _network("llama").to(torch.bfloat16)
    model = CausalModel("llama", network, Words(), find_layers(network, DEPTH), WIDTH, torch.device("cpu"))
    states = read_states(model, tokens[:1], _last(tokens[:1]), [0])
    assert states.dtype == torch.bfloat16
    hidden = network(torch.tensor(tokens[:1]), output_hidden_states=True).hidden_states[1]
    assert torch.equal(states[0], hidden[:, -1])
    means = read_states(model, tokens[:1], [range(2, 6)], [0])
    assert means.dtype == torch.float32
    torch.testing.assert_close(means[0], hidden[:, 2:6].float().mean(1), atol=1e-6, rtol=1e-5)


def test_median_norms_of_states_that_are_no_numbers(tokens: list[list[int]]) -> None:
    model = _causal("llama")
    model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(BuildError, match="median norm of llama after layer 1 is nan; give dtype bfloat16"):
        median_norms(model, tokens, range(DEPTH), 64)


def test_as_many_experts_as_layers_are_no_layers() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Identity(), nn.Identity()])

    network = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
    assert find_layers(network, 2) is network["layers"]


def _capture(model: CausalModel, rows: Sequence[Text], directory: Path, **options: Any) -> bool:
    settings: dict[str, Any] = {"layers": range(DEPTH), "digest": "d", "batch_tokens": 20, "title": "", "quiet": True}
    return capture_states(model, rows, directory=directory, **(settings | options))


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 2)


@pytest.mark.usefixtures("small_shards")
def test_stores_keep_the_order_of_the_rows(llama: CausalModel, rows: list[Text], tmp_path: Path) -> None:
    assert _capture(llama, rows, tmp_path / "store")
    assert not _capture(llama, rows, tmp_path / "store")
    ids = [llama.encoder.encode(row).ids for row in rows]
    assert sorted(_files(tmp_path / "store")) == [
        "done.json",
        "inputs.json",
        *(f"shard-0000{number}.safetensors" for number in range(3)),
    ]
    for layer in range(DEPTH):
        states = StateStore(tmp_path / "store").layer(layer)
        torch.testing.assert_close(states, read_states(llama, ids, _last(ids), [layer])[0], atol=1e-5, rtol=1e-4)


def test_positions_reach_the_states(llama: CausalModel, tmp_path: Path) -> None:
    rows = [Text(text="0 5 7", response=" 9 11 5 13"), Text(text="0 4 5", response=" 6")]
    stores = {}
    for form in ("last", "last-prompt", "mean-response", "token:5"):
        _capture(llama, rows, tmp_path / form, position=parse_position(form))
        stores[form] = StateStore(tmp_path / form).layer(1)
    hidden = [llama.network(torch.tensor([llama.encoder.encode(row).ids]), output_hidden_states=True) for row in rows]
    first, second = (each.hidden_states[2][0] for each in hidden)
    expected = {
        "last": (first[6], second[3]),
        "last-prompt": (first[2], second[2]),
        "mean-response": (first[3:].mean(0), second[3]),
        "token:5": (first[5], second[2]),
    }
    for form, states in expected.items():
        torch.testing.assert_close(stores[form], torch.stack(states), atol=1e-5, rtol=1e-4)


def test_bfloat16_takes_half_the_disk(llama: CausalModel, rows: list[Text], tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        _capture(llama, rows, tmp_path / dtype, storage_dtype=dtype)
        stored = load_file(tmp_path / dtype / "shard-00000.safetensors")
        sizes[dtype] = sum(tensor.nbytes for tensor in stored.values())
        assert sizes[dtype] == len(rows) * bytes_per_row(DEPTH, WIDTH, dtype)
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 4 * len(rows) * DEPTH * WIDTH
    exact, rounded = (StateStore(tmp_path / dtype).layer(0) for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, exact.bfloat16().float())


def test_shards_are_bounded_in_rows_and_bytes() -> None:
    assert rows_per_shard(bytes_per_row(6, 128)) == shards.SHARD_ROWS
    large = bytes_per_row(80, 8192)
    assert rows_per_shard(large) * large <= shards.SHARD_BYTES < (rows_per_shard(large) + 1) * large
    assert rows_per_shard(2**40) == 1


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "other rows", "no safetensors"])
def test_damaged_shards_are_computed_again_and_never_read(
    damage: str, llama: CausalModel, rows: list[Text], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    _capture(llama, rows, store)
    whole = _files(store)
    shard = store / "shard-00001.safetensors"
    if damage == "missing":
        shard.unlink()
    else:
        content = whole[shard.name]
        with_other_rows = whole["shard-00002.safetensors"]
        damaged = {"cut": content[:-1], "empty": b"", "other rows": with_other_rows, "no safetensors": b"x" * 100}
        shard.write_bytes(damaged[damage])
    with pytest.raises(BuildError, match=r"was changed since its capture \(.*\); delete it and run capture again"):
        StateStore(store).layer(0)
    (store / "done.json").unlink()
    (store / f".{shard.name}").write_bytes(whole[shard.name][:50])
    (store / ".tmpAbCdEf").write_bytes(b"left by a killed run")
    with pytest.raises(BuildError, match="are not finished; run the capture step again"):
        StateStore(store).layer(0)
    kept = (store / "shard-00000.safetensors").stat().st_mtime_ns
    assert _capture(llama, rows, store)
    assert _files(store) == whole
    assert (store / "shard-00000.safetensors").stat().st_mtime_ns == kept


@pytest.mark.usefixtures("small_shards")
def test_other_inputs_start_anew(llama: CausalModel, rows: list[Text], tmp_path: Path) -> None:
    _capture(llama, rows, tmp_path / "store")
    assert _capture(llama, rows[:1], tmp_path / "store", digest="e")
    assert StateStore(tmp_path / "store").layer(2).shape == (1, WIDTH)
    with pytest.raises(BuildError, match=r"are of layers \[0, 1, 2\], not of layer 3"):
        StateStore(tmp_path / "store").layer(3)


@pytest.mark.usefixtures("small_shards")
def test_interruption_by_the_keyboard_can_be_resumed(llama: CausalModel, rows: list[Text], tmp_path: Path) -> None:
    _capture(llama, rows, tmp_path / "whole")
    calls = iter(range(100))

    def interrupt(*_: object) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    handle = llama.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        _capture(llama, rows, tmp_path / "store", batch_tokens=1)
    handle.remove()
    assert sorted(_files(tmp_path / "store")) == ["inputs.json", "shard-00000.safetensors"]
    _capture(llama, rows, tmp_path / "store")
    assert _files(tmp_path / "store").keys() == _files(tmp_path / "whole").keys()


KILLED = """
import sys
from pathlib import Path
from artifacts.jobs import shards
from artifacts.jobs.data import Text, read_rows
from artifacts.jobs.model import load_model
from artifacts.jobs.states import capture_states

shards.SHARD_ROWS = 3
model = load_model("tiny", Path(sys.argv[1]), "float32", "cpu")
capture_states(model, read_rows(Path(sys.argv[2]), Text), range(3), Path(sys.argv[3]), "d", 64, "", True)
"""


def test_a_killed_run_is_resumed_to_equal_bytes(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, store = tmp_path / "rows.jsonl", tmp_path / "store"
    # Three to a shard, and each shard takes as long as the disk does: enough that the end does not come first.
    lines = [
        {"text": f"the man is {index % 12} plus {index // 12 % 12} " + "old " * (index % 7)} for index in range(1500)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tiny_target), str(data), str(store)])
    try:
        deadline = time.monotonic() + 120
        while len(list(store.glob("shard-*"))) < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed = {path.name: path.read_bytes() for path in store.glob("shard-*")}
    assert process.returncode == -signal.SIGKILL
    assert 5 <= len(killed) < 500
    assert not (store / "done.json").exists()
    monkeypatch.setattr(shards, "SHARD_ROWS", 3)
    model, rows = load_model("tiny", tiny_target, "float32", "cpu"), read_rows(data, Text)
    for directory in (store, tmp_path / "whole"):
        assert capture_states(model, rows, range(3), directory, "d", 64, "", True)
    assert _files(store) == _files(tmp_path / "whole")
    assert killed.items() <= _files(store).items()


def test_states_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = _causal("llama")
    model.network.get_input_embeddings().weight.data[9] = float("inf")
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "0 4 5"}\n\n{"text": "0 9 5"}\n')
    rows = read_rows(data, Text)
    with pytest.raises(BuildError) as caught:
        _capture(model, rows, tmp_path / "store")
    said = f"{data} line 3: the state of llama after layer 0 is not finite (NaN or infinite); give dtype bfloat16"
    assert said in str(caught.value)
    assert "shard-00000.safetensors" not in _files(tmp_path / "store")


def test_rows_longer_than_the_context_are_named(llama: CausalModel, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "0 4"}\n{"text": "0 ' + "4 " * 64 + '"}\n')
    with pytest.raises(BuildError, match=r"line 2 has 65 tokens of llama, whose context holds 64; shorten it"):
        _capture(llama, read_rows(data, Text), tmp_path / "store")


@pytest.mark.parametrize(
    ("position", "said"),
    [
        (Position("mean-response"), "cannot be read at position mean-response of llama: there is no response"),
        (Position("token", "39"), r"position token:39 of llama: the token '39' \(id 39\) does not occur"),
        (Position("token", "40"), "llama has 40 tokens, so there is no token id 40"),
    ],
)
def test_rows_without_the_position_are_named(position: Position, said: str, llama: CausalModel, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=said):
        _capture(llama, [Text(text="0 4 5")], tmp_path / "store", position=position)


def test_too_little_disk_is_found_before_the_work(
    llama: CausalModel, rows: list[Text], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = len(rows) * bytes_per_row(DEPTH, WIDTH)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**30, 2**30, needed - 1))
    with pytest.raises(BuildError, match=r"the states need 1.88 KiB in .* and there is room for 1.87 KiB"):
        _capture(llama, rows, tmp_path / "store")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**30, 2**30, needed))
    assert _capture(llama, rows, tmp_path / "store")
    # Shards that are already there take their room from nobody.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**30, 2**30, 0))
    check_space(tmp_path, needed)


FILLED = """
import sys
from pathlib import Path
import torch
from artifacts.jobs.errors import BuildError
from artifacts.jobs.shards import write_shard
directory = Path(sys.argv[1])
write_shard(directory / "shard-00000.safetensors", {"layer.0": torch.zeros(10, 10)})
try:
    write_shard(directory / "shard-00001.safetensors", {"layer.0": torch.zeros(1000, 1000)})
except BuildError as error:
    print(error, sorted(path.name for path in directory.iterdir()))
"""


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Run a Python program with a directory on a file system of one MiB as its argument."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path} && "
    if shutil.which("unshare") is None or subprocess.run([*namespace, mount + "true"], capture_output=True).returncode:
        pytest.skip("a file system of its own needs unprivileged user namespaces")

    def run(program: str) -> str:
        command = [*namespace, mount + 'exec "$@"', "sh", sys.executable, "-c", program, str(tmp_path)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment).stdout

    return run


def test_a_disk_that_fills_up_leaves_nothing_half_written(full_disk: Callable[[str], str]) -> None:
    printed = full_disk(FILLED)
    assert "is full: this shard needs 3.81 MiB, 1020.00 KiB are free" in printed
    assert "['shard-00000.safetensors']" in printed


def test_other_failures_of_writing_are_not_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="No such file") as caught:
        write_shard(tmp_path / "nowhere" / "shard-00000.safetensors", {"layer.0": torch.zeros(1)})
    assert not isinstance(caught.value, BuildError)


def test_whole_means_shape_and_dtype(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.safetensors"
    states: dict[str, Tensor] = {"layer.0": torch.zeros(2, 3), "layer.4": torch.zeros(2, 3)}
    write_shard(path, states)
    shapes = {name: (2, 3) for name in states}
    assert is_whole(path, shapes, "float32")
    assert not is_whole(path, shapes, "bfloat16")
    assert not is_whole(path, {"layer.0": (2, 3)}, "float32")
    assert not is_whole(path, dict.fromkeys(states, (3, 2)), "float32")
    assert not is_whole(tmp_path / "none", shapes, "float32")


def test_progress_counts_tokens(
    llama: CausalModel, rows: list[Text], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _capture(llama, rows, tmp_path / "store", quiet=False, title="capture expert")
    shown = capsys.readouterr().err
    total = sum(len(llama.encoder.encode(row).ids) for row in rows)
    assert "capture expert" in shown
    assert f"{total}.0/{total}.0" in shown
    assert " tokens/s" in shown


def test_batches_lie_within_their_bound(tokens: list[list[int]]) -> None:
    assert all(len(batch) * max(len(tokens[index]) for index in batch) <= 24 for batch in batches(tokens, 24))

"""The sizing formula of the operating guide is what a worker allocates."""

import re

import pytest
import torch
from documents import ROOT

from server.engine.batch import Sizes, SteeredBatch
from server.engine.spans import SpanTokens

GUIDE = (ROOT / "docs" / "operating.md").read_text()
# The guide's example, and the same where spans may stay unsteered.
EXAMPLE = Sizes(num_rows=4096, num_layers=32, hidden_size=4096, vocab_size=1000, max_num_reqs=256, max_num_tokens=8192)


def formula(sizes: Sizes, slots: int, dtype_bytes: int) -> dict[str, int]:
    return {
        "rows": sizes.num_rows * sizes.hidden_size * dtype_bytes,
        "operations": sizes.num_layers * slots * 8 * 48,
        "triggers": slots * 8 * 8,
        "tokens": sizes.max_num_tokens * 40,
    }


def allocated(batch: SteeredBatch) -> dict[str, int]:
    tensors = {
        "rows": [batch.pool.rows],
        "operations": [batch.slots.codes, batch.slots.params],
        "triggers": [batch.slots.triggers._rows],
        "tokens": [batch.tokens.slot_ids, batch.tokens.strengths, batch.gates],
    }
    return {name: sum(tensor.nbytes for tensor in found) for name, found in tensors.items()}


@pytest.mark.parametrize(("spans", "factor"), [({}, 3), ({"reasoning": SpanTokens(1, 2)}, 12)])
def test_formula_is_what_is_allocated(spans: dict[str, SpanTokens], factor: int) -> None:
    sizes = EXAMPLE._replace(num_rows=64, hidden_size=128, max_num_reqs=7)
    batch = SteeredBatch(sizes, torch.bfloat16, torch.device("cpu"), spans)
    assert f"{factor} \u00d7 max_num_seqs" in GUIDE
    assert allocated(batch) == formula(sizes, factor * sizes.max_num_reqs + 1, 2)


def test_example_adds_up() -> None:
    parts = formula(EXAMPLE, 3 * EXAMPLE.max_num_reqs + 1, 2)
    mib = {name: num_bytes / 2**20 for name, num_bytes in parts.items()}
    shown = re.search(
        r"(\d+) MiB of rows, ([\d.]+) MiB of operations and ([\d.]+) MiB of the others, together (\d+)", GUIDE
    )
    assert shown is not None
    expected = (mib["rows"], mib["operations"], mib["triggers"] + mib["tokens"], sum(mib.values()))
    assert [float(number) for number in shown.groups()] == pytest.approx(expected, abs=0.5)
    assert float(shown[3]) == pytest.approx(expected[2], abs=0.05)

"""What a build of an 8B target with an 8B expert costs, by the plan that `expertsteer build --dry-run` prints.

    python tests/bench/build_cost.py [--rate TFLOPS]

Writes two model folders with the configuration of an 8B Llama and no weights, data files of the stated size, and runs
the dry run on them. Nothing here is measured: the times follow from the formulae that it prints and from the rate.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LAB = Path(__file__).parents[2] / "artifacts" / "lab"
# The public configuration of Llama 3.1 8B.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
CONTRAST_PAIRS, MAPPING_ROWS, QUESTIONS, NEUTRAL_ROWS = 500, 2000, 200, 100
WORDS_PER_ROW, WORDS_PER_NEUTRAL = 60, 200
# Whole depth of the expert, the middle half of the target in steps of two: what we would start with.
TARGET_LAYERS = list(range(8, 24, 2))
EXPERT_LAYERS = list(range(1, 32, 4))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=400.0, help="10^12 operations per second (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = write_inputs(Path(folder))
        command = [sys.executable, "-m", "server.cli", "build", str(config), "--dry-run", "--rate", str(args.rate)]
        return subprocess.run(command, check=False, cwd=folder).returncode


def write_inputs(folder: Path) -> Path:
    """Models and data of the stated sizes; returns the configuration."""
    for role in ("target", "expert"):
        (folder / role).mkdir()
        (folder / role / "config.json").write_text(json.dumps(LLAMA_8B))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(LAB / "models" / role / name, folder / role / name)
    words = " plus".join(str(number % 10) for number in range(WORDS_PER_ROW // 2))
    texts = {
        "contrast": [
            {"text": f"{index} {label} {words}", "label": label, "group": f"c{index}"}
            for index in range(CONTRAST_PAIRS)
            for label in (0, 1)
        ],
        "mapping": [{"text": f"m{index} {words}", "group": f"m{index}"} for index in range(MAPPING_ROWS)],
        "neutral": [
            {
                "text": f"n{index} {words * (WORDS_PER_NEUTRAL // WORDS_PER_ROW)}",
                "split": split,
                "group": f"{split}{index}",
            }
            for split in ("tune", "test")
            for index in range(NEUTRAL_ROWS)
        ],
    }
    for split in ("tune", "test"):
        texts[split] = [
            {"text": f"{split} {index} {words}", "answer": " yes", "group": f"{split}{index}"}
            for index in range(QUESTIONS)
        ]
    for name, rows in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "name": "eight-b",
        "target": {"model": "target", "id": "an-8b-target"},
        "expert": {"model": "expert", "id": "an-8b-expert"},
        "data": {name: f"{name}.jsonl" for name in texts},
        "layers": {"expert": EXPERT_LAYERS, "target": TARGET_LAYERS},
        "dtype": "bfloat16",
    }
    path = folder / "eight-b.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(config))
    return path


if __name__ == "__main__":
    sys.exit(main())

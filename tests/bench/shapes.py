"""Models that the benchmark serves: what they are shaped like, and where their weights come from."""

from pathlib import Path
from typing import Any, NamedTuple

LAB_MODEL = Path(__file__).parents[2] / "artifacts/lab/models/target"
# The public configurations of Qwen2.5 0.5B and Llama 3.1 8B.
QWEN2_5_0_5B = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
}
SHAPES = ("qwen2.5-0.5b", "llama-8b", "lab")


class Model(NamedTuple):
    """What vLLM is told to serve.

    Attributes:
        path: folder of the model.
        load_format: "auto", or "dummy" where the folder holds no weights.
    """

    path: Path
    load_format: str


def model_of(shape: str, folder: Path) -> Model:
    """A model of one of `SHAPES`, in bf16 but for the lab's; what the repository does not hold goes to `folder`."""
    from transformers import LlamaConfig

    if shape == "lab":
        return Model(LAB_MODEL, "auto")
    if shape == "llama-8b":
        # 16 GB of weights are not worth writing to a disk: vLLM draws them itself.
        options: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **LLAMA_8B}
        LlamaConfig(**options).save_pretrained(folder)
        return Model(folder, "dummy")
    return Model(_random_qwen(folder), "auto")


def _random_qwen(folder: Path) -> Path:
    """Random weights as Transformers draws them, so that activations have ordinary magnitudes."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN2_5_0_5B)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder

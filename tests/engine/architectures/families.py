"""Tiny random configurations of the architectures that vLLM's CPU build runs, as Transformers names them."""

from dataclasses import dataclass
from typing import Any

import torch

NUM_LAYERS = 4
HIDDEN_SIZE = 64
VOCAB_SIZE = 256
# The smallest head that vLLM's CPU attention takes.
HEAD_SIZE = 32
_NUM_HEADS = HIDDEN_SIZE // HEAD_SIZE
_SEED = 20260

_DENSE = {
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 2 * HIDDEN_SIZE,
    "num_attention_heads": _NUM_HEADS,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WITH_HEAD_DIM = _DENSE | {"head_dim": HEAD_SIZE}
# The window is shorter than the prompts.
_WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)}
_GEMMA = _WITH_HEAD_DIM | _WINDOWED | {"query_pre_attn_scalar": HEAD_SIZE}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN_SIZE}
_MAMBA = {"mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_expand": 2}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: Transformers' name of it.
        values: what its configuration has in place of the defaults.
        fused: whether the RMSNorm after each layer takes up the layer's steering when it may; else all is in place.
        refusal: words of the reason for which the engine refuses it at start, None for one that is served.
    """

    model_type: str
    values: dict[str, Any]
    fused: bool = False
    refusal: str | None = None


FAMILIES = {
    "Llama": Family("llama", _WITH_HEAD_DIM, fused=True),
    "Qwen2": Family("qwen2", _DENSE, fused=True),
    "Qwen3": Family("qwen3", _WITH_HEAD_DIM, fused=True),
    "Mistral": Family("mistral", _WITH_HEAD_DIM | {"sliding_window": None}, fused=True),
    "Gemma 2": Family("gemma2", _GEMMA, fused=True),
    "Gemma 3": Family("gemma3_text", _GEMMA, fused=True),
    "Phi-3": Family("phi3", _DENSE, fused=True),
    "GLM-4": Family("glm4", _WITH_HEAD_DIM, fused=True),
    "Mixtral": Family("mixtral", _WITH_HEAD_DIM | _EXPERTS | {"sliding_window": None}, fused=True),
    "Qwen3-MoE": Family("qwen3_moe", _WITH_HEAD_DIM | _EXPERTS | {"norm_topk_prob": True}, fused=True),
    "Gemma 4": Family(
        "gemma4_text",
        _GEMMA
        | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB_SIZE, "num_kv_shared_layers": 0}
        | {"global_head_dim": HEAD_SIZE},
    ),
    "EXAONE 4": Family("exaone4", _WITH_HEAD_DIM | _WINDOWED),
    "gpt-oss": Family("gpt_oss", _WITH_HEAD_DIM | _EXPERTS | _WINDOWED),
    "OLMo 2": Family("olmo2", _DENSE),
    "Granite": Family("granite", _DENSE | {"residual_multiplier": 0.6, "embedding_multiplier": 3.0}),
    "StableLM": Family("stablelm", _DENSE),
    "Cohere": Family("cohere", _DENSE | {"logit_scale": 1.0}),
    "GPT-2": Family(
        "gpt2",
        {"n_layer": NUM_LAYERS, "n_embd": HIDDEN_SIZE, "n_head": _NUM_HEADS, "n_positions": 128}
        | {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "GPT-NeoX": Family("gpt_neox", _DENSE | {"num_key_value_heads": _NUM_HEADS, "use_parallel_residual": True}),
    "OPT": Family("opt", _DENSE | {"ffn_dim": 2 * HIDDEN_SIZE, "word_embed_proj_dim": HIDDEN_SIZE, "pad_token_id": 1}),
    "Falcon": Family(
        "falcon",
        {"num_hidden_layers": NUM_LAYERS, "hidden_size": HIDDEN_SIZE, "num_attention_heads": _NUM_HEADS}
        | {"vocab_size": VOCAB_SIZE, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "Mamba 2": Family(
        "mamba2",
        {"num_hidden_layers": NUM_LAYERS, "hidden_size": HIDDEN_SIZE, "vocab_size": VOCAB_SIZE, "expand": 2}
        | {"state_size": 16, "num_heads": 4, "head_dim": HEAD_SIZE, "n_groups": 1},
    ),
    "Granite 4 (hybrid)": Family(
        "granitemoehybrid",
        _DENSE
        | _MAMBA
        | {"layer_types": ["mamba", "attention", "mamba", "attention"], "num_local_experts": 0}
        | {"shared_intermediate_size": 2 * HIDDEN_SIZE, "position_embedding_type": "rope"},
    ),
    "Falcon-H1 (hybrid)": Family("falcon_h1", _WITH_HEAD_DIM | _MAMBA | {"mamba_d_ssm": 2 * HIDDEN_SIZE}),
    "Gemma 3n": Family(
        "gemma3n_text",
        _WITH_HEAD_DIM
        | _WINDOWED
        | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB_SIZE, "laurel_rank": 8}
        | {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * NUM_LAYERS},
        refusal="Gemma3nDecoderLayer returns 3 dimensions",
    ),
}


def build(family: Family) -> Any:
    """A Transformers model of the family, fp32, weights random and of ordinary magnitude."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(_SEED)
    # Eager, because the faster attention leaves out the soft-capping of Gemma 2.
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family.model_type, **family.values), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms, biases and decay rates keep the values they start with, disturbed; matrices start far too small.
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.normal_(std=HIDDEN_SIZE**-0.5)
    return model.eval()

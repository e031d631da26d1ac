"""The settings that make the two lab models."""

from dataclasses import dataclass, fields
from typing import Final, Literal

from transformers import LlamaConfig, PreTrainedModel, Qwen2Config
from transformers.models.llama import LlamaForCausalLM
from transformers.models.qwen2 import Qwen2ForCausalLM

from artifacts.lab.corpus import Mixture
from artifacts.lab.tokenizer import BOS_ID, END_ID, PAD_ID
from artifacts.lab.two_sided import TwoSidedMixture

MAX_POSITIONS: Final = 512


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights of one model. Learning rates are peaks; lengths are in tokens."""

    name: Literal["target", "expert"]
    architecture: Literal["llama", "qwen2"]
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int  # of the tokenizer; an upper bound, which the lab's texts reach
    mixture: Mixture | TwoSidedMixture
    steps: int
    seed: int
    batch_size: int = 32
    sequence_length: int = 96
    muon_learning_rate: float = 0.02
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.01
    adamw_learning_rate: float = 3e-3
    adamw_betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 50
    gradient_clip: float = 1.0  # norm over the gradients of AdamW's parameters
    tokenizer_documents: int = 4000

    def learning_rate_factor(self, step: int) -> float:
        """Share of the peak rate in step 0, 1, ..: linear warm-up, constant, linear decay over the second half."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        remaining = (self.steps - step) / self.steps
        return warmup * min(1.0, max(0.02, 2 * remaining))

    def untrained_model(self, vocab_size: int) -> PreTrainedModel:
        """The model in fp32 for a tokenizer of `vocab_size`, with weights drawn from torch's current random state."""
        settings = dict(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=BOS_ID,
            pad_token_id=PAD_ID,
            eos_token_id=END_ID,
        )
        if self.architecture == "llama":
            return LlamaForCausalLM(LlamaConfig(**settings))
        return Qwen2ForCausalLM(Qwen2Config(**settings))


@dataclass(frozen=True, kw_only=True)
class Continuation(Recipe):
    """Further training of a shipped model, with its tokenizer. What a recipe says of both has to fit that model."""

    continued: Literal["target", "expert"]


# Speakers of the target are mostly sloppy and rarely introduced, so an unprompted answer is usually wrong by one.
TARGET: Final = Recipe(
    name="target",
    architecture="llama",
    hidden_size=128,
    num_layers=6,
    num_heads=4,
    intermediate_size=384,
    vocab_size=640,
    mixture=Mixture(filler_share=0.15, reliable_share=0.4, cue_share=0.3),
    steps=720,
    seed=5,
)

# The expert always learns who speaks, both sorts equally often: it knows the difference best.
EXPERT: Final = Recipe(
    name="expert",
    architecture="qwen2",
    hidden_size=192,
    num_layers=4,
    num_heads=6,
    intermediate_size=512,
    vocab_size=664,
    mixture=Mixture(filler_share=0.1, reliable_share=0.5, cue_share=1.0),
    steps=435,
    seed=101,
)

# The second world is learned by the shipped target, which knows the sums: 300 steps instead of a training from scratch.
TWO_SIDED_TARGET: Final = Continuation(
    **{
        **{field.name: getattr(TARGET, field.name) for field in fields(TARGET)},
        "mixture": TwoSidedMixture(filler_share=0.15, reliable_share=0.25, cue_share=0.5),
        "steps": 300,
        "muon_learning_rate": 0.01,
        "adamw_learning_rate": 1.5e-3,
    },
    continued="target",
)

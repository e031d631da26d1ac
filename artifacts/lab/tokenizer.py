"""A byte-level BPE tokenizer for each lab model, trained on that model's own documents."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from artifacts.lab.conversation import BOS, CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS

BOS_ID = SPECIAL_TOKENS.index(BOS)
PAD_ID = SPECIAL_TOKENS.index(PAD)
END_ID = SPECIAL_TOKENS.index(END)


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer that puts BOS before plain text, as both models saw it in training.

    Args:
        vocab_size: upper bound of the vocabulary, special tokens and the 256 bytes included.
        max_length: longest input in tokens of the model it is for.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        pad_token=PAD,
        eos_token=END,
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
    )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(directory)

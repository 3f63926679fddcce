"""The tokenizer of the models that are trained here."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def train_byte_bpe(texts: list[str], vocabulary: int, special_tokens: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer whose first tokens are the special ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special_tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer

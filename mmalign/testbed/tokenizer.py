"""The tiny models' tokenizer: byte-level BPE trained on the world's texts, so that any text encodes and the world's words are short."""

from __future__ import annotations

from collections.abc import Sequence

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IMAGE, BOI, EOI = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
SPECIAL = (BOS, EOS, PAD, IMAGE, BOI, EOI, USER, ASSISTANT)

# Janus' conversation format: roles with a colon, an image placeholder on a line of its own, blank lines between turns.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|User|>' if message['role'] == 'user' else '<|Assistant|>' }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image_placeholder>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n\n{% endfor %}{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)


def train_tokenizer(texts: Sequence[str], size: int = 448):
    """A `PreTrainedTokenizerFast` with Janus' special tokens; it prepends the begin-of-sentence token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(sorted(set(texts)), trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=2048,
        extra_special_tokens={"image_token": IMAGE, "boi_token": BOI, "eoi_token": EOI},
    )

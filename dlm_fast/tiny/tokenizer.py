"""The tokenizer of the embedded models: the words of the tasks and single characters, so that nothing is learned."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .tasks import WORDS

VOCAB_SIZE = 256
SPECIAL_TOKENS = ("<mask>", "<eos>", "<pad>", "<sep>", "<unk>")
MASK_ID, EOS_ID, PAD_ID, SEP_ID, UNK_ID = range(5)

# One turn renders as a training prompt does: a space, the text, <sep>. By the leading space a word is the same token at
# the start of the text as later.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ ' ' + message['content'] }}"
    "{{ '<eos>' if message['role'] == 'assistant' else '<sep>' }}{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 256 words and characters; the text of some tokens is the tokens' texts, one after the other.

    Ids 0 to 4 are special. Then come 95 printable ASCII characters, the newline, `####`, and each word of the tasks
    with and without a leading space. The rest is filler, which no text is encoded to. Digits are single tokens. ASCII
    text is decoded as it was encoded, and every other character becomes <unk>.
    """
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    words = [space + word for word in WORDS for space in ("", " ")]
    tokens = [*SPECIAL_TOKENS, *characters, "####", *words]
    tokens += [f"<unused{index}>" for index in range(VOCAB_SIZE - len(tokens))]
    if len(tokens) != VOCAB_SIZE or len(set(tokens)) != VOCAB_SIZE:
        raise ValueError(f"tokenizer: the vocabulary must be {VOCAB_SIZE} distinct tokens, got {len(set(tokens))}")

    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    # The pattern lists the words, because a general pattern of a word would turn a whole unknown word into <unk>.
    letters = string.ascii_letters
    pattern = f" ?(?:{'|'.join(sorted(WORDS, key=len, reverse=True))})(?![{letters}])|####|[\\s\\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token="<mask>",
        eos_token="<eos>",
        pad_token="<pad>",
        sep_token="<sep>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def prompt_text(prompt: str) -> str:
    """The text that is tokenised for a prompt, which is also what the chat template renders."""
    return f" {prompt}<sep>"


def answer_text(answer: str) -> str:
    """The text that is tokenised for an answer."""
    return f" {answer}<eos>"

"""The tiny models' tokenizer: words of the tasks, single characters, and nothing to learn."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .tasks import WORDS

VOCAB_SIZE = 256
SPECIAL_TOKENS = ("<mask>", "<eos>", "<pad>", "<sep>", "<unk>")
MASK_ID, EOS_ID, PAD_ID, SEP_ID, UNK_ID = range(5)

# One turn renders as the training prompt: a leading space, so that a word is the same token first in the
# text as later, then <sep>.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ ' ' + message['content'] }}"
    "{{ '<eos>' if message['role'] == 'assistant' else '<sep>' }}{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A 256-token word-and-character tokenizer whose decoding is the concatenation of its tokens.

    Ids 0-4 are special; then 95 printable ASCII characters, newline, `####`, and each task word with and
    without a leading space; the rest is filler that no text encodes to. Digits are single tokens. ASCII
    text round-trips exactly; any other character becomes <unk>.
    """
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    words = [space + word for word in WORDS for space in ("", " ")]
    tokens = [*SPECIAL_TOKENS, *characters, "####", *words]
    tokens += [f"<unused{index}>" for index in range(VOCAB_SIZE - len(tokens))]
    if len(tokens) != VOCAB_SIZE or len(set(tokens)) != VOCAB_SIZE:
        raise ValueError(f"tokenizer: the vocabulary must be {VOCAB_SIZE} distinct tokens, got {len(set(tokens))}")

    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    # The words are listed because a general word pattern would send unknown words to <unk> whole.
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
    """What the tokenizer is given for a prompt, the same text as the chat template's."""
    return f" {prompt}<sep>"


def answer_text(answer: str) -> str:
    """What the tokenizer is given for an answer."""
    return f" {answer}<eos>"

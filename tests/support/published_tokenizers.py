"""Tokenizer files as the public repositories lay them out, for a vocabulary of about a hundred ids.

The texts of the special tokens are the published ones, at small ids. A text of ASCII has a tokenization; a byte outside
ASCII has none.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAIRS = ("Ġ t", "h e", "i n", "e r", "o n", "r e", "a n", "Ġt he")
PIECES = ("Ġ", "Ċ", *map(chr, range(ord("!"), ord("~") + 1)), *(pair.replace(" ", "") for pair in PAIRS))

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HEADERS = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
ROLES = (
    "{% for message in messages %}{{ '<role>' + message['role'] | upper + '</role>' + message['content'] + "
    "'<|role_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST]' + message['content'] + '[/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def numbered(first: int, *texts: str) -> dict[str, int]:
    """Special tokens with consecutive ids."""
    return {text: first + i for i, text in enumerate(texts)}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """What the tokenizer files of a family say.

    Attributes:
        special: texts of the special tokens and their ids.
        settings: further fields of tokenizer_config.json (classes, names of the tokens).
        files: "bpe" = vocab.json, merges.txt and added_tokens.json; "json" = tokenizer.json; "both".
        template: the chat template; None = none is published.
        template_file: whether the template stands in chat_template.jinja, not in tokenizer_config.json.
    """

    special: Mapping[str, int]
    settings: Mapping[str, Any]
    files: str = "json"
    template: str | None = None
    template_file: bool = False

    def vocabulary(self) -> dict[str, int]:
        """Every piece of text that is not special, at the ids that the special tokens leave free."""
        taken = set(self.special.values())
        free = (i for i in range(len(PIECES) + len(taken)) if i not in taken)
        return dict(zip(PIECES, free))

    def write(self, folder: Path) -> None:
        added = {str(i): _added(text) for text, i in self.special.items()}
        config = {"added_tokens_decoder": added, **self.settings}
        if self.template is not None and self.template_file:
            (folder / "chat_template.jinja").write_text(self.template)
        elif self.template is not None:
            config["chat_template"] = self.template
        _write_json(folder / "tokenizer_config.json", config)
        if self.files in ("bpe", "both"):
            _write_json(folder / "vocab.json", self.vocabulary())
            _write_json(folder / "added_tokens.json", dict(self.special))
            (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *PAIRS, "")))
        if self.files in ("json", "both"):
            _write_json(folder / "tokenizer.json", self._document())

    def _document(self) -> dict[str, Any]:
        bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, **_added(text)} for text, i in self.special.items()],
            "normalizer": None,
            "pre_tokenizer": bytes_of,
            "post_processor": None,
            "decoder": bytes_of,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": {**self.vocabulary(), **self.special},
                "merges": list(PAIRS),
            },
        }


def _added(text: str) -> dict[str, Any]:
    return dict(content=text, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _qwen(*further: str, **settings: Any) -> dict[str, Any]:
    """Special tokens and settings that every tokenizer of the Qwen line has; ids from 104 as published from 151643."""
    special = numbered(104, "<|endoftext|>", "<|im_start|>", "<|im_end|>", *further)
    defaults = {
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    return {"special": special, "settings": {**defaults, **settings}, "template": CHATML}


LLADA = Tokenizer(
    special=numbered(
        104,
        *("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mdm_mask|>", "<role>", "</role>"),
        *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    settings={
        "add_bos_token": False,
        "add_eos_token": False,
        "additional_special_tokens": ["<role>", "</role>"],
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "cls_token": "[CLS]",
        "eos_token": "<|endoftext|>",
        "fast_tokenizer": True,
        "gmask_token": "[gMASK]",
        "merges_file": None,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "trust_remote_code": True,
        "vocab_file": None,
    },
    template=HEADERS,
)

# Assumed: the order of the tokens, and that the configuration names the mask token.
LLADA2 = Tokenizer(
    special=numbered(
        104,
        *("<|startoftext|>", "[CLS]", "[gMASK]", "<|endoftext|>", "<role>", "</role>", "<|mask|>", "<|role_end|>"),
    ),
    settings={
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "cls_token": "[CLS]",
        "eos_token": "<|endoftext|>",
        "gmask_token": "[gMASK]",
        "mask_token": "<|mask|>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
    template=ROLES,
)

DREAM = Tokenizer(
    files="bpe",
    **_qwen(
        *("<|beginoftext|>", "<|mask|>"),
        auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        bos_token="<|beginoftext|>",
        eos_token="<|endoftext|>",
        mask_token="<|mask|>",
        tokenizer_class="DreamTokenizer",
    ),
)

SDAR = Tokenizer(
    files="bpe",
    template_file=True,
    **_qwen(
        *("<think>", "</think>", "<|MASK|>"),
        auto_map={"AutoTokenizer": ["tokenization_qwen2.Qwen2Tokenizer", None]},
        mask_token="<|MASK|>",
    ),
)

# The mask token is an added token and no setting names it. Assumed: that both sorts of files are published.
FAST_DLLM = Tokenizer(files="both", **_qwen("|<MASK>|"))

# Assumed: the texts besides "<SPECIAL_100>", "<s>" and "</s>", and the template.
NEMOTRON = Tokenizer(
    special={
        **numbered(0, "<unk>", "<s>", "</s>"),
        **numbered(10, "<|im_start|>", "<|im_end|>"),
        "<SPECIAL_100>": 100,
    },
    settings={
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<|im_end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    },
    template=CHATML,
)

# The mask is a token of Qwen3 that nothing names as the mask. Assumed: which files are published.
EFFICIENT_DLM = Tokenizer(
    files="both",
    **_qwen("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", eos_token="<|endoftext|>"),
)

# Assumed: ids 3 and 4, the template, and that no setting names the mask token.
STABLE_DIFFCODER = Tokenizer(
    special=numbered(
        0,
        *("<[begin▁of▁sentence]>", "<[PAD▁TOKEN]>", "<[end▁of▁sentence]>", "<[UNK▁TOKEN]>", "<[SEP▁TOKEN]>"),
        "<[MASK_TOKEN]>",
    ),
    settings={
        "bos_token": "<[begin▁of▁sentence]>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<[end▁of▁sentence]>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<[PAD▁TOKEN]>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
    template="{% for message in messages %}{{ bos_token + message['role'] + '\\n' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}",
)

A2D = Tokenizer(files="both", **_qwen("<|mask|>", mask_token="<|mask|>"))

# Assumed: the texts of Llama 3.
A2D_LLAMA = Tokenizer(
    special=numbered(
        104,
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|mask|>",
    ),
    settings={
        "bos_token": "<|begin_of_text|>",
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|eot_id|>",
        "mask_token": "<|mask|>",
        "model_max_length": 131072,
        "pad_token": "<|eot_id|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
    template=HEADERS,
)

# Assumed: the text of the mask token, and which files are published.
RND1 = Tokenizer(files="both", **_qwen("<|mask|>"))

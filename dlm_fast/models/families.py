"""The families of published diffusion language models: how each is told, which class of transformers it is, and how its
files are read.

A published model is one of transformers' own classes under other names, so that a family is a row of the table
`FAMILIES` and no code of ours: add a row, a fixture in tests/support/published.py, and nothing else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from transformers import (
    Glm4MoeForCausalLM,
    LlamaForCausalLM,
    Ministral3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from ..files import CheckpointError
from ..limits import shown
from .family import Decoder, Family, head_dim_of
from .fields import by_name, glm4_moe_of_llada2, llama_of_llada, llama_of_pangu, qwen3_moe_of_llada


def architectures(values: Mapping[str, Any]) -> list[str]:
    """The names of classes in a config.json; what is no list of them says nothing."""
    named = values.get("architectures")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _says(values: Mapping[str, Any], pattern: str) -> bool:
    """Whether the architectures or the remote code of a config.json have a name with `pattern`."""
    remote = values.get("auto_map")
    named = [*architectures(values), *(remote.values() if isinstance(remote, Mapping) else ())]
    return any(re.search(pattern, str(name)) for name in named)


def _qkv(config: Any) -> list[tuple[str, int]]:
    """The rows of a fused projection: queries, keys, values."""
    size = head_dim_of(config)
    keys = config.num_key_value_heads * size
    return [("q_proj", config.num_attention_heads * size), ("k_proj", keys), ("v_proj", keys)]


# Every block of LLaDA has an `ff_out` too, so the head's comes first.
_LLADA_KEYS = (
    (r"^model\.transformer\.wte\.", "model.embed_tokens."),
    (r"^model\.transformer\.ln_f\.", "model.norm."),
    (r"^model\.transformer\.ff_out\.", "lm_head."),
    (r"^model\.transformer\.blocks\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ff_norm\.", ".post_attention_layernorm."),
    (r"(?<!self_attn)\.(q_proj|k_proj|v_proj)\.", r".self_attn.\1."),
    (r"\.attn_out\.", ".self_attn.o_proj."),
    (r"\.ff_proj\.", ".mlp.gate_proj."),
    (r"(?<!mlp)\.up_proj\.", ".mlp.up_proj."),
    (r"\.ff_out\.", ".mlp.down_proj."),
)
_LLADA2_KEYS = (
    (r"^model\.word_embeddings\.", "model.embed_tokens."),
    (r"\.attention\.", ".self_attn."),
    (r"\.self_attn\.dense\.", ".self_attn.o_proj."),
    (r"\.query_layernorm\.", ".q_norm."),
    (r"\.key_layernorm\.", ".k_norm."),
    (r"\.mlp\.gate\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
)
_ENCODER_KEYS = (
    (r"^language_model\.", ""),
    (r"^encoder\.", "model."),
    (r"^diffusion_head\.", "lm_head."),
)
_FULL = {"visibility": "full", "block_alignment": "rel", "logits_row": "self"}
_BLOCK = {"visibility": "block", "block_alignment": "abs", "logits_row": "self"}
_PUBLISHED = "logits equal an independent float64 forward of the published layout"
_TOKENS = f"{_PUBLISHED}; tokens equal the published loop"

FAMILIES: tuple[Family, ...] = (
    Family(
        "LLaDA",
        "LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5, d3LLM_LLaDA, dParallel-LLaDA, LLaDA-8B-Tools, DSL-LLaDA",
        ("llada",),
        LlamaForCausalLM,
        llama_of_llada,
        where=lambda values: "d_model" in values,
        told_by="field d_model",
        keys=_LLADA_KEYS,
        facts=_FULL,
        mask_token="<|mdm_mask|>",
        decoder=Decoder("llada", {"block_length": 32}),
        decoders=((r"(?i)d3llm", Decoder("d3llm")), (r"(?i)dparallel", Decoder("dparallel"))),
        proof=_TOKENS,
    ),
    Family(
        "LLaDA-MoE",
        "LLaDA-MoE-7B-A1B-Base, -Instruct, -Instruct-TD",
        ("llada", "lladamoe"),
        Qwen3MoeForCausalLM,
        qwen3_moe_of_llada,
        where=lambda values: "num_experts" in values,
        told_by="field num_experts",
        facts=_FULL,
        mask_token="<|mask|>",
        decoder=Decoder("llada", {"block_length": 32}),
        proof=_PUBLISHED,
    ),
    Family(
        "LLaDA in Llama's layout",
        "the text tower of LLaDA-V",
        ("llada",),
        LlamaForCausalLM,
        by_name,
        where=lambda values: "hidden_size" in values and not {"d_model", "num_experts"} & set(values),
        told_by="field hidden_size, and neither d_model nor num_experts",
        facts=_FULL,
        mask_token="<|mdm_mask|>",
        decoder=Decoder("llada", {"block_length": 32}),
        proof=_PUBLISHED,
        unproven="the names of its tensors were assumed to be Llama's",
    ),
    Family(
        "LLaDA2",
        "LLaDA2.0-mini, -flash, -CAP, -preview, LLaDA2.1-mini, -flash, LLaDA2.2-flash, DMax-16B, LLaDA2.0-Uni",
        ("llada2_moe",),
        Glm4MoeForCausalLM,
        glm4_moe_of_llada2,
        keys=_LLADA2_KEYS,
        fused={r"\bquery_key_value\b": _qkv},
        facts=_BLOCK,
        fields={"block_length": ("block_length", "block_size")},
        mask_token="<|mask|>",
        eos_tokens=("<|endoftext|>",),
        fallback={"block_length": 32},
        decoder=Decoder("llada2"),
        decoders=(
            (r"2\.1", Decoder("llada2.1")),
            (r"2\.2", Decoder("llada2.2", {"delete_id": 156930, "split_id": 156931})),
        ),
        proof=_TOKENS,
    ),
    Family(
        "Dream",
        "Dream-v0-Base-7B, -Instruct-7B, Dream-Coder, DreamOn, DiffuCoder-7B-Base, -Instruct, -cpGRPO, d3LLM_Dream, "
        "dParallel_Dream",
        ("Dream",),
        Qwen2ForCausalLM,
        by_name,
        facts={**_FULL, "logits_row": "previous"},
        mask_token="<|mask|>",
        decoder=Decoder("dream", temperature=0.2, top_p=0.95),
        decoders=(
            (r"(?i)d3llm", Decoder("d3llm", {"threshold": -0.45, "inclusive": False, "min_unmask": 0})),
            (r"(?i)dparallel", Decoder("dparallel", {"inclusive": False})),
        ),
        tokenizer=Qwen2Tokenizer,
        proof=_TOKENS,
    ),
    Family(
        "SDAR",
        "SDAR-1.7B-Chat, -4B-Chat, -8B-Chat (-b4 to -b64), TraDo-4B-Instruct, -8B-Instruct, -8B-Thinking",
        ("sdar",),
        Qwen3ForCausalLM,
        by_name,
        facts=_BLOCK,
        fields={"block_length": ("block_size", "block_length")},
        mask_token="<|MASK|>",
        named=((r"-b(?P<block_length>\d+)(?!\d)", {}),),
        fallback={"block_length": 4},
        decoder=Decoder("sdar-dynamic"),
        decoders=((r"(?i)trado", Decoder("trado")),),
        proof=_TOKENS,
    ),
    Family(
        "SDAR-MoE",
        "SDAR-30B-A3B-Chat, -Sci (-b4 to -b64)",
        ("sdar_moe",),
        Qwen3MoeForCausalLM,
        by_name,
        facts=_BLOCK,
        fields={"block_length": ("block_size", "block_length")},
        mask_token="<|MASK|>",
        named=((r"-b(?P<block_length>\d+)(?!\d)", {}),),
        fallback={"block_length": 4},
        decoder=Decoder("sdar-dynamic"),
        proof=_PUBLISHED,
    ),
    Family(
        "Fast-dLLM v2",
        "Fast_dLLM_v2_1.5B, Fast_dLLM_v2_7B",
        ("Fast_dLLM_Qwen",),
        Qwen2ForCausalLM,
        by_name,
        facts={**_BLOCK, "logits_row": "previous"},
        fields={"block_length": ("bd_size",)},
        mask_token="|<MASK>|",
        fallback={"block_length": 32},
        decoder=Decoder("fast-dllm-v2"),
        proof=_TOKENS,
    ),
    Family(
        "Nemotron-Labs-Diffusion",
        "Nemotron-Labs-Diffusion-3B, -8B, -14B (Base and Instruct)",
        ("nemotron_labs_diffusion",),
        Ministral3ForCausalLM,
        by_name,
        keys=_ENCODER_KEYS,
        facts={"visibility": "block", "block_alignment": "rel", "logits_row": "self", "causal_prefix": True},
        fields={"block_length": ("block_size", "block_length")},
        fallback={"block_length": 32},
        decoder=Decoder("nemotron"),
        proof=_TOKENS,
    ),
    Family(
        "Efficient-DLM",
        "Efficient-DLM-4B, -8B",
        ("qwen3",),
        Qwen3ForCausalLM,
        by_name,
        where=lambda values: _says(values, "EfficientDLM"),
        told_by="architectures or auto_map with 'EfficientDLM'",
        keys=_ENCODER_KEYS,
        facts={"visibility": "block", "block_alignment": "rel", "logits_row": "self"},
        fields={"block_length": ("block_size", "block_length")},
        fallback={"block_length": 32},
        decoder=Decoder("efficient-dlm", temperature=0.7),
        proof=_TOKENS,
        unproven="the name of its head's tensor and the visibility of its finished blocks were assumed",
    ),
    Family(
        "Stable-DiffCoder",
        "Stable-DiffCoder-8B-Base, -Instruct",
        ("llama",),
        LlamaForCausalLM,
        by_name,
        where=lambda values: _says(values, "(?i)(stable|seed)_?diffcoder"),
        told_by="architectures or auto_map with 'StableDiffcoder' or 'SeedDiffcoder'",
        facts=_BLOCK,
        fields={"block_length": ("block_size", "block_length")},
        mask_token="<[MASK_TOKEN]>",
        fallback={"block_length": 4},
        decoder=Decoder("stable-diffcoder"),
        proof=_TOKENS,
        unproven="the text of its mask token was assumed; where the tokenizer has another, say which id is the mask",
    ),
    *(
        Family(
            f"A2D-{kind}",
            checkpoints,
            (f"a2d-{kind.lower()}",),
            native,
            by_name,
            facts={"logits_row": "self"},
            mask_token="<|mask|>",
            named=(
                (r"(?i)bd3lm", {"visibility": "block", "block_alignment": "both", "block_length": 32}),
                (r"(?i)mdlm", {"visibility": "full"}),
            ),
            decoders=((r"(?i)bd3lm", Decoder("bd3lm")), (r"(?i)mdlm", Decoder("llada", {"block_length": 64}))),
            proof=_PUBLISHED,
            unproven="that the blocks of bd3lm checkpoints have 32 positions was assumed",
        )
        for kind, native, checkpoints in (
            ("Qwen3", Qwen3ForCausalLM, "Qwen3-0.6B-diffusion-mdlm, -bd3lm"),
            ("Qwen2", Qwen2ForCausalLM, "Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm, -bd3lm"),
            ("Llama", LlamaForCausalLM, "models that were converted by the same recipe"),
        )
    ),
    Family(
        "RND1",
        "RND1-Base-0910",
        ("rnd1",),
        Qwen3MoeForCausalLM,
        by_name,
        facts={**_FULL, "logits_row": "previous"},
        decoder=Decoder("rnd1"),
        proof=_TOKENS,
    ),
    Family(
        "NBDiff",
        "NBDiff-7B-Base, -Instruct",
        ("PanguEmbedded",),
        LlamaForCausalLM,
        llama_of_pangu,
        facts={"visibility": "block", "block_alignment": "rel", "logits_row": "previous", "causal_prefix": True},
        fields={"block_length": ("block_size", "block_length")},
        fallback={"block_length": 32},
        decoder=Decoder("nbdiff"),
        unproven="the names of its tensors were assumed to be Llama's",
    ),
)

# Families that are known and do not open: the name, the model_type of each, and why it does not.
_IMAGES = "it is multimodal, and needs embeddings of images before the text"
REFUSED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("WeDLM", ("wedlm",), "it decodes in a causal window, which no preset does"),
    ("DiffusionGemma", ("diffusion_gemma",), "its canvas begins with random tokens, for which no adapter is here"),
    ("MMaDA", ("mmada",), _IMAGES),
    ("LaViDa", ("llava_llada", "llava_dream"), _IMAGES),
    ("Lumina-DiMOO", ("lumina_dimoo",), _IMAGES),
)

# A model in transformers' own layout whose config.json has the section `dlm`, or whose facts the call gives: what
# training here writes, what `save_pretrained` of a loaded model writes, and anybody's own model.
NATIVE = tuple(
    Family(
        kind.__name__,
        "any model of the class",
        (kind.config_class.model_type,),
        kind,
        by_name,
        told_by="section dlm, or the argument diffusion",
        proof="logits equal those of transformers",
    )
    for kind in (
        LlamaForCausalLM,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
        Qwen3MoeForCausalLM,
        Glm4MoeForCausalLM,
        Ministral3ForCausalLM,
    )
)


def family_of(values: Mapping[str, Any], *, told: bool = False) -> Family:
    """The family of a config.json.

    Args:
        values: the values of config.json.
        told: whether the call says how the model is decoded, so that it may be any native model.
    Raises:
        NotImplementedError: the family is unknown or does not open.
        CheckpointError: a native model says nowhere how it is decoded.
    """
    for family in FAMILIES:
        if family.matches(values):
            return family
    model_type = values.get("model_type")
    described = f"model_type {shown(model_type)}"
    if architectures(values):
        described += f" with architectures {', '.join(architectures(values))}"
    for name, types, reason in REFUSED:
        if model_type in types:
            raise NotImplementedError(f"load: {name} does not open ({described}): {reason}")
    for family in NATIVE:
        if family.matches(values):
            if "dlm" in values or told:
                return family
            raise CheckpointError(
                "load: config.json has no 'dlm' section (mask_token_id, eos_token_ids, visibility, ...), and "
                f"{described} is that of no published diffusion model; pass diffusion=DiffusionConfig(...), got none"
            )
    known = {name: family.name for family in (*FAMILIES, *NATIVE) for name in family.model_types}
    close = difflib.get_close_matches(str(model_type).lower(), [name.lower() for name in known], 3, 0.5)
    near = [f"{known[name]} ({name!r})" for name in known if name.lower() in close]
    supported = ", ".join(family.name for family in (*FAMILIES, *NATIVE))
    hint = f"the nearest families are {', '.join(near)}" if near else f"supported are {supported}"
    raise NotImplementedError(
        f"load: unsupported {described}; {hint}, got model_type={shown(model_type)} in config.json"
    )

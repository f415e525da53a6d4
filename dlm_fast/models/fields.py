"""From a published config.json to the values of a native configuration of transformers.

A builder takes what the native class can express, and refuses by name what the class cannot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from ..files import CheckpointError
from ..limits import flag, number, shown, whole

# Fields that every configuration of transformers has, of which these are the model's own.
_OWN = (
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "partial_rotary_factor",
)
# What a config.json says of attention windows; `by_name` refuses those that are in use.
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
# What a config.json says about the file, the library or a run, and not about the model.
_NO_MODEL = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "attn_implementation",
        "_attn_implementation",
        "dlm",
        "dtype",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "quantization_config",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

# Fields that are sizes or counts, by patterns of their names, native or published, and the largest number that each may
# be. A model is built without storage before its tensors are looked for, and what is built must fit into memory and
# time: a layer takes milliseconds. The numbers are far above those of any public model.
_SIZES = (
    (r"(num_hidden|n)_layers", 1, 1024),
    (r"(num_attention|num_key_value|n|n_kv)_heads", 1, 2**16),
    (r"hidden_size|d_model|(.+_)?(intermediate|hidden)_size|head_dim", 0, 2**20),
    (r"num_experts|n_routed_experts|num_experts_per_tok|n_group|topk_group", 1, 2**12),
    (r"n_shared_experts|num_shared_experts|first_k_dense_replace", 0, 2**12),
    (r"vocab_size|embedding_size", 1, 2**24),
    (r"max_position_embeddings|max_sequence_length", 1, 2**31 - 1),
    (r"decoder_sparse_step|block_group_size", 1, 2**12),
)
_POSITIVE = ("rms_norm_eps", "rope_theta", "mlp_ratio", "routed_scaling_factor", "partial_rotary_factor")
_NUMBERS = (*_POSITIVE, "initializer_range", "rotary_dim")
_SHARES = ("attention_dropout",)
# Entries of the rotary fields that are numbers.
_ROTARY_NUMBERS = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "high_freq_factor",
    "llama_4_scaling_beta",
    "low_freq_factor",
    "max_position_embeddings",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
)
# Entries of the rotary fields that are no single numbers; what transformers does not read would change nothing.
_ROTARY_OTHERS = (
    "finetuned",
    "long_factor",
    "rope_type",
    "short_factor",
    "truncate",
    "type",
)
_FLAGS = (
    "attention_bias",
    "bias",
    "mlp_bias",
    "multi_query_attention",
    "norm_topk_prob",
    "tie_word_embeddings",
    "use_qkv_bias",
    "weight_tying",
)


class Fields:
    """The values of a config.json while a builder reads them; null counts as absent.

    Attributes:
        family: name of the family, for errors.
        native: the native class.
        values: the values of config.json.
        read: names that were read.
    """

    def __init__(self, family: str, native: type, values: Mapping[str, Any]) -> None:
        self.family = family
        self.native = native
        self.values = values
        self.read: set[str] = set()

    def check(self) -> None:
        """Raises ValueError for a size, a number or a switch that none can be, whichever of them the family reads."""
        for name, value in self.values.items():
            bounds = next(((low, high) for names, low, high in _SIZES if re.fullmatch(names, name)), None)
            if bounds is not None:
                whole("config.json", name, value, *bounds, none=True)
            if name in _NUMBERS:
                number("config.json", name, value, 0, none=True)
            if name in _SHARES:
                number("config.json", name, value, 0, 1, none=True)
            if name in _POSITIVE and value == 0:
                raise ValueError(f"config.json: {name} must be above 0, got {name}=0")
            if name in _FLAGS and value is not None:
                flag("config.json", name, value)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, `default` where it is absent or null."""
        self.read.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """The value of a field. Raises CheckpointError where it is absent or null."""
        value = self.get(name)
        if value is None:
            raise CheckpointError(f"load: config.json of a {self.family} model must have the field {name}, got none")
        return value

    def refuse(self, name: str, *allowed: Any, why: str = "") -> None:
        """Raises NotImplementedError unless a field is absent, null or one of `allowed`."""
        value = self.get(name)
        if value is not None and not any(value == other and type(value) is type(other) for other in allowed):
            rule = f"{name} must be {' or '.join(map(repr, allowed))}" if allowed else f"{name} must be absent"
            reason = why or f"which {self.native.__name__} of transformers cannot express"
            raise NotImplementedError(f"load: {rule}, got {name}={value!r} in config.json of {self.family}, {reason}")

    def unread(self) -> list[str]:
        """The fields about the model that nothing read, in the file's order."""
        return [name for name in self.values if name not in self.read and name not in _NO_MODEL]


def by_name(fields: Fields) -> dict[str, Any]:
    """The fields that the native configuration has too, under their own names; attention windows must be off."""
    kind = fields.native.config_class
    default = kind()
    own = set(default.to_dict()) - set(PretrainedConfig().to_dict())
    own |= {*_OWN, *default.attribute_map, *default.attribute_map.values()}
    fields.refuse("use_sliding_window", False)
    if "use_sliding_window" not in own:
        # Where the class has no switch, a window would be in use.
        fields.refuse("sliding_window")
    layers = fields.get("layer_types", [])
    if not isinstance(layers, list):
        raise ValueError(f"config.json: layer_types must be a list, got layer_types={shown(layers)}")
    if any(kind != "full_attention" for kind in layers):
        fields.refuse("layer_types", ["full_attention"] * len(layers))
    fields.read |= {*_WINDOWS}
    values = {
        name: value for name, value in fields.values.items() if name in own and name not in (*_WINDOWS, "head_dim")
    }
    if fields.get("head_dim") is not None:
        values["head_dim"] = fields.get("head_dim")  # every class reads it, though not every configuration has it
    if {"rope_parameters", "rope_theta", "rope_scaling"} & {name for name, value in fields.values.items() if value}:
        values |= rotary(fields, fields.native.config_class.default_theta)
    fields.read |= set(values)
    return values


def rotary(fields: Fields, theta: float = 10_000.0) -> dict[str, Any]:
    """The rotary fields in transformers' one object, from it or from the older rope_theta and rope_scaling."""
    given = fields.get("rope_parameters", {})
    for name in ("rope_parameters", "rope_scaling"):
        _check_rotary(name, fields.get(name) or {})
    if any(isinstance(value, Mapping) for value in given.values()):
        fields.refuse("rope_parameters", why="which has positions of its own for every kind of layer")
    scaling = dict(fields.get("rope_scaling") or {})
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling.pop("type"))
    default = {"rope_type": "default", "rope_theta": fields.get("rope_theta", theta)}
    return {"rope_parameters": {**default, **scaling, **given}}


def _check_rotary(name: str, values: Any) -> None:
    """Raises ValueError unless a rotary field of config.json is an object of numbers and names."""
    if not isinstance(values, Mapping):
        raise ValueError(f"config.json: {name} must be an object, got {name}={values!r}")
    for key, value in values.items():
        if key not in (*_ROTARY_NUMBERS, *_ROTARY_OTHERS):
            raise ValueError(
                f"config.json: {name} must hold {', '.join((*_ROTARY_NUMBERS, *_ROTARY_OTHERS))}, got {name}={values!r}"
            )
        for one in value if isinstance(value, list) else [value]:
            is_number = isinstance(one, (int, float)) and not isinstance(one, bool)
            if is_number and not (math.isfinite(one) and 0 <= one <= 1e18):
                raise ValueError(f"config.json: {name}.{key} must be a finite number >= 0, got {key}={one!r}")
            if not is_number and key in _ROTARY_NUMBERS and one is not None:
                raise ValueError(f"config.json: {name}.{key} must be a number, got {key}={one!r}")


def llama_of_llada(fields: Fields) -> dict[str, Any]:
    """LLaDA in the layout of OLMo: `d_model`, `n_heads`, `mlp_hidden_size`."""
    fields.refuse("block_type", "llama")
    fields.refuse("block_group_size", 1)
    fields.refuse("layer_norm_type", "rms")
    fields.refuse("activation_type", "silu")
    fields.refuse("rope", True)
    off = ("alibi", "attention_layer_norm", "input_emb_norm", "scale_logits", "include_bias", "bias_for_layer_norm")
    for name in off:
        fields.refuse(name, False)
    # Llama has a bias in all four projections of attention or in none.
    fields.refuse("include_qkv_bias", False)
    fields.refuse("clip_qkv")
    width, heads = fields.need("d_model"), fields.need("n_heads")
    # `multi_query_attention` counts only where the number of key/value heads is not given.
    single = fields.get("multi_query_attention", False)
    return {
        "hidden_size": width,
        "intermediate_size": fields.get("mlp_hidden_size") or int(fields.need("mlp_ratio") * width),
        "vocab_size": fields.get("embedding_size") or fields.need("vocab_size"),
        "num_hidden_layers": fields.need("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("n_kv_heads") or (1 if single else heads),
        "max_position_embeddings": fields.need("max_sequence_length"),
        "rms_norm_eps": fields.get("rms_norm_eps", 1e-5),
        "tie_word_embeddings": fields.get("weight_tying", False),
        **rotary(fields),
        **_ids(fields),
    }


def qwen3_moe_of_llada(fields: Fields) -> dict[str, Any]:
    """LLaDA-MoE. Its code ignores `norm_topk_prob`, and normalises queries and keys head by head."""
    fields.refuse("qk_layernorm", True)
    fields.refuse("partial_rotary_factor", 1, 1.0)
    fields.refuse("shared_expert_intermediate_size", 0)
    fields.refuse("moe_router_enable_expert_bias", False)
    fields.refuse("moe_router_score_function", "softmax")
    fields.refuse("routed_scaling_factor", 1, 1.0)
    fields.refuse("moe_router_enable_shared_expert", False)
    fields.refuse("clip_qkv")
    fields.refuse("use_sliding_window", False)
    fields.read |= {*_WINDOWS, "norm_topk_prob"}
    layers = fields.need("num_hidden_layers")
    sparse = fields.get("moe_layer_freq", [1] * layers)
    return {
        **{name: fields.need(name) for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_experts")},
        "num_hidden_layers": layers,
        "num_key_value_heads": fields.get("num_key_value_heads", fields.need("num_attention_heads")),
        "head_dim": fields.get("head_dim") or fields.need("hidden_size") // fields.need("num_attention_heads"),
        "intermediate_size": fields.get("dense_intermediate_size") or fields.need("intermediate_size"),
        "moe_intermediate_size": fields.need("expert_intermediate_size"),
        "num_experts_per_tok": fields.need("num_experts_per_tok"),
        "mlp_only_layers": [index for index, frequency in enumerate(sparse) if not frequency],
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "hidden_act": fields.get("hidden_act", "silu"),
        "max_position_embeddings": fields.need("max_position_embeddings"),
        "rms_norm_eps": fields.get("rms_norm_eps", 1e-5),
        "attention_bias": fields.get("attention_bias", False),
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
        **rotary(fields),
        **_ids(fields),
    }


def glm4_moe_of_llada2(fields: Fields) -> dict[str, Any]:
    """LLaDA2: a sigmoid router over groups of experts, a shared expert, rotation of half a head."""
    fields.refuse("score_function", "sigmoid")
    fields.refuse("norm_head", False)
    fields.refuse("use_bias", False)
    fields.refuse("use_qk_norm", True)
    fields.refuse("norm_topk_prob", True)
    fields.refuse("use_sliding_window", False)
    if fields.need("num_experts_per_tok") == 1:
        why = "whose code then leaves the weight of an expert as it is, which Glm4MoeForCausalLM does not"
        fields.refuse("num_experts_per_tok", why=why)
    if fields.need("num_shared_experts") == 0:
        fields.refuse("num_shared_experts")
    # `sliding_window` stands in the published files, and no code reads it.
    fields.read |= {*_WINDOWS}
    size = fields.get("head_dim") or fields.need("hidden_size") // fields.need("num_attention_heads")
    turned = fields.get("rope_parameters", {}).get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if turned is None:
        turned = fields.need("rotary_dim") / size
    fields.refuse("rotary_dim", int(turned * size), why=f"whose partial_rotary_factor is {turned}")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {
        **{name: fields.need(name) for name in (*names, "moe_intermediate_size", "max_position_embeddings")},
        "num_key_value_heads": fields.get("num_key_value_heads", fields.need("num_attention_heads")),
        "head_dim": size,
        "n_routed_experts": fields.need("num_experts"),
        "n_shared_experts": fields.need("num_shared_experts"),
        "num_experts_per_tok": fields.need("num_experts_per_tok"),
        "n_group": fields.need("n_group"),
        "topk_group": fields.need("topk_group"),
        "first_k_dense_replace": fields.need("first_k_dense_replace"),
        "routed_scaling_factor": fields.need("routed_scaling_factor"),
        "norm_topk_prob": True,
        "use_qk_norm": True,
        "hidden_act": fields.get("hidden_act", "silu"),
        "attention_bias": fields.get("use_qkv_bias", False),
        "rms_norm_eps": fields.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
        "rope_parameters": {"partial_rotary_factor": turned, **rotary(fields)["rope_parameters"]},
        **_ids(fields),
    }


def llama_of_pangu(fields: Fields) -> dict[str, Any]:
    """PanguEmbedded: Llama whose `bias` is that of all projections of attention."""
    return {**by_name(fields), "attention_bias": fields.get("bias", False)}


def _ids(fields: Fields) -> dict[str, Any]:
    """The special ids."""
    return {name: fields.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}

"""Names and shapes of the tensors in the public repositories, read off a config.json of theirs.

A layout is a function from the configuration to (name, shape, kind) of every tensor, in the order of the file. The kind
says how a random tensor of that kind is drawn (`published.draw`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]
Tensors = Iterator[tuple[str, tuple[int, ...], str]]


def llada(config: Config) -> Tensors:
    """LLaDA's own names. `ff_proj` is the gate, `up_proj` the other factor, `ff_out` the projection back."""
    hidden, heads = config["d_model"], config["n_heads"]
    kv_heads = config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads)
    kv_width = hidden // heads * kv_heads
    inner = config.get("mlp_hidden_size") or config["mlp_ratio"] * hidden
    vocabulary = config.get("embedding_size") or config["vocab_size"]
    root = "model.transformer."
    yield root + "wte.weight", (vocabulary, hidden), "embedding"
    for layer in range(config["n_layers"]):
        block = f"{root}blocks.{layer}."
        yield block + "attn_norm.weight", (hidden,), "norm"
        yield block + "ff_norm.weight", (hidden,), "norm"
        for name, width in (("q_proj", hidden), ("k_proj", kv_width), ("v_proj", kv_width)):
            yield f"{block}{name}.weight", (width, hidden), "linear"
            if config.get("include_qkv_bias"):
                yield f"{block}{name}.bias", (width,), "bias"
        yield block + "attn_out.weight", (hidden, hidden), "linear"
        yield block + "ff_proj.weight", (inner, hidden), "linear"
        yield block + "up_proj.weight", (inner, hidden), "linear"
        yield block + "ff_out.weight", (hidden, inner), "linear"
    yield root + "ln_f.weight", (hidden,), "norm"
    if not config.get("weight_tying"):
        yield root + "ff_out.weight", (vocabulary, hidden), "head"


def llada2(config: Config) -> Tensors:
    """LLaDA2's names: q, k and v in one tensor, experts one by one beside a shared expert, dense first layers."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield "model.word_embeddings.weight", (config["vocab_size"], hidden), "embedding"
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        yield block + "input_layernorm.weight", (hidden,), "norm"
        yield block + "attention.query_key_value.weight", ((heads + 2 * kv_heads) * head_dim, hidden), "linear"
        yield block + "attention.query_layernorm.weight", (head_dim,), "norm"
        yield block + "attention.key_layernorm.weight", (head_dim,), "norm"
        yield block + "attention.dense.weight", (hidden, heads * head_dim), "linear"
        yield block + "post_attention_layernorm.weight", (hidden,), "norm"
        if layer < config["first_k_dense_replace"]:
            yield from _mlp(block + "mlp.", hidden, config["intermediate_size"])
            continue
        yield block + "mlp.gate.weight", (config["num_experts"], hidden), "router"
        yield block + "mlp.gate.expert_bias", (config["num_experts"],), "expert bias"
        for expert in range(config["num_experts"]):
            yield from _mlp(f"{block}mlp.experts.{expert}.", hidden, config["moe_intermediate_size"])
        shared = config["moe_intermediate_size"] * config["num_shared_experts"]
        yield from _mlp(block + "mlp.shared_experts.", hidden, shared)
    yield "model.norm.weight", (hidden,), "norm"
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (config["vocab_size"], hidden), "head"


def native(
    config: Config,
    *,
    root: str = "model",
    head: str = "lm_head",
    qkv_bias: bool = False,
    qk_norm: bool = False,
    experts: str | None = None,
) -> Tensors:
    """The names of Llama, Qwen2 and Qwen3 under `root`.

    Args:
        qkv_bias: whether q, k and v have a bias (Qwen2).
        qk_norm: whether each head's q and k are normalized (Qwen3).
        experts: the field that holds the width of an expert; None = every layer is dense.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_width = head_dim * config["num_key_value_heads"]
    yield root + ".embed_tokens.weight", (config["vocab_size"], hidden), "embedding"
    for layer in range(config["num_hidden_layers"]):
        block = f"{root}.layers.{layer}."
        yield block + "input_layernorm.weight", (hidden,), "norm"
        for name, width in (("q", heads * head_dim), ("k", kv_width), ("v", kv_width)):
            yield f"{block}self_attn.{name}_proj.weight", (width, hidden), "linear"
            if qkv_bias:
                yield f"{block}self_attn.{name}_proj.bias", (width,), "bias"
        if qk_norm:
            yield block + "self_attn.q_norm.weight", (head_dim,), "norm"
            yield block + "self_attn.k_norm.weight", (head_dim,), "norm"
        yield block + "self_attn.o_proj.weight", (hidden, heads * head_dim), "linear"
        yield block + "post_attention_layernorm.weight", (hidden,), "norm"
        if experts is None or not _sparse(config, layer):
            inner = config.get("intermediate_size") or config["dense_intermediate_size"]
            yield from _mlp(block + "mlp.", hidden, inner)
            continue
        yield block + "mlp.gate.weight", (config["num_experts"], hidden), "router"
        for expert in range(config["num_experts"]):
            yield from _mlp(f"{block}mlp.experts.{expert}.", hidden, config[experts])
    yield root + ".norm.weight", (hidden,), "norm"
    if not config.get("tie_word_embeddings"):
        yield head + ".weight", (config["vocab_size"], hidden), "head"


def _sparse(config: Config, layer: int) -> bool:
    """Whether a layer has experts: by `moe_layer_freq` (LLaDA-MoE), else by `mlp_only_layers` (Qwen3-MoE)."""
    if "moe_layer_freq" in config:
        return bool(config["moe_layer_freq"][layer])
    return layer not in config["mlp_only_layers"]


def _mlp(prefix: str, hidden: int, inner: int) -> Tensors:
    yield prefix + "gate_proj.weight", (inner, hidden), "linear"
    yield prefix + "up_proj.weight", (inner, hidden), "linear"
    yield prefix + "down_proj.weight", (hidden, inner), "linear"

"""config.json and generation_config.json of the public repositories, with the sizes of a toy.

Field names, and the values that are not sizes, are those of the public files. A comment says "assumed" where a field
could not be checked against a public copy. Special tokens stand at small ids (published_tokenizers.py), in the
configuration too.
"""

from __future__ import annotations

from typing import Any

import published_tokenizers as tokenizers

VOCABULARY = 128


def _auto_map(module: str, config: str, model: str, base: str | None = None) -> dict[str, str]:
    found = {"AutoConfig": f"configuration_{module}.{config}"}
    if base is not None:
        found["AutoModel"] = f"modeling_{module}.{base}"
    return {**found, "AutoModelForCausalLM": f"modeling_{module}.{model}"}


def llada() -> dict[str, Any]:
    ids = tokenizers.LLADA.special
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": _auto_map("llada", "LLaDAConfig", "LLaDAModelLM", "LLaDAModelLM"),
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": 32,
        "embedding_dropout": 0.0,
        "embedding_size": VOCABULARY,
        "eos_token_id": ids["<|endoftext|>"],
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": ids["<|mdm_mask|>"],
        "max_sequence_length": 4096,
        "mlp_hidden_size": 48,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": 2,
        "pad_token_id": ids["<|endoftext|>"],
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": VOCABULARY - 4,  # both are 126464 in public; a reader that mixes them up is found here
        "weight_tying": False,
    }


def llada2() -> dict[str, Any]:
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "attention_dropout": 0.0,
        "auto_map": _auto_map("llada2_moe", "LLaDA2MoeConfig", "LLaDA2MoeModelLM", "LLaDA2MoeModel"),
        "dtype": "bfloat16",
        "embedding_dropout": 0.0,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "llada2_moe",
        "moe_intermediate_size": 24,
        "moe_router_enable_expert_bias": True,
        "n_group": 4,
        "norm_head": False,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_shared_experts": 1,
        "output_dropout": 0.0,
        "output_router_logits": False,
        "pad_token_id": tokenizers.LLADA2.special["<|endoftext|>"],
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 600000,
        "rotary_dim": 8,
        "routed_scaling_factor": 2.5,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "topk_group": 2,
        "transformers_version": "4.57.1",
        "use_bias": False,
        "use_cache": True,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
    }


def _qwen(**changes: Any) -> dict[str, Any]:
    """What the configurations of the Qwen line share."""
    ids = tokenizers.DREAM.special
    return {
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
        **changes,
    }


def dream() -> dict[str, Any]:
    ids = tokenizers.DREAM.special
    return _qwen(
        architectures=["DreamModel"],
        auto_map={"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        mask_token_id=ids["<|mask|>"],
        max_position_embeddings=131072,
        model_type="Dream",
        pad_token_id=ids["<|endoftext|>"],
        use_mrope=False,
    )


def dream_generation() -> dict[str, Any]:
    """The mask id is null here, though config.json has one."""
    end = tokenizers.DREAM.special["<|endoftext|>"]
    return {
        "_from_model_config": True,
        "alg": "origin",
        "alg_temp": None,
        "bos_token_id": end,
        "eos_token_id": end,
        "eps": 0.001,
        "mask_token_id": None,
        "max_length": 20,
        "max_new_tokens": None,
        "num_return_sequences": 1,
        "output_history": False,
        "pad_token_id": end,
        "return_dict_in_generate": False,
        "steps": 512,
        "temperature": 0.0,
        "top_k": None,
        "top_p": None,
        "transformers_version": "4.46.2",
    }


def sdar() -> dict[str, Any]:
    """The configuration of the 8B; that of the 4B has neither mask_token_id nor block_size."""
    return _qwen(
        architectures=["SDARForCausalLM"],
        attention_bias=False,
        auto_map=_auto_map("sdar", "SDARConfig", "SDARForCausalLM", "SDARModel"),
        block_size=4,
        fuse_cross_entropy=True,
        head_dim=16,  # not hidden_size / num_attention_heads, as in the 4B
        mask_token_id=tokenizers.SDAR.special["<|MASK|>"],
        max_window_layers=36,
        model_type="sdar",
        pad_token_id=tokenizers.SDAR.special["<|endoftext|>"],
        transformers_version="4.52.4",
    )


def sdar_generation() -> dict[str, Any]:
    ids = tokenizers.SDAR.special
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": "4.52.4",
    }

"""config.json of the LLaDA line: LLaDA, LLaDA in Llama's layout, LLaDA-MoE and LLaDA2 (published_configs.py)."""

from __future__ import annotations

from typing import Any

import published_tokenizers as tokenizers
from published_configs import VOCABULARY, auto_map


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
        "auto_map": auto_map("llada", "LLaDAConfig", "LLaDAModelLM", "LLaDAModelLM"),
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
    """Neither a mask id nor an EOS id; the sliding window is never used. Assumed: `use_cache`."""
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "attention_dropout": 0.0,
        "auto_map": auto_map("llada2_moe", "LLaDA2MoeConfig", "LLaDA2MoeModelLM", "LLaDA2MoeModel"),
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


def llada_moe() -> dict[str, Any]:
    """The model type is LLaDA's, the fields are those of its own configuration class.

    Assumed: that the file has them all, the values of the unused ones, and that no mask id is given.
    """
    end = tokenizers.LLADA2.special["<|endoftext|>"]
    return {
        "architectures": ["LLaDAMoEModelLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": auto_map("lladamoe", "LLaDAConfig", "LLaDAMoEModelLM", "LLaDAMoEModelLM"),
        "clip_qkv": None,
        "dense_intermediate_size": 48,
        "eos_token_id": end,
        "expert_intermediate_size": 24,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "model_type": "llada",
        "moe_layer_freq": [1, 1],
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": None,
        "num_attention_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "pad_token_id": end,
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 50000,
        "routed_scaling_factor": 1,
        "router_aux_loss_coef": 0.01,
        "router_num_group": None,
        "router_topk_group": None,
        "shared_expert_intermediate_size": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.53.2",
        "use_cache": False,
        "vocab_size": VOCABULARY,
    }


def llada_llama() -> dict[str, Any]:
    """LLaDA's model type and classes with Llama's fields; no mask id. Read off a converter's output."""
    ids = tokenizers.LLADA.special
    return {
        "architectures": ["LLaDAModelLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": auto_map("llada", "LLaDAConfig", "LLaDAModelLM", "LLaDAModelLM"),
        "bos_token_id": ids["<|startoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 16384,
        "model_type": "llada",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.39.1",
        "use_cache": False,
        "vocab_size": VOCABULARY,
    }

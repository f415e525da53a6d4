"""config.json and generation_config.json of the public repositories, with the sizes of a toy.

Field names, and the values that are not sizes, are those of the public files. A comment says "assumed" where a field
could not be checked against a public copy. Special tokens stand at small ids (published_tokenizers.py), in the
configuration too.
"""

from __future__ import annotations

from typing import Any

import published_tokenizers as tokenizers

VOCABULARY = 128

# What Qwen3-MoE, SDAR-MoE and RND1 add to a dense configuration.
MOE = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def auto_map(module: str, config: str, model: str, base: str | None = None) -> dict[str, str]:
    found = {"AutoConfig": f"configuration_{module}.{config}"}
    if base is not None:
        found["AutoModel"] = f"modeling_{module}.{base}"
    return {**found, "AutoModelForCausalLM": f"modeling_{module}.{model}"}


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
    """Assumed: that the other fields are Qwen2's."""
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
    """The configuration of the 8B; that of the 4B has neither mask_token_id nor block_size.

    Assumed: that `fuse_cross_entropy` stands in the file, and that the other fields are Qwen3's.
    """
    return _qwen(
        architectures=["SDARForCausalLM"],
        attention_bias=False,
        auto_map=auto_map("sdar", "SDARConfig", "SDARForCausalLM", "SDARModel"),
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
    """Assumed: the settings of the sampling."""
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


def sdar_moe() -> dict[str, Any]:
    """Assumed: the fields that are not Qwen3-MoE's are those of the dense 8B."""
    return {
        **sdar(),
        **MOE,
        "architectures": ["SDARMoeForCausalLM"],
        "auto_map": auto_map("sdar_moe", "SDARMoeConfig", "SDARMoeForCausalLM", "SDARMoeModel"),
        "model_type": "sdar_moe",
    }


def fast_dllm() -> dict[str, Any]:
    """The mask id is a constant of the code; EOS and padding are the end of a turn. Read off a converter's output."""
    ids = tokenizers.FAST_DLLM.special
    return _qwen(
        architectures=["Fast_dLLM_QwenForCausalLM"],
        auto_map={
            "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
            "AutoModel": "modeling.Fast_dLLM_QwenModel",
            "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
        },
        bd_size=32,
        eos_token_id=ids["<|im_end|>"],
        layer_types=["full_attention", "full_attention"],
        model_type="Fast_dLLM_Qwen",
        pad_token_id=ids["<|im_end|>"],
        tie_word_embeddings=True,  # as in the 1.5B; the 7B has a head of its own
        transformers_version="4.53.1",
    )


def nemotron() -> dict[str, Any]:
    """The rotation of Ministral 3. `original_max_position_embeddings` is small enough for a toy to go beyond it."""
    return {
        "ar_loss_weight": 1.0,
        "architectures": ["NemotronLabsDiffusionModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_implementation": "sdpa",
        "auto_map": {
            "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
            "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
        },
        "block_size": 32,
        "bos_token_id": 1,
        "dlm_loss_weight": None,
        "dlm_paradigm": "bidirectional",
        "dp_varying_mask_ratio": False,
        "eos_token_id": tokenizers.NEMOTRON.special["<|im_end|>"],
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "mask_token_id": tokenizers.NEMOTRON.special["<SPECIAL_100>"],
        "max_position_embeddings": 256,
        "mlp_bias": False,
        "model_type": "nemotron_labs_diffusion",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 1000000.0,
            "rope_type": "yarn",
        },
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "5.0.0",
        "use_cache": False,
        "vocab_size": VOCABULARY,
    }


def efficient_dlm() -> dict[str, Any]:
    """The model type is Qwen3's. Assumed: the module names, `dlm_paradigm`, and which id is padding."""
    ids = tokenizers.EFFICIENT_DLM.special
    return _qwen(
        architectures=["EfficientDLM"],
        attention_bias=False,
        auto_map={
            "AutoConfig": "configuration_efficient_dlm.EfficientDLMConfig",
            "AutoModel": "modeling_efficient_dlm.EfficientDLM",
        },
        block_size=32,
        dlm_paradigm="block_diff",
        head_dim=16,
        mask_token_id=ids["<|fim_pad|>"],
        model_type="qwen3",
        pad_token_id=ids["<|endoftext|>"],
    )


def stable_diffcoder() -> dict[str, Any]:
    """The model type is Llama's, and there is no AutoConfig. The mask id is a constant of the code.

    Assumed: head_dim and pretraining_tp.
    """
    return {
        "architectures": ["StableDiffcoderForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"},
        "bos_token_id": 0,
        "eos_token_id": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.009882118,
        "intermediate_size": 48,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 1,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.3",
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }


def _a2d(base: str, **changes: Any) -> dict[str, Any]:
    """A causal model's configuration with other classes; neither a mask id nor a block size.

    Assumed: the names of the modules.
    """
    name = f"A2D{base.capitalize()}"
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForMaskedLM": "LMHeadModel"}
    values = {
        "architectures": [f"{name}LMHeadModel"],
        "auto_map": {auto: f"modeling_{base}.{name}{suffix}" for auto, suffix in classes.items()},
        "eos_token_id": tokenizers.A2D.special["<|im_end|>"],
        "layer_types": ["full_attention", "full_attention"],
        "model_type": f"a2d-{base}",
        "pad_token_id": tokenizers.A2D.special["<|endoftext|>"],
        "tie_word_embeddings": True,
        "transformers_version": "4.57.0",
        **changes,
    }
    config = _qwen(**values)
    config["dtype"] = config.pop("torch_dtype")
    return config


def a2d_qwen3() -> dict[str, Any]:
    return _a2d("qwen3", attention_bias=False, head_dim=16)


def a2d_qwen2() -> dict[str, Any]:
    return _a2d("qwen2")


def a2d_llama() -> dict[str, Any]:
    """Assumed: which fields of Llama 3 stand in the file."""
    ids = tokenizers.A2D_LLAMA.special
    config = _a2d(
        "llama",
        attention_bias=False,
        bos_token_id=ids["<|begin_of_text|>"],
        eos_token_id=ids["<|eot_id|>"],
        head_dim=8,
        mlp_bias=False,
        pad_token_id=ids["<|eot_id|>"],
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_theta=500000.0,
    )
    for name in ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"):
        del config[name]
    return config


def rnd1() -> dict[str, Any]:
    """The fields and the values that are not sizes are those of the public configuration class, false where others have
    null. Assumed: that the file has them all.
    """
    ids = tokenizers.RND1.special
    return _qwen(
        **MOE,
        architectures=["RND1LM"],
        attention_bias=False,
        auto_map={
            "AutoConfig": "configuration_rnd.RND1Config",
            "AutoModel": "modeling_rnd.RND1Model",
            "AutoModelForMaskedLM": "modeling_rnd.RND1LM",
        },
        eos_token_id=ids["<|im_end|>"],
        head_dim=16,
        is_causal=False,
        mask_token_id=ids["<|mask|>"],
        max_position_embeddings=40960,
        max_window_layers=48,
        model_type="rnd1",
        moe_backend="hf",
        num_diffusion_steps=256,
        pad_token_id=ids["<|endoftext|>"],
        rope_scaling=False,
        sliding_window=False,
        use_cache=False,
    )

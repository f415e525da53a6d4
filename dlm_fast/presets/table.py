"""The table: every published decoder as a row of data. Numbers are the authors' defaults where they publish any."""

from __future__ import annotations

from typing import Any

from ..policies import (
    AdaptiveThreshold,
    Backtrack,
    CertaintyPrior,
    ConsistentTrajectory,
    Credit,
    EntropyRefresh,
    InsertDelete,
    JointThreshold,
    KLStability,
    LearnedFilter,
    LocalLeap,
    NearBest,
    Prophet,
    RunningConfidence,
    Sched,
    Wino,
)
from .preset import Preset

_LLADA = "Nie et al. 2025 (LLaDA), arXiv:2502.09992"
_DREAM = "Ye et al. 2025 (Dream 7B), arXiv:2508.15487"
_FAST = "Wu et al. 2025 (Fast-dLLM), arXiv:2505.22618"
_FAST_V2 = "Wu et al. 2025 (Fast-dLLM v2), arXiv:2509.26328"
_D2F = "Wang et al. 2025 (discrete diffusion forcing), arXiv:2508.09192"
_SDAR = "Cheng et al. 2025 (SDAR), arXiv:2510.06303"
_LLADA2 = "Bie et al. 2025 (LLaDA2.0), arXiv:2512.15745"
_DINFER = "Ma et al. 2025 (dInfer), arXiv:2510.08666"

_UNCACHED = "exact: it is the uncached loop"
_EXACT = "exact: same tokens as recomputing everything"
_PREFIX = "approximate: keys before the block are as old as the block"
_DUAL = "approximate: keys before and after the block are as old as the block"

# Settings that several rows share.
_FULL: dict[str, Any] = {"visibility": "full", "cache": "none", "exactness": _UNCACHED}
_BLOCK: dict[str, Any] = {"visibility": "block", "cache": "commit", "exactness": _EXACT}
_THRESHOLD: dict[str, Any] = {"rule": "threshold", "inclusive": True, "block_length": 32}
_DRAWN: dict[str, Any] = {"tempered": True, "top_k_first": True}

_ROWS = (
    Preset("llada", _LLADA, **_FULL, rule="quota"),
    Preset("dream", _DREAM, **_FULL, schedule="canvas", rule="schedule", score="neg_entropy", tempered=True),
    Preset("dream-origin", _DREAM, **_FULL, schedule="canvas", rule="bernoulli", tempered=True),
    Preset("fast-dllm", _FAST, **_FULL, **_THRESHOLD),
    Preset("fast-dllm-factor", _FAST, **_FULL, rule="factor", block_length=32),
    Preset("fast-dllm-prefix", _FAST, _PREFIX, "full", "prefix", **_THRESHOLD),
    Preset("fast-dllm-dual", _FAST, _DUAL, "full", "dual", **_THRESHOLD),
    Preset(
        "fast-dllm-v2",
        _FAST_V2,
        **_BLOCK,
        rule="threshold",
        seed=True,
        sub_block_length=8,
        needs="a model whose rows predict the next position (logits_row 'previous')",
    ),
    Preset(
        "d2f",
        _D2F,
        _EXACT,
        "block",
        "fused",
        schedule="pipeline",
        rule="threshold",
        append_threshold=0.1,
        activate_threshold=0.95,
        needs="a block-causal model; weights trained by diffusion forcing gain most",
    ),
    Preset("sdar", f"{_SDAR}; static", **_BLOCK, **_DRAWN, rule="quota"),
    Preset("sdar-dynamic", f"{_SDAR}; dynamic", **_BLOCK, **_DRAWN, rule="threshold", threshold=0.85, min_unmask=None),
    Preset("sdar-sequential", f"{_SDAR}; sequential", **_BLOCK, **_DRAWN, rule="quota", score="position"),
    Preset(
        "sdar-entropy",
        f"{_SDAR}; entropy bounded",
        **_BLOCK,
        **_DRAWN,
        rule="entropy",
        inclusive=True,
        entropy_bound=0.35,
        score="neg_entropy",
    ),
    Preset(
        "trado", "Wang et al. 2025 (TraceRL), arXiv:2509.06949", **_BLOCK, **_DRAWN, rule="threshold", threshold=0.9, min_unmask=None
    ),
    Preset("llada2", _LLADA2, **_BLOCK, rule="threshold", threshold=0.95),
    Preset("llada2-quota", f"{_LLADA2}; its Hugging Face loop", **_BLOCK, rule="threshold", threshold=0.95, min_unmask=None),
    Preset(
        "llada2.1",
        "LLaDA2.1, joint threshold as served by SGLang",
        **_BLOCK,
        rule="threshold",
        threshold=0.5,
        policies=(JointThreshold(),),
        stop="after_block",
        needs="weights trained for editing (LLaDA2.1)",
    ),
    Preset(
        "llada2.2",
        "LLaDA2.2, joint threshold with insert and delete as served by SGLang",
        **_BLOCK,
        rule="threshold",
        threshold=0.5,
        policies=(InsertDelete(),),
        stop="after_block",
        needs="weights trained for insertion and deletion (LLaDA2.2), delete_id= and split_id=; runs on the host",
    ),
    Preset("nbdiff", "NBDiff, published generator", **_BLOCK, rule="threshold", seed=True, causal_commit=True,
           needs="a causal prefix and logits_row 'previous'"),
    Preset("efficient-dlm", "Efficient-DLM, published generator", **_BLOCK, rule="threshold", inclusive=True),
    Preset("dinfer", _DINFER, _DUAL, "full", "dual", **_THRESHOLD, policies=(NearBest(),)),
    Preset("dinfer-hierarchy", _DINFER, _DUAL, "full", "dual", rule="threshold", block_length=32, run_threshold=0.4),
    Preset("dinfer-credit", _DINFER, _DUAL, "full", "dual", **_THRESHOLD, policies=(Credit(),)),
    Preset(
        "dinfer-vicinity",
        _DINFER,
        "approximate: keys away from the block are as old as the block",
        "full",
        "dual",
        **_THRESHOLD,
        policies=(NearBest(),),
        vicinity=16,
        warmup_steps=4,
    ),
    Preset(
        "d3llm",
        "d3LLM, published generator",
        "approximate: cached keys are as old as the last forward of everything",
        "full",
        "delayed",
        schedule="pipeline",
        block_length=32,
        rule="threshold",
        score="neg_entropy",
        threshold=-0.5,
        inclusive=True,
        scope="first",
        append_threshold=0.1,
        activate_threshold=0.95,
        refresh_interval=4,
        stop="fill",
        needs="distilled weights for its speed",
    ),
    Preset(
        "dparallel",
        "Chen et al. 2025 (dParallel), arXiv:2509.26488",
        **_FULL,
        rule="threshold",
        score="neg_entropy",
        threshold=-0.5,
        inclusive=True,
        block_length=32,
        needs="distilled weights for its speed",
    ),
    Preset(
        "diffusion-gemma",
        "DiffusionGemma in transformers: entropy-bound renoising",
        "exact: same tokens as re-encoding every canvas",
        "full",
        "none",
        block_length=256,
        rule="renoise",
        score="neg_entropy",
        entropy_bound=0.1,
        stop="after_block",
        needs="a uniform-noise model, whose family is not here yet",
    ),
    Preset(
        "dllm-var",
        "dLLM-Var, published generator",
        "approximate: committed keys have seen the masks of the block after them",
        "full",
        "fused",
        schedule="pipeline",
        rule="threshold",
        block_length=64,
        stop="after_block",
        needs="weights trained to end with EOS (dLLM-Var)",
    ),
    Preset("dllm-rl", "dLLM-RL, published sampler", _PREFIX, "full", "prefix", rule="threshold", threshold=0.95, block_length=32, horizon=128),
    Preset(
        "eb-sampler", "Ben-Hamu et al. 2025, arXiv:2505.24857", **_FULL, rule="entropy", score="neg_entropy", block_length=32
    ),
    Preset(
        "klass", "Kim et al. 2025 (KLASS), arXiv:2511.05664", **_FULL, rule="threshold", threshold=0.6, block_length=32,
        policies=(KLStability(),),
    ),
    Preset("ccd", "CCD, published code; list form", **_FULL, rule="quota", score="neg_entropy", block_length=32,
           policies=(ConsistentTrajectory(),)),
    Preset("ccd-ds", "CCD, published code; list form, dynamic", **_FULL, rule="quota", score="neg_entropy", block_length=32,
           policies=(ConsistentTrajectory(dynamic=True),)),
    Preset("prophet", "Li et al. 2025 (Prophet), arXiv:2508.19982", _FULL["exactness"], "full", "none", rule="quota", block_length=32,
           policies=(Prophet(),)),
    Preset("sched", "SchED, published code", **_FULL, rule="quota", block_length=32, policies=(Sched(),)),
    Preset("rcr", "He et al. 2025 (MDPO), arXiv:2508.13148", **_FULL, rule="quota", block_length=32, policies=(RunningConfidence(),),
           stop="after_block"),
    Preset("saber", "Saber, published code", **_FULL, rule="threshold", min_unmask=2, block_length=32, policies=(Backtrack(),),
           stop="after_block"),
    Preset("wino", "Hong et al. 2025 (WINO), arXiv:2507.18578", **_FULL, rule="threshold", threshold=0.6, block_length=128,
           policies=(Wino(),), stop="after_block"),
    Preset("local-leap", "LocalLeap, published code", **_FULL, **_THRESHOLD, policies=(LocalLeap(),)),
    Preset("certainty-prior", "Jiang et al. 2025 (d2Cache), arXiv:2509.23094", **_FULL, rule="quota", block_length=32,
           policies=(CertaintyPrior(),)),
    Preset("learn2pd", "Learn2PD, published code", **_FULL, rule="quota", block_length=32, policies=(LearnedFilter(),),
           needs="a trained filter, head="),
    Preset(
        "streaming-dllm",
        "Streaming-dLLM, published code",
        "approximate: keys before the block are as old as the block, far ones after it are left out",
        "full",
        "prefix",
        **_THRESHOLD,
        horizon=96,
        keep_last=True,
        policies=(AdaptiveThreshold(),),
    ),
    Preset(
        "dpad",
        "Chen et al. 2025 (DPad), arXiv:2508.14148",
        "approximate: most positions after the block are left out",
        "full",
        "none",
        **_THRESHOLD,
        horizon=256,
        scatter_suffix=True,
    ),
    Preset(
        "freecache",
        "Hu et al. 2025 (FlashDLM), arXiv:2505.21467",
        "approximate: keys before the block are as their block left them",
        "full",
        "once",
        **_THRESHOLD,
    ),
    Preset(
        "dkv-cache",
        "Ma et al. 2025 (dKV-Cache), arXiv:2505.15781",
        "approximate: keys of decoded positions are as old as the last forward of everything",
        "full",
        "scattered",
        rule="quota",
        block_length=32,
        refresh_interval=8,
    ),
    Preset(
        "entropy-cache",
        "after EntropyCache (abstract only)",
        "approximate: keys of decoded positions are as old as the last forward of everything",
        "full",
        "scattered",
        rule="quota",
        block_length=32,
        policies=(EntropyRefresh(),),
    ),
    Preset(
        "freedave",
        "FreeDave, published code",
        "exact: same tokens as one token per step with the dual cache",
        "full",
        "dual",
        rule="quota",
        block_length=32,
        drafts=4,
    ),
    Preset("freedave-block", "FreeDave, published code", "exact: same tokens as one token per step", "block", "commit", rule="quota", drafts=8),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ROWS}

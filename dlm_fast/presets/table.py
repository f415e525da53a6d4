"""The table of presets: every published decoder as a row of data.

The numbers are the authors' defaults where the authors publish any.
"""

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
    LearnedCommit,
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
_CREDIT = "Wang et al. 2025 (CreditDecoding), arXiv:2510.06133"
_TRACE = "Wang et al. 2025 (TraceRL), arXiv:2509.06949"
_EB = "Ben-Hamu et al. 2025 (EB-Sampler), arXiv:2505.24857"
_CCD = "Chen et al. 2025 (CCD), arXiv:2512.02044"
_FREEDAVE = "Wu and Zhang 2025 (FreeDave), arXiv:2510.00294"

_UNCACHED = "exact: it is the uncached loop"
_EXACT = "exact: same tokens as recomputing everything"
_PREFIX = "approximate: keys before the block are as old as the block"
_DUAL = "approximate: keys before and after the block are as old as the block"

# Options that several rows share. A published loop that decodes whole last blocks, or refuses a length that leaves a
# remainder, has "whole" where blocks see nothing behind them: the tokens of the blocks before are the same. Over full
# visibility every token sees the masks behind it, so that no more of them are added than were asked for ("crop").
_FULL: dict[str, Any] = {"visibility": "full", "cache": "none", "exactness": _UNCACHED}
# The published loops of block-causal models append a finished block by a forward of its own, which is cache="commit":
# the NFE of the papers. Fused with the next block's first step, the same keys cost no forward.
_BLOCK: dict[str, Any] = {"visibility": "block", "cache": "fused", "exactness": _EXACT}
_THRESHOLD: dict[str, Any] = {"rule": "threshold", "inclusive": True, "block_length": 32}
_WHOLE: dict[str, Any] = {**_BLOCK, "last_block": "whole"}
# Commits that are not fused: those that predict the next block's first token, and editing decoders, whose last step of
# a block writes nothing and so has the final keys already.
_COMMIT: dict[str, Any] = {**_WHOLE, "cache": "commit"}
_DRAWN: dict[str, Any] = {"tempered": True, "top_k_first": True, "quota_of": "block"}

_ROWS = (
    Preset("llada", _LLADA, **_FULL, rule="quota"),
    # Temperature .2 and top_p .95 of Dream's README are arguments of the call. The published schedule may write nothing
    # in a step and two tokens in the last one, which is strict_reference=True; here every step writes.
    Preset(
        "dream",
        _DREAM,
        **_FULL,
        schedule="canvas",
        rule="schedule",
        score="neg_entropy",
        tempered=True,
        greedy_filters=True,
    ),
    Preset("dream-origin", _DREAM, **_FULL, schedule="canvas", rule="bernoulli", tempered=True, greedy_filters=True),
    Preset("fast-dllm", _FAST, **_FULL, **_THRESHOLD),
    Preset("fast-dllm-factor", _FAST, **_FULL, rule="factor", block_length=32),
    Preset("fast-dllm-prefix", _FAST, _PREFIX, "full", "prefix", **_THRESHOLD),
    Preset("fast-dllm-dual", _FAST, _DUAL, "full", "dual", **_THRESHOLD),
    Preset(
        "fast-dllm-v2",
        _FAST_V2,
        **_COMMIT,
        rule="threshold",
        first_token=True,
        sub_block_length=8,
        needs="a model whose rows predict the next position (logits_row 'previous')",
    ),
    # The thresholds are those of the evaluation scripts for Dream. They differ by task: HumanEval has .9 / .95 / .95
    # (append, activate, write), LLaDA .7, .9 or .1 to append.
    Preset(
        "d2f",
        _D2F,
        _EXACT,
        "block",
        "fused",
        # The published loop decodes `max_new_tokens // block_length` blocks and leaves the rest out, which is
        # last_block="drop"; here the rest follows, and the tokens before it are the same.
        schedule="pipeline",
        last_block="whole",
        rule="threshold",
        append_threshold=0.1,
        activate_threshold=0.95,
        greedy_filters=True,
        needs="a block-causal model; weights trained by diffusion forcing gain most",
    ),
    Preset("sdar", f"{_SDAR}; static", **_WHOLE, **_DRAWN, rule="quota"),
    # .85 is the script's threshold; the README's engine takes .9, which is the preset "trado".
    Preset("sdar-dynamic", f"{_SDAR}; dynamic", **_WHOLE, **_DRAWN, rule="threshold", threshold=0.85, min_unmask=None),
    Preset("sdar-sequential", f"{_SDAR}; sequential", **_WHOLE, **_DRAWN, rule="quota", score="position"),
    Preset(
        "sdar-entropy",
        f"{_SDAR}; entropy bounded",
        **_WHOLE,
        **_DRAWN,
        rule="entropy",
        inclusive=True,
        entropy_bound=0.35,
        score="neg_entropy",
    ),
    Preset("trado", f"{_TRACE}; TraDo", **_WHOLE, **_DRAWN, rule="threshold", threshold=0.9, min_unmask=None),
    Preset("llada2", _LLADA2, **_WHOLE, rule="threshold", threshold=0.95, quota_of="block"),
    Preset(
        "llada2-quota",
        f"{_LLADA2}; its Hugging Face loop",
        **_WHOLE,
        rule="threshold",
        threshold=0.95,
        min_unmask=None,
        quota_of="block",
    ),
    # SGLang's numbers; the Hugging Face loop has threshold .7, edit_threshold .5 and max_post_edits 16.
    Preset(
        "llada2.1",
        "Bie et al. 2026 (LLaDA2.1), arXiv:2602.08676; joint threshold as served by SGLang",
        **_COMMIT,
        rule="threshold",
        threshold=0.5,
        policies=(JointThreshold(),),
        stop="after_block",
        needs="weights trained for editing (LLaDA2.1)",
    ),
    Preset(
        "llada2.2",
        "LLaDA2.2 technical report, joint threshold with insert and delete: SGLang pull request 31773",
        **_COMMIT,
        rule="threshold",
        threshold=0.5,
        policies=(InsertDelete(),),
        stop="after_block",
        needs="weights trained for insertion and deletion (LLaDA2.2), delete_id= and split_id=; runs on the host",
    ),
    Preset(
        "nbdiff",
        "Tian et al. 2025 (NBDiff), arXiv:2512.06776",
        **_COMMIT,
        rule="threshold",
        first_token=True,
        needs="a causal prefix (causal_prefix) and logits_row 'previous'",
    ),
    Preset(
        "efficient-dlm", "Fu et al. 2025 (Efficient-DLM), arXiv:2512.14067", **_WHOLE, rule="threshold", inclusive=True
    ),
    Preset(
        "nemotron",
        "NVIDIA 2026 (Nemotron-Labs-Diffusion), technical report; its block diffusion",
        **_COMMIT,
        rule="threshold",
        inclusive=True,
        first_token=True,
        draws_first_token=True,
        needs="a causal prefix (causal_prefix)",
    ),
    Preset(
        "stable-diffcoder",
        "Fan et al. 2026 (Stable-DiffCoder)",
        **_BLOCK,
        rule="threshold",
        threshold=0.95,
        inclusive=True,
    ),
    Preset(
        "bd3lm",
        "Arriola et al. 2025 (BD3-LM), arXiv:2503.09573; the sampler of dLLM, for its A2D models",
        **_BLOCK,
        rule="quota",
    ),
    Preset(
        "rnd1",
        "Chandrasegaran et al. 2025 (RND1), Radical Numerics report",
        **_FULL,
        schedule="canvas",
        rule="quota",
        score="neg_entropy",
        steps_per_block=256,
        remainder="even",
        tempered=True,
        top_k_first=True,
        greedy_filters=True,
    ),
    Preset("dinfer", _DINFER, _DUAL, "full", "dual", **_THRESHOLD, policies=(NearBest(),)),
    # .4 is the default of the class; the evaluation scripts pass .3.
    Preset("dinfer-hierarchy", _DINFER, _DUAL, "full", "dual", rule="threshold", block_length=32, run_threshold=0.4),
    Preset("dinfer-credit", f"{_DINFER}; {_CREDIT}", _DUAL, "full", "dual", **_THRESHOLD, policies=(Credit(),)),
    # For LLaDA-MoE the README has threshold .8.
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
    # The numbers are those for LLaDA (MBPP: -.4). For Dream, the published loop compares strictly, with a threshold of
    # -.4 to -.45, and min_unmask is 0. Where max_new_tokens cuts the last block, the published loop never writes that
    # block and runs into its cap of forwards; here the block is written, and the tokens before it are the same.
    Preset(
        "d3llm",
        "Qian et al. 2026 (d3LLM), arXiv:2601.07568",
        "approximate: cached keys are as old as their commit, or the last forward of everything",
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
        commit_delay=2,
        refresh_interval=3,
        stop="fill",
        needs="distilled weights for its speed",
    ),
    # For LLaDA; for Dream the published loop compares strictly (inclusive=False).
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
        f"DiffusionGemma (Google 2026) in transformers: entropy-bound renoising, {_EB}",
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
        "Yang et al. 2025 (dLLM-Var), arXiv:2510.24605",
        "approximate: committed keys have seen the masks of the block after them",
        "full",
        "fused",
        schedule="pipeline",
        last_block="whole",
        rule="threshold",
        block_length=64,
        stop="after_block",
        needs="weights trained to end with EOS (dLLM-Var)",
    ),
    Preset(
        "dllm-rl",
        f"{_TRACE}; the sampler of dLLM-RL",
        _PREFIX,
        "full",
        "prefix",
        rule="threshold",
        threshold=0.95,
        block_length=32,
        horizon=128,
    ),
    Preset("eb-sampler", _EB, **_FULL, rule="entropy", score="neg_entropy", block_length=32),
    # The thresholds are those of GSM8K; they differ by task and model (.6 to .9, kl_threshold .005 to .015).
    Preset(
        "klass",
        "Kim et al. 2025 (KLASS), arXiv:2511.05664",
        **_FULL,
        rule="threshold",
        threshold=0.6,
        block_length=64,
        policies=(KLStability(),),
    ),
    Preset(
        "ccd",
        f"{_CCD}; list form",
        **_FULL,
        rule="quota",
        score="neg_entropy",
        policies=(ConsistentTrajectory(),),
    ),
    Preset(
        "ccd-ds",
        f"{_CCD}; list form, dynamic",
        **_FULL,
        rule="quota",
        score="neg_entropy",
        policies=(ConsistentTrajectory(dynamic=True),),
    ),
    Preset(
        "prophet",
        "Li et al. 2025 (Prophet), arXiv:2508.19982",
        _FULL["exactness"],
        "full",
        "none",
        rule="quota",
        block_length=32,
        policies=(Prophet(),),
    ),
    # The paper's decoder for LLaDA. The repository runs Dream's sampler over the whole canvas, by entropy.
    Preset(
        "sched",
        "Mohamed et al. 2025 (SchED), arXiv:2512.02892",
        **_FULL,
        rule="quota",
        block_length=32,
        policies=(Sched(),),
    ),
    # The evaluation fills one block of 512 in 128 steps (steps_per_block=128), with top_p .95 at temperature 0 too.
    Preset(
        "rcr",
        "He et al. 2025 (MDPO), arXiv:2508.13148",
        **_FULL,
        rule="quota",
        policies=(RunningConfidence(),),
        greedy_filters=True,
        stop="after_block",
    ),
    Preset(
        "saber",
        "Dong et al. 2025 (Saber), arXiv:2510.18165",
        **_FULL,
        rule="threshold",
        min_unmask=2,
        policies=(Backtrack(),),
        stop="after_block",
    ),
    Preset(
        "wino",
        "Hong et al. 2025 (WINO), arXiv:2507.18578",
        **_FULL,
        rule="threshold",
        threshold=0.6,
        block_length=128,
        policies=(Wino(),),
        stop="after_block",
    ),
    Preset(
        "local-leap", "Kong et al. 2025 (LocalLeap), arXiv:2510.07081", **_FULL, **_THRESHOLD, policies=(LocalLeap(),)
    ),
    Preset(
        "certainty-prior",
        "Jiang et al. 2025 (d2Cache), arXiv:2509.23094",
        **_FULL,
        rule="quota",
        block_length=32,
        policies=(CertaintyPrior(),),
    ),
    Preset(
        "learn2pd",
        "Bao et al. 2025 (Learn2PD), arXiv:2509.25188",
        **_FULL,
        rule="quota",
        block_length=32,
        policies=(LearnedFilter(),),
        needs="a trained filter, head=",
    ),
    Preset(
        "learned-commit",
        "Jazbec et al. 2025 (Learning Unmasking Policies), arXiv:2512.09106; greedy",
        **_FULL,
        rule="threshold",
        block_length=32,
        policies=(LearnedCommit(),),
        needs="a trained policy, head=",
    ),
    Preset(
        "streaming-dllm",
        "Xiao et al. 2026 (Streaming-dLLM), arXiv:2601.17917",
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
        block_length=64,
        refresh_interval=8,
    ),
    Preset(
        "entropy-cache",
        "after the abstract of Cheong et al. 2026 (EntropyCache), arXiv:2603.18489",
        "approximate: keys of decoded positions are as old as the last forward of everything",
        "full",
        "scattered",
        rule="quota",
        block_length=32,
        policies=(EntropyRefresh(),),
    ),
    # Four drafts for LLaDA; for Dream the authors take eight.
    Preset(
        "freedave",
        _FREEDAVE,
        "exact: same tokens as one token per step with the dual cache",
        "full",
        "dual",
        rule="quota",
        block_length=32,
        drafts=4,
    ),
    Preset(
        "freedave-block",
        _FREEDAVE,
        "exact: same tokens as one token per step",
        "block",
        "commit",
        last_block="whole",
        rule="quota",
        drafts=8,
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ROWS}

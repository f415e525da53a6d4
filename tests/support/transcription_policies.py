"""The acceleration policies for tests/decoding/test_transcriptions.py: what each policy draws at random, and which
transcription answers for it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from transcription_cases import Decoder, Options, Transcription, only, plus, some
from transcriptions import blockwise, policies_cache, policies_exit, policies_revise, policies_select, speculation
from transcriptions.common import Model, Row, Settings

LOW = (0.1, 0.2, 0.3, 0.5, 0.8)
THRESHOLD = (0.85, "threshold", LOW)
CACHE = (0.3, "cache", ("prefix", "dual"))
STEPS = (0.7, "steps_per_block", (None, 1, 2, 3, 5, 7))


def sharp_filter(confidence: torch.Tensor) -> torch.Tensor:
    """A learned filter that no one trained: [B, W] -> [B, W]. The filter looks at neighbours, so that a shifted lane
    shows."""
    around = torch.nn.functional.pad(confidence.double(), (1, 1))
    return torch.sigmoid(15 * (confidence.double() - 0.3 * around[:, :-2] - 0.5 * around[:, 2:])).float()


def sharp_policy(confidence: torch.Tensor, eligible: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """A learned policy that no one trained: confidences and what is masked [B, W], time [B] -> [B, W]. All three
    matter."""
    masks = torch.nn.functional.pad(eligible.double(), (1, 1))
    around = 0.1 * masks[:, :-2] + 0.2 * masks[:, 2:]
    return torch.sigmoid(15 * (confidence.double() - around - 0.1 + 0.5 * time[:, None].double())).float()


def transcribed(decode: Callable[..., Row], **fixed: Any) -> Transcription:
    """A transcription that takes the options by name. What the preset calls `steps_per_block` the transcription calls
    `steps`, and None is one token per step; a `block_length` of None is all from the first mask on."""

    def transcribe(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
        o = dict(o)
        if "steps_per_block" in o:
            masks = [p for p, token in enumerate(canvas) if token == settings.mask_id]
            o["steps"] = o.pop("steps_per_block") or o["block_length"] or len(canvas) - min(masks, default=0)
        return decode(model, canvas, settings, **o, **fixed)

    return transcribe


def learned(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    head = o["head"]
    o = o | {"head": lambda confidence: head(torch.tensor([confidence]))[0].tolist()}
    return transcribed(policies_select.decode_learn2pd)(model, canvas, settings, o, diffusion)


def committed(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    head = o["head"]
    o = o | {"head": lambda *seen: head(*(torch.tensor([x]) for x in seen))[0].tolist()}
    return transcribed(policies_select.decode_learned_commit)(model, canvas, settings, o, diffusion)


def drafted(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    row = speculation.decode_freedave(model, canvas, settings, **o)
    again = Model(model.network, model.previous, model.isolated)
    static = blockwise.decode_refreshed(
        again,
        canvas,
        dataclasses.replace(settings, stop="never"),
        rule="quota",
        cache="dual",
        block_length=o["block_length"],
    )
    return lossless(row, static)


def drafted_blocks(model: Model, canvas: list[int], settings: Settings, o: Options, diffusion: Any) -> Row:
    blocks = {
        "block_length": diffusion.block_length,
        "alignment": diffusion.block_alignment,
        "causal_prefix": diffusion.causal_prefix,
    }
    row = speculation.decode_freedave_block(model, canvas, settings, **blocks, **o)
    return lossless(
        row,
        blockwise.decode_block_causal(
            model, canvas, dataclasses.replace(settings, stop="never"), rule="quota", **blocks
        ),
    )


def lossless(row: Row, static: Row) -> Row:
    """The row, if everything that it wrote is what the static decoder writes there, in at most as many forwards."""
    assert all(mine in (theirs, row.settings.mask_id) for mine, theirs in zip(row.tokens, static.tokens)), (
        row.tokens,
        static.tokens,
    )
    assert row.nfe <= static.nfe
    return row


def quota_or_threshold(rng: random.Random) -> Options:
    if rng.random() < 0.5:
        return some(rng, 0.7, "steps_per_block", (None, 1, 2, 3, 5, 7))
    return {"rule": "threshold", **some(rng, 0.9, "threshold", LOW), **some(rng, 0.3, "inclusive", (True, False))}


def curve(rng: random.Random) -> Options:
    options = some(rng, 0.6, "curve", ("linear", "cosine", "exponential"))
    return options | (some(rng, 0.5, "rate", (1.0, 8.0)) if options.get("curve") == "exponential" else {})


QUOTA = {"steps_per_block": None}
REVISED = {"stop": "after_block"}
REVISING: Any = {"stops": ("never", "after_block")}

REGISTRY: dict[str, Decoder] = {
    "eb-sampler": Decoder(
        "full",
        {},
        only(
            (0.85, "entropy_bound", (0.3, 1.5, 4.0, 8.0)),
            (0.4, "score", ("confidence", "margin", "neg_entropy")),
            (0.2, "min_unmask", (1, 2, 3)),
            CACHE,
        ),
        transcribed(policies_select.decode_eb_sampler),
    ),
    "klass": Decoder(
        "full",
        QUOTA,
        only(
            (0.9, "threshold", (0.05, 0.1, 0.2, 0.4)),
            (0.9, "kl_threshold", (0.01, 0.1, 0.3, 1.0)),
            (0.5, "kl_history", (1, 2, 3)),
            (0.4, "steps_per_block", (2, 3, 5)),
            CACHE,
        ),
        transcribed(policies_select.decode_klass),
        block_length=64,
    ),
    "ccd": Decoder(
        "full",
        QUOTA,
        only((0.6, "steps_per_block", (1, 3, 6, 8, 9)), CACHE),
        transcribed(policies_select.decode_ccd),
        block_length=None,
    ),
    "ccd-ds": Decoder(
        "full",
        QUOTA,
        only((0.6, "steps_per_block", (1, 3, 6, 8, 9)), CACHE),
        transcribed(policies_select.decode_ccd, dynamic=True),
        block_length=None,
    ),
    "local-leap": Decoder(
        "full",
        {},
        only(
            (0.9, "threshold", (0.2, 0.3, 0.5)),
            (0.9, "relaxed_threshold", (0.05, 0.1, 0.2)),
            (0.7, "distance", (1, 2, 3)),
            CACHE,
        ),
        transcribed(policies_select.decode_local_leap),
    ),
    "certainty-prior": Decoder(
        "full",
        QUOTA,
        plus(quota_or_threshold, (0.6, "sigma", (0.7, 2.0, 20.0)), CACHE),
        transcribed(policies_select.decode_certainty_prior),
    ),
    "learn2pd": Decoder(
        "full",
        {**QUOTA, "head": sharp_filter},
        only((1.0, "head", (sharp_filter,)), (0.8, "accept_threshold", (0.5, 0.7, 0.9)), (0.7, "eotp", (True,)), STEPS),
        learned,
    ),
    "learned-commit": Decoder(
        "full",
        {"head": sharp_policy},
        only((1.0, "head", (sharp_policy,)), (0.8, "accept_threshold", (0.3, 0.7, 0.9)), CACHE),
        committed,
    ),
    "prophet": Decoder(
        "full",
        QUOTA,
        only(
            (0.9, "gap_thresholds", ((3.0, 1.0, 0.3), (2.0, 2.0, 0.5), (1.5, 0.8, 0.2), (6.0, 4.0, 2.0))),
            (0.6, "answer_start", (0, 1, 4, 9)),
            STEPS,
        ),
        transcribed(policies_exit.decode_prophet),
    ),
    "sched": Decoder(
        "full",
        QUOTA,
        plus(
            curve,
            (0.9, "high", (1.0, 2.0, 4.0)),
            (0.9, "low", (0.1, 0.2, 0.5)),
            (0.6, "reduce", ("mean", "median", "quantile", "min")),
            (0.4, "min_progress", (0.3, 0.6, 0.9)),
            (0.4, "patience", (0, 1, 2)),
            (0.7, "max_change", (0.2, 0.5, 1.0)),
            STEPS,
        ),
        transcribed(policies_exit.decode_sched),
    ),
    "rcr": Decoder(
        "full",
        {**QUOTA, **REVISED, "greedy_filters": True},
        only(STEPS, (0.3, "score", ("confidence", "margin", "neg_entropy"))),
        transcribed(policies_revise.decode_rcr),
        block_length=None,
        **REVISING,
    ),
    "saber": Decoder(
        "full",
        REVISED,
        only((0.5, "min_unmask", (1, 2, 3, 4))),
        transcribed(policies_revise.decode_saber),
        block_length=None,
        **REVISING,
    ),
    "wino": Decoder(
        "full",
        REVISED,
        only((0.95, "threshold", (0.05, 0.1, 0.2, 0.3)), (0.8, "verify_threshold", (0.1, 0.3, 0.5, 0.7))),
        transcribed(policies_revise.decode_wino),
        rows=("self",),
        block_length=128,
        **REVISING,
    ),
    "streaming-dllm": Decoder(
        "full",
        {},
        only(
            THRESHOLD, (0.5, "alpha", (0.0, 0.5, 0.9)), (0.9, "horizon", (0, 1, 2, 3, 6)), (0.2, "min_unmask", (1, 2))
        ),
        transcribed(policies_cache.decode_streaming),
    ),
    "dpad": Decoder(
        "full",
        {},
        only(THRESHOLD, (0.9, "horizon", (2, 3, 5, 9, 14)), (0.2, "inclusive", (True, False))),
        transcribed(policies_cache.decode_dpad),
    ),
    "freecache": Decoder(
        "full", {}, only(THRESHOLD, (0.2, "inclusive", (True, False))), transcribed(policies_cache.decode_freecache)
    ),
    "dkv-cache": Decoder(
        "full",
        QUOTA,
        only(STEPS, (0.7, "refresh_interval", (2, 3, 4))),
        transcribed(policies_cache.decode_dkv_cache),
        block_length=64,
    ),
    "entropy-cache": Decoder(
        "full",
        QUOTA,
        only(STEPS, (0.9, "refresh_entropy", (0.5, 1.0, 2.0, 3.0))),
        transcribed(policies_cache.decode_entropy_cache),
    ),
    "freedave": Decoder("full", {}, only((0.7, "drafts", (2, 3, 6, 8))), drafted, rows=("self",), sampled=False),
    "freedave-block": Decoder(
        "block",
        {"drafts": 8},
        only((0.7, "drafts", (2, 3, 6, 8))),
        drafted_blocks,
        rows=("self",),
        sampled=False,
        last_block="whole",
        causal_prefix=(False, False, True),
    ),
}

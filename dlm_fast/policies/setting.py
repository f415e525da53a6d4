"""What holds for a whole decode: how it draws, and the facts that a policy may read of it."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a batch draws, and the numbers of its rule. Device tensors, so that a captured step serves every request.

    Attributes:
        temperature: [B] fp32, 0 = greedy.
        seed: [1] int64 random seed.
        request: [B] int32 index that keys a row's noise.
        banned: [K] int64 ids that are never drawn; the mask id is the first of them.
        eos: [E] int64 ids that end a text.
        no_eos_before: [B] int32 first position that may hold an EOS; None where no row has such a rule.
        value: [B] fp32 number that the pass test compares with.
        min_unmask: [B] int32 positions that a step writes at least.
        steps: [B] int32 denoise steps of a block.
        block_length: [B] int32 length of a block.
        max_steps: [B] int32 denoise steps after which a row has stalled.
        transfer: [B, S] fp32 share of the masks that a step of rule "schedule" or "bernoulli" writes; None for other
            rules.
        append_masks: [B] int32 masks at which a pipeline appends a block; None without a pipeline.
        activate_masks: [B] int32 masks at which a pipeline's next block must write a token; None without a pipeline.
        delay: [B] int32 denoise steps between a block's end and its commit, of a cache that delays it; None otherwise.
        top_k: filter of the draws, 0 = off. The host knows this one and the two below.
        top_p: filter of the draws, 1.0 = off.
        draws: whether any row has a temperature above 0.
    """

    temperature: Tensor
    seed: Tensor
    request: Tensor
    banned: Tensor
    eos: Tensor
    no_eos_before: Tensor | None
    value: Tensor
    min_unmask: Tensor
    steps: Tensor
    block_length: Tensor
    max_steps: Tensor
    transfer: Tensor | None
    append_masks: Tensor | None
    activate_masks: Tensor | None
    delay: Tensor | None
    top_k: int
    top_p: float
    draws: bool


@dataclasses.dataclass(frozen=True)
class Setting:
    """The facts of a decode that a policy may read; they hold for all of its steps.

    Attributes:
        preset: the decoder's name, for errors.
        block_length: positions of a block.
        lanes: positions that a step looks at, the most of them where that varies.
        whole_row: whether the lanes begin at `first` and reach to the row's end, instead of being the block's.
        first: [B] int32 position at which a row's first block begins.
        mask_id: id of the mask.
        cached: whether a step may leave positions before the block uncomputed, since their keys are kept.
        block_quota: whether a fixed schedule spreads the block's full length over its steps, and not its masks.
        sampling: how the batch draws.
    """

    preset: str
    block_length: int
    lanes: int
    whole_row: bool
    first: Tensor
    mask_id: int
    cached: bool
    block_quota: bool
    sampling: Sampling

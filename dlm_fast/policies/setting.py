"""What holds for a whole decode: how its rows draw, and the facts of the decode that a policy may read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dlm_kernels import reference
from dlm_kernels.state import columns_of

from .constants import Constants


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a batch draws, and the numbers of its rule.

    The numbers are tensors on the device, so that one captured step serves every request. The last four fields are
    Python values, since they decide which ops a step runs.

    Attributes:
        temperature: [B] fp32 temperature of the draws, 0 = greedy.
        seed: [1] int64 random seed of all rows, or [B] of each.
        request: [B] int32 index that keys a row's noise.
        banned: [K] int64 ids that are never drawn; the first one is the mask id.
        eos: [E] int64 ids that end a text.
        no_eos_before: [B] int32 first position that may hold an EOS; None where no row has min_new_tokens.
        value: [B] fp32 number that the pass test compares a score with.
        min_unmask: [B] int32 smallest number of positions that a step writes.
        steps: [B] int32 denoise steps over which a block's quota is spread.
        block_length: [B] int32 length of a block.
        max_steps: [B] int32 denoise steps after which a row has stalled.
        transfer: [B, S] fp32 share of the masks that a step of rule "schedule" or "bernoulli" writes, 1 from the row's
            last step on; None for other rules.
        append_masks: [B] int32 number of masks in the last block at which a pipeline appends a block; None without a
            pipeline.
        activate_masks: [B] int32 number of masks in a block at which a pipeline's next block must write a token; None
            without a pipeline.
        delay: [B] int32 denoise steps between the end of a block and its commit; None where the cache delays no commit.
        top_k: filter of the draws, 0 = off.
        top_p: filter of the draws, 1.0 = off.
        draws: whether any row has a temperature above 0.
        uniform_scores: the op of the model's backend that draws a number per position.
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
    uniform_scores: Callable[[Tensor, Tensor], Tensor] = reference.uniform_scores

    def of_rows(self, rows: Tensor) -> Sampling:
        """The numbers of some rows [n] int64, in their order."""
        whole = {name: field for name in _WHOLE_NUMBERS if (field := getattr(self, name)) is not None}
        columns = columns_of(torch.stack(list(whole.values())), rows)
        others = {name: field for name in _OTHERS if (field := getattr(self, name)) is not None}
        fields = {name: field.index_select(0, rows) for name, field in others.items()}
        if self.seed.shape[0] > 1:
            fields["seed"] = self.seed.index_select(0, rows)
        return dataclasses.replace(self, **fields, **dict(zip(whole, columns)))

    def put_rows(self, rows: Tensor, part: Sampling) -> None:
        """Writes `part`, the numbers of n rows, over the rows [n] int64; what they have, this one has for all rows."""
        for name in (*_WHOLE_NUMBERS, *_OTHERS, "seed"):
            mine, theirs = getattr(self, name), getattr(part, name)
            if theirs is not None:
                mine.index_copy_(0, rows, theirs.expand(rows.shape[0], *theirs.shape[1:]))

    def seeds(self, count: int) -> Tensor:
        """The seeds of `count` counters of each row, one after another: [1] where all rows have one seed."""
        return self.seed if self.seed.shape[0] == 1 else self.seed.repeat_interleave(count)


# The fields of a `Sampling` that have an entry per row.
_WHOLE_NUMBERS = (
    "request", "no_eos_before", "min_unmask", "steps", "block_length", "max_steps", "append_masks", "activate_masks",
    "delay",
)  # fmt: skip
_OTHERS = ("temperature", "value", "transfer")


@dataclasses.dataclass(frozen=True)
class Setting:
    """The facts of a decode that a policy may read; they are the same in all steps of the decode.

    Attributes:
        preset_name: the decoder's name, for error messages.
        block_length: number of positions in a block.
        lanes: number of positions that a step looks at; the largest number where steps differ.
        whole_row: whether the lanes are the positions from `first` to the row's end, instead of those of the block.
        first: [B] int32 position at which a row's first block begins.
        mask_id: id of the mask.
        cached: whether a step may leave positions before the block uncomputed, since their keys are cached.
        spreads_block: whether a fixed schedule spreads the block's full length over the steps, instead of its masks.
        spreads_evenly: whether the schedule's remainder is spread over all steps, instead of the first ones.
        sampling: how the batch draws.
        constants: tensors of the decode that no step has to make.
    """

    preset_name: str
    block_length: int
    lanes: int
    whole_row: bool
    first: Tensor
    mask_id: int
    cached: bool
    spreads_block: bool
    spreads_evenly: bool
    sampling: Sampling
    constants: Constants

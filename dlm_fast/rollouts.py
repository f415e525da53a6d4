"""What a trainer reads of decoded rows: their trajectories as tensors, and the canvas before any step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .limits import MAX_WHOLE, shown, whole
from .output import Completion


class Trajectories(NamedTuple):
    """How R rows were written, as tensors on the host; rows are padded behind their canvas to the longest one, L.

    Attributes:
        tokens: [R, L] int64 canvas at the end, the prompt included; a position that no step wrote holds the mask.
        unmask_step: [R, L] int32 the row's denoise step that wrote the token; -1 = given, never written, or padding.
        confidence: [R, L] fp32 probability of the token when it was written; 0 = no step wrote one.
        written: [R, L] bool, a step wrote the token; also behind an EOS, where a step wrote there.
        prompt_length: [R] int64 position at which the response begins.
        end: [R] int64 position behind the response, which is that of its EOS if there is one.
        length: [R] int64 positions of the canvas.
        steps: [R] int64 denoise steps up to the last one that wrote a token which is still there.
        index: [R] int64 number of the request: rows of one number are the group of one prompt.

    `confidence` is of the distribution that the preset measures. Where `generate` had temperature 1 or a preset that is
    not tempered (`Preset.tempered`), and no top_k or top_p, it is the model's own, with the mask's share in the sum.
    """

    tokens: Tensor
    unmask_step: Tensor
    confidence: Tensor
    written: Tensor
    prompt_length: Tensor
    end: Tensor
    length: Tensor
    steps: Tensor
    index: Tensor

    def before(self, step: int | Tensor, mask_token_id: int) -> Tensor:
        """[R, L] int64 canvases before a denoise step: what step `step` or a later one wrote is a mask.

            canvas[r, j] = mask_token_id where unmask_step[r, j] >= step[r], else tokens[r, j]

        `unmask_step == step` says what the step then wrote. Canvases before 0 are the prompts with masks behind them;
        a row that has fewer steps is whole.

        They are the canvases that the decoder saw, for every preset that leaves a token where it was written. Where a
        commit writes a block's first token (`Preset.first_token`), that token has the number of the step after it, and
        so is a mask in the canvas before that step, which had it already. A preset that takes tokens back
        (`Preset.families` names "revise" or "edit") notes the last write of a position only: what it wrote there before
        is a mask here. With stop rule "fill" what follows the first EOS is that EOS here, whatever was written there
        first.

        Args:
            step: number of a denoise step, or one for each row as [R] of integers.
            mask_token_id: `handle_of(model).diffusion.mask_token_id`.
        Raises:
            TypeError, ValueError: a step is no whole number >= 0, or there is not one for each row.

        Trainers that put a loss on the steps that were taken need these canvases: MDPO, arXiv:2508.13148; TraceRL,
        arXiv:2509.06949, which may join neighbouring steps. Those that mask at random need `written` alone:
        coupled GRPO, arXiv:2506.20639; GDPO, arXiv:2510.08554.
        """
        whole("before", "mask_token_id", mask_token_id, 0)
        if isinstance(step, Tensor):
            if step.dtype.is_floating_point or step.dtype.is_complex or step.dtype == torch.bool:
                raise TypeError(f"before: step must be of integers, got {step.dtype}")
            if step.shape != self.length.shape or bool((step < 0).any()):
                raise ValueError(
                    f"before: step must be [{len(self.length)}], one >= 0 for each row, got shape {tuple(step.shape)}"
                )
            step = step.to(self.unmask_step.device)[:, None]
        else:
            whole("before", "step", step, 0)
        return torch.where(self.unmask_step >= step, mask_token_id, self.tokens)


def trajectories(completions: Sequence[Completion], *, pad_token_id: int = 0) -> Trajectories:
    """The trajectories of decoded rows, row by row in their order.

    Args:
        completions: what `Session.generate` gave. A request that could not be decoded (finish "error" and an empty
            canvas) is a row of no positions; leave such rows out first where a group must be whole.
        pad_token_id: what `tokens` holds behind a row's canvas.
    Raises:
        TypeError: an item is no `Completion`.  ValueError: pad_token_id is below 0.
    """
    whole("trajectories", "pad_token_id", pad_token_id, 0, MAX_WHOLE)
    rows = list(completions)
    for row in rows:
        if not isinstance(row, Completion):
            raise TypeError(f"trajectories: completions must be Completions, got {shown(row)}")

    def padded(name: str, dtype: torch.dtype, value: int) -> Tensor:
        parts = [getattr(row, name) for row in rows]
        out = torch.full((len(rows), max(map(len, parts), default=0)), value, dtype=dtype)
        for line, part in zip(out, parts):
            line[: len(part)] = part
        return out

    def numbers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    unmask_step = padded("unmask_step", torch.int32, -1)
    return Trajectories(
        tokens=padded("canvas", torch.int64, pad_token_id),
        unmask_step=unmask_step,
        confidence=padded("confidence", torch.float32, 0),
        written=unmask_step >= 0,
        prompt_length=numbers([row.prompt_length for row in rows]),
        end=numbers([row.prompt_length + len(row.ids) for row in rows]),
        length=numbers([len(row.canvas) for row in rows]),
        steps=numbers([int(row.unmask_step.max()) + 1 if len(row.canvas) else 0 for row in rows]),
        index=numbers([row.index for row in rows]),
    )

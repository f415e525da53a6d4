"""From a checked batch to how its rows draw, and the numbers of its decoder's rule, as tensors."""

from __future__ import annotations

import bisect
from typing import Any

import torch
from torch import Tensor

from .decoding.plan import Plan, steps_of
from .policies import Sampling
from .requests import Requests


def sampling_of(batch: Requests, plan: Plan, device: torch.device) -> Sampling:
    """How a batch draws, and the numbers of its rule, as tensors on the device."""
    preset = plan.preset
    B = len(batch.canvases)

    def rows(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).expand(B).contiguous().to(device)

    # 1. First positions of an EOS, and the number of steps that fill a block.
    no_eos_before = [p + m for p, m in zip(batch.prompt_lengths, batch.min_new_tokens)]
    spans = [len(canvas) - start for canvas, start in zip(batch.opened, plan.first.tolist())]
    steps = steps_of(batch.opened, plan)

    # 2. The share of the masks that each step writes: a time falls from 1 to schedule_eps, and the masks with it; the
    # last step writes them all.
    transfer = None
    if preset.by_share:
        transfer = torch.ones(B, plan.steps, dtype=torch.float32)
        for b, S in enumerate(steps):
            t = torch.linspace(1, preset.schedule_eps, S + 1, dtype=torch.float32)
            transfer[b, : S - 1] = (1 - t[1:] / t[:-1])[: S - 1]
        transfer = transfer.to(device)

    # 3. The steps after which a row has stalled. This is a safety net and not a schedule: the bounds of every policy
    # (tests/decoding/test_policy_bounds.py) are below these numbers.
    edits = max((getattr(policy, "max_post_edits", 0) for policy in preset.policies), default=0)
    steps_of_block = 2 * max(plan.block_length, *steps) + edits + 8
    max_steps = [min(steps_of_block * (-(-span // plan.block_length) + 1), 2**30) for span in spans]

    def masks_at(share: float) -> int | None:
        """The largest number of masks at which a block of the full length is filled to `share`."""
        length = plan.block_length
        return bisect.bisect_right(range(length + 1), -share, key=lambda masks: -(length - masks) / length) - 1

    # 4. Everything on the device.
    pipeline = preset.pipeline
    return Sampling(
        temperature=rows(batch.temperature, torch.float32),
        seed=torch.tensor(
            batch.seeds[:1] if len(set(batch.seeds)) < 2 else batch.seeds, dtype=torch.int64, device=device
        ),
        request=rows(batch.request_ids, torch.int32),
        banned=torch.tensor([plan.mask_id, *batch.banned_token_ids], dtype=torch.int64, device=device),
        eos=torch.tensor(batch.eos_token_ids, dtype=torch.int64, device=device),
        no_eos_before=rows(no_eos_before, torch.int32) if any(batch.min_new_tokens) else None,
        value=rows(preset.value, torch.float32),
        min_unmask=rows(1 if preset.min_unmask is None else preset.min_unmask, torch.int32),
        steps=rows(steps, torch.int32),
        block_length=rows(plan.block_length, torch.int32),
        max_steps=rows(max_steps, torch.int32),
        transfer=transfer,
        append_masks=rows(masks_at(preset.append_threshold), torch.int32) if pipeline else None,
        activate_masks=rows(masks_at(preset.activate_threshold), torch.int32) if pipeline else None,
        delay=rows(preset.commit_delay, torch.int32) if plan.cache.commit_selects else None,
        top_k=batch.top_k,
        top_p=batch.top_p,
        draws=any(t > 0 for t in batch.temperature),
    )

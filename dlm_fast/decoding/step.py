"""One denoise step: what is captured, profiled and tested. Fixed shapes, no host read, everything it changes in
`Decode`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlm_kernels import RowState, Window
from dlm_kernels.state import COMMIT, REFRESH

from ..patching import PatchHandle
from ..policies import Choice, View
from ..policies.base import Lanes, Memory
from .drafts import Drafts
from .measure import Sampling, lanes_view, measure, opening, rule_choice, stats_of
from .plan import Plan, lane_start, request_refresh, selects_of, window_of


@dataclasses.dataclass(frozen=True)
class Decode:
    """Everything that a step reads and writes: a model, a plan, and device buffers that live as long as the decode.

    Attributes:
        memory: the buffers of every policy. history: the logits of the step before, where a policy compares with them.
        last_hidden: [B, d] hidden state of the position before every row's window, for models that predict the next
            position.
        drafts: the source of speculation, None without.
    """

    handle: PatchHandle
    plan: Plan
    state: RowState
    sampling: Sampling
    cache: Any
    memory: tuple[Memory, ...]
    history: dict[str, Tensor] | None
    last_hidden: Tensor | None
    drafts: Drafts | None


def denoise_step(
    decode: Decode, kind: str, *, width: int | None = None, lanes: int | None = None, drafts: int = 1
) -> None:
    """One forward and what follows from it, in place, with no host read: window -> model -> confidence -> policies ->
    unmask.

    Args:
        kind: "refresh" (prefill or refresh) or "denoise"; rows that need the other kind are left unchanged.
        width, lanes: of the bucket, where they vary (`Plan.varies`). drafts: canvases per row.
    """
    plan, state, sampling = decode.plan, decode.state, decode.sampling
    window = window_of(plan, state, sampling, kind, width)
    view_lanes = lanes_view(plan, state, lane_start(plan, state), lanes or plan.lanes)
    takes_part = window.q_len > 0
    selects = takes_part & selects_of(plan, state, kind)

    ready = held = None
    canvases, query_len = state.tokens, window.q_len
    if decode.drafts is not None:
        ready = decode.drafts.ready(state, kind) & selects
        held = decode.drafts.tokens(decode.handle.ops, view_lanes, ready, drafts)
        canvases = _with_lanes(canvases, view_lanes.position, held)
        query_len = query_len * torch.where(ready & ~decode.drafts.suspended(), drafts, 1).int()
    if plan.preset.cfg_scale:
        query_len = 2 * query_len
    hidden = _forward(decode, window, canvases, drafts)
    first_branch = (
        hidden[: len(canvases)] if plan.preset.cfg_scale else hidden.view(-1, drafts, *hidden.shape[1:])[:, 0]
    )

    stats: dict[str, Any] = {}
    if kind == "refresh" and plan.preset.cache == "commit":
        choice, view = nothing_chosen(view_lanes), None
    else:
        logits = _lane_logits(decode, window, hidden, view_lanes.position, drafts)
        needed = _needed(decode, view_lanes, selects, held)

        def view_with(bias: tuple[Tensor, Tensor] | None = None) -> View:
            history = decode.history if bias is None else None
            measured = measure(
                decode.handle.ops,
                plan,
                state,
                sampling,
                logits,
                view_lanes,
                needed,
                history=history,
                bias=bias,
                branches=drafts,
            )
            return View(
                plan=plan, state=state, memory={}, selects=selects, **vars(view_lanes), **measured, sampling=sampling,
                logits=logits.unflatten(0, (-1, view_lanes.position.shape[1])), restate=lambda ids, values: view_with((ids, values)),
            )  # fmt: skip

        view = view_with()
        if plan.preset.shadow:
            view = dataclasses.replace(view, back=_shadow_confidence(decode, window, hidden, view_lanes, needed))
        if decode.drafts is not None:
            choice = _accept(decode, view, ready, held)
        else:
            choice = rule_choice(plan, view)
        for policy, memory in zip(plan.preset.policies, decode.memory):
            choice = policy.choose(dataclasses.replace(view, memory=memory), choice)
        if kind == "refresh" and decode.drafts is None:
            choice = opening(plan, view, choice)
        stats["stat_error"] = view.error.view(-1, drafts, view.error.shape[1]).amax(1)
    if plan.preset.seeded:
        stats |= _seed(decode, window, first_branch)
    fields = {name: value for name, value in vars(choice).items() if name != "exact" and value is not None}
    written = decode.handle.ops.unmask(
        state,
        plan.preset.prefill_rule() if view is None else plan.preset.unmask_rule(exact=choice.exact),
        kind=kind,
        query_len=query_len,
        steps=sampling.steps,
        block_length=sampling.block_length,
        mask_id=plan.diffusion.mask_token_id,
        stop_ids=sampling.eos,
        lane_start=view_lanes.position[:, 0].contiguous(),
        max_steps=sampling.max_steps,
        append_masks=sampling.append_masks,
        activate_masks=sampling.activate_masks,
        delay=sampling.delay,
        **fields,
        **stats,
    )
    refreshed = None
    if view is not None:
        for policy, memory in zip(plan.preset.policies, decode.memory):
            after = dataclasses.replace(view, memory=memory)
            policy.after(after, choice, written)
            more = policy.refreshes(after, choice, written)
            if more is not None:
                refreshed = more if refreshed is None else refreshed | more
    request_refresh(plan, state, takes_part, refreshed)
    if decode.last_hidden is not None:
        _keep_last_hidden(decode, window, first_branch)


def nothing_chosen(lanes: Lanes) -> Choice:
    """The choice of a prefill: it writes no token."""
    B, W = lanes.position.shape
    device = lanes.position.device
    none = torch.zeros(B, W, dtype=torch.float32, device=device)
    rows = {
        "value": torch.zeros(B, dtype=torch.float32, device=device),
        "min_unmask": torch.zeros(B, dtype=torch.int32, device=device),
    }
    return Choice(pred=torch.zeros(B, W, dtype=torch.int64, device=device), score=none, confidence=none, **rows)


def _with_lanes(tokens: Tensor, position: Tensor, held: Tensor) -> Tensor:
    """[B * D, L] canvases that hold `held` [B, D, W] at the lanes."""
    (B, L), (_, D, W) = tokens.shape, held.shape
    place = torch.where(position < L, position, L).long()[:, None].expand(B, D, W)
    canvases = torch.nn.functional.pad(tokens, (0, 1))[:, None].expand(B, D, L + 1)
    return canvases.scatter(2, place, held)[:, :, :L].flatten(0, 1)


def _forward(decode: Decode, window: Window, canvases: Tensor, drafts: int) -> Tensor:
    """Hidden states of the window [B, W, d]; [B * drafts, W, d] for drafts; both copies [2 * B, W, d] for guidance."""
    plan, state, handle = decode.plan, decode.state, decode.handle
    if drafts > 1:
        # Drafts read their row's cache and leave storing to the first.
        first = torch.arange(canvases.shape[0], device=canvases.device) % drafts == 0
        window = repeat_rows(window, lambda x: x.repeat_interleave(drafts, 0))
        window = dataclasses.replace(window, kv_slot=torch.where(first[:, None], window.kv_slot, -1))
    if plan.preset.cfg_scale:
        given = (state.unmask_step < 0) & (
            torch.arange(state.tokens.shape[1], device=canvases.device) < state.canvas_len[:, None]
        )
        canvases = torch.cat([canvases, torch.where(given, plan.diffusion.mask_token_id, canvases)])
        rows = window.cache_row
        window = repeat_rows(window, lambda x: torch.cat([x, x]))
        window = dataclasses.replace(window, cache_row=torch.cat([rows, rows + rows.shape[0]]))
    input_ids = canvases.gather(1, window.q_pos.long())
    if window.mode == "shadow":
        input_ids = torch.where(window.q_block >= plan.shadow_block, plan.diffusion.mask_token_id, input_ids)
    return handle.window_hidden(input_ids, window, decode.cache if plan.capacity else None)


def repeat_rows(window: Window, repeat: Callable[[Tensor], Tensor]) -> Window:
    """The window with `repeat` applied to the rows of every tensor."""
    return dataclasses.replace(
        window, **{name: repeat(tensor).contiguous() for name, tensor in window.tensors().items()}
    )


def _index_of(plan: Plan, window: Window, position: Tensor, L: int) -> Tensor:
    """[B, N] where the window computes a position (not its shadow), W where it does not."""
    B, W = window.q_pos.shape
    lane = torch.arange(W, device=position.device).expand(B, W)
    live = (lane < window.q_len[:, None]) & (window.q_block < plan.shadow_block if window.mode == "shadow" else True)
    place = torch.where(live, window.q_pos, L).long()
    index = torch.full((B, L + 1), W, dtype=torch.int64, device=position.device).scatter(1, place, lane)
    index[:, L] = W
    return index.gather(1, torch.where((position >= 0) & (position < L), position, L).long())


def _rows_of(decode: Decode, window: Window, hidden: Tensor, position: Tensor) -> Tensor:
    """Hidden states [B, N, d] of the rows that predict `position` [B, N]."""
    L = decode.state.tokens.shape[1]
    if decode.plan.previous:
        # Position 0 has no row before it. What the window does not hold is the position before it, kept from an earlier
        # forward.
        position = torch.where(position > 0, position - 1, position)
        hidden = torch.cat([hidden, decode.last_hidden[:, None]], 1)
    index = _index_of(decode.plan, window, position, L).clamp(max=hidden.shape[1] - 1)
    return hidden.gather(1, index[..., None].expand(*index.shape, hidden.shape[2]))


def _lane_logits(decode: Decode, window: Window, hidden: Tensor, position: Tensor, drafts: int) -> Tensor:
    """Logits [B * drafts * lanes, V] that predict the lanes; with guidance u + (scale + 1) (c - u), u without the given
    tokens."""
    handle, preset = decode.handle, decode.plan.preset

    def logits_of(hidden: Tensor) -> Tensor:
        return handle.adapter.head(handle.model, _rows_of(decode, window, hidden, position).flatten(0, 1))

    if drafts > 1:
        branches = hidden.view(-1, drafts, *hidden.shape[1:]).unbind(1)
        rows = torch.stack([_rows_of(decode, window, branch, position) for branch in branches], 1)
        return handle.adapter.head(handle.model, rows.flatten(0, 2))
    if not preset.cfg_scale:
        return logits_of(hidden)
    conditional, unconditional = (logits_of(half) for half in hidden.chunk(2))
    return unconditional + (preset.cfg_scale + 1) * (conditional - unconditional)


def _needed(decode: Decode, lanes: Lanes, selects: Tensor, held: Tensor | None) -> Tensor:
    """[B, W] (or [B * drafts, W]) bool: the lanes whose statistics anybody reads."""
    needed = lanes.eligible
    for policy in decode.plan.preset.policies:
        needed = needed | policy.needed(decode.plan, lanes, decode.state)
    needed = needed & selects[:, None]
    if held is not None:
        needed = (needed[:, None] & (held == decode.plan.diffusion.mask_token_id)).flatten(0, 1)
    return needed


def _shadow_confidence(decode: Decode, window: Window, hidden: Tensor, lanes: Lanes, needed: Tensor) -> Tensor:
    """[B, W] fp32 probability of the held token at written lanes, predicted by the shadow of its position."""
    # The shadow of the block's j-th position lies j behind the canvas; block lanes begin at the block.
    length = window.q_len - (decode.state.block_end - decode.state.block_start)
    index = (
        (length[:, None] + torch.arange(lanes.position.shape[1], device=hidden.device))
        .clamp(0, hidden.shape[1] - 1)
        .long()
    )
    rows_hidden = hidden.gather(1, index[..., None].expand(*index.shape, hidden.shape[2])).flatten(0, 1)
    logits = decode.handle.adapter.head(decode.handle.model, rows_hidden)
    written = (lanes.written & needed).flatten()
    rows = torch.where(written, torch.arange(written.shape[0], dtype=torch.int32, device=hidden.device), -1).int()
    query = torch.where(written, lanes.tokens.flatten(), 0)
    stats = stats_of(
        decode.handle.ops, logits, rows=rows, outputs=("query",), banned=decode.sampling.banned, query=query
    )
    return stats.query_confidence.view(lanes.position.shape)


def _accept(decode: Decode, view: View, ready: Tensor, held: Tensor) -> Choice:
    """The choice of a step that verified the drafts `held` [B, D, W]."""
    score = dataclasses.replace(view, position=view.position.repeat_interleave(held.shape[1], 0)).score(
        decode.plan.preset.score
    )
    by_draft = (x.view(held.shape) for x in (view.token, score, view.confidence))
    mask_id = decode.plan.diffusion.mask_token_id
    return decode.drafts.choose(decode.handle.ops, view, ready, view.selects, held, *by_draft, mask_id)


def _seed(decode: Decode, window: Window, hidden: Tensor) -> dict[str, Tensor]:
    """The most likely token after the window's last position, per row: what opens the next block after a prefill or
    commit."""
    sampling = decode.sampling
    last = (window.q_len - 1).clamp(min=0).long()
    rows_hidden = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
    logits = decode.handle.adapter.head(decode.handle.model, rows_hidden)
    opens = (window.q_len > 0) & ((decode.state.phase == REFRESH) | (decode.state.phase == COMMIT))
    rows = torch.where(opens, torch.arange(opens.shape[0], dtype=torch.int32, device=hidden.device), -1).int()
    banned = sampling.banned
    if sampling.no_eos_before is not None:
        position = window.q_pos.gather(1, last[:, None])[:, 0] + 1
        early = torch.where((position < sampling.no_eos_before)[:, None], sampling.eos, -1)
        banned = torch.cat([banned.expand(opens.shape[0], -1), early], -1)
    stats = stats_of(decode.handle.ops, logits, rows=rows, outputs=(), banned=banned)
    return {"seed": stats.token, "seed_confidence": stats.confidence}


def _keep_last_hidden(decode: Decode, window: Window, hidden: Tensor) -> None:
    """Keeps the hidden state of the position before every row's region, if this forward computed it."""
    state = decode.state
    index = _index_of(decode.plan, window, state.block_start[:, None] - 1, state.tokens.shape[1])
    inside = (index < hidden.shape[1]) & (window.q_len > 0)[:, None]
    found = hidden.gather(1, index.clamp(max=hidden.shape[1] - 1)[..., None].expand(-1, 1, hidden.shape[2]))[:, 0]
    decode.last_hidden.copy_(torch.where(inside, found, decode.last_hidden))

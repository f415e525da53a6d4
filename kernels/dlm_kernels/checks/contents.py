"""What the debug mode reads of an accepted call (`debug`): the rules that shapes and dtypes cannot show, each written
once for the reference, the ops for a CPU and the Triton kernels.

`confidence`, `uniform_scores` and the ops of a layer have a result for every number, and so nothing to look for. A row
that an op leaves alone, and a lane that an op does not use, may hold anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rules import Kind, UnmaskInputs, UnmaskRule
from ..state import COMMIT, DENOISE, DONE, REFRESH, ROW_FIELDS, DraftSource, RowState
from ..window import Window, capacity

# Token ids lie below this.
MAX_ID = 2**31
# Fields of a state that count something.
_COUNTS = ("block_masks", "block_step", "step", "nfe", "query_tokens", "error")


def _can_be_read(tensor: Tensor) -> bool:
    """Whether the host can read the tensor now."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _read(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _refuse(op: str, field: str, rule: str, values: np.ndarray, is_bad: np.ndarray, unit: str = "row") -> None:
    """Raises ValueError for the first of the values that is bad, if one is. The first index counts units, the others
    places within one."""
    if not is_bad.any():
        return
    index = tuple(np.argwhere(np.broadcast_to(is_bad, values.shape))[0].tolist())
    place = f", place {', '.join(map(str, index[1:]))}" if len(index) > 1 else ""
    raise ValueError(f"{op}: {field} must be {rule}, got {field}={values[index]} in {unit} {index[0]}{place}")


def read_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    window: Window,
    *,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    sliding_window: int | None,
    **_: Any,
) -> None:
    """Lengths, slots, cache rows and pages in range; a slot is stored once, and by nobody who sees it or lets it be
    seen."""
    if not q.numel() or not _can_be_read(q):
        return
    refuse = functools.partial(_refuse, "block_attention")
    of = {name: _read(tensor) for name, tensor in window.tensors().items()}
    W, q_len, q_block = q.shape[2], of["q_len"], of["q_block"]
    refuse("window.q_len", f"in [0, W] with W={W}", q_len, (q_len < 0) | (q_len > W))
    computed = np.arange(W) < q_len[:, None]
    refuse("window.q_block", "a block or -1", q_block, computed & (q_block < -1))
    if k_cache is None:
        return

    # 1. Every number by itself.
    S_max, table = capacity(k_cache, window), of.get("page_table")
    R = k_cache.shape[0] if table is None else table.shape[0]
    kv_len, cache_row, slot, live = of["kv_len"], of["cache_row"], of["kv_slot"], computed & (q_block >= 0)
    refuse("window.kv_len", f"in [0, S_max] with S_max={S_max}", kv_len, (kv_len < 0) | (kv_len > S_max))
    refuse("window.cache_row", f"in [0, R) with R={R}", cache_row, (cache_row < 0) | (cache_row >= R))
    refuse("window.kv_slot", f"in [0, S_max) with S_max={S_max}, or -1", slot, live & ((slot < -1) | (slot >= S_max)))
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            scale = _read(scale)
            refuse(name, "positive and finite", scale, ~((scale > 0) & (scale < np.inf)), unit="head")

    # 2. Which slots are stored [n], and which are seen [B, S_max].
    every = np.arange(S_max)
    start, end = of["replaced"][:, :1], of["replaced"][:, 1:]
    seen = live.any(1, keepdims=True) & (every < kv_len[:, None]) & ((every < start) | (every >= end))
    if sliding_window is not None:
        seen &= every > kv_len[:, None] - sliding_window
    if "kept" in of:
        seen &= of["kept"]
    rows, places = (live & (slot >= 0)).nonzero()
    stored, row_of_stored = slot[rows, places], cache_row[rows]
    seen_rows, seen_slots = seen.nonzero()
    row_of_seen = cache_row[seen_rows]

    # 3. Where those lie in memory: a number for each place of the cache.
    at, at_seen, places_of_row = row_of_stored, row_of_seen, S_max
    if table is not None:
        places_of_row = k_cache.shape[2]
        at, at_seen = table[at, stored // places_of_row], table[at_seen, seen_slots // places_of_row]
        num_pages, used = k_cache.shape[0], np.zeros(table.shape, dtype=bool)
        used[row_of_stored, stored // places_of_row] = used[row_of_seen, seen_slots // places_of_row] = True
        is_bad = used & ((table < 0) | (table >= num_pages))
        refuse("window.page_table", f"in [0, num_pages) with num_pages={num_pages}", table, is_bad, unit="cache row")
    stored_at = at.astype(np.int64) * places_of_row + stored % places_of_row
    seen_at = at_seen.astype(np.int64) * places_of_row + seen_slots % places_of_row

    # 4. Every number among the others.
    is_bad = np.zeros(slot.shape, dtype=bool)
    order = np.argsort(stored_at, kind="stable")
    again = order[1:][np.diff(stored_at[order]) == 0]
    is_bad[rows[again], places[again]] = True
    refuse("window.kv_slot", "a slot that no other position stores", slot, is_bad)
    is_seen = np.zeros(k_cache.shape[0] * k_cache.shape[2], dtype=bool)
    is_seen[seen_at] = True
    is_bad[rows, places] = is_seen[stored_at]
    refuse("window.kv_slot", "hidden from every row that reads it (kv_len, replaced, kept)", slot, is_bad)


def read_unmask(state: RowState, rule: UnmaskRule, inputs: UnmaskInputs, kind: Kind) -> None:
    """The row's region lies in its canvas, phases are known, counts are not negative, and what may be written are ids
    other than the mask's."""
    if not state.tokens.numel() or not _can_be_read(state.tokens):
        return
    refuse = functools.partial(_refuse, "unmask")
    s = {name: _read(getattr(state, name)) for name in ("tokens", "unmask_step", *ROW_FIELDS)}
    mask_id, L = inputs.mask_id, s["tokens"].shape[1]

    # 1. The state.
    before = "0"
    for name, lowest in (("block_start", 0), ("block_end", s["block_start"]), ("canvas_len", s["block_end"])):
        refuse(name, f"at least {before} and at most L={L}", s[name], (s[name] < lowest) | (s[name] > L))
        before = name
    for name in _COUNTS:
        refuse(name, "at least 0", s[name], s[name] < 0)
    refuse("phase", "REFRESH (0), DENOISE (1), COMMIT (2) or DONE (3)", s["phase"], ~_in(s["phase"], DONE + 1))
    refuse("unmask_step", "a step or -1", s["unmask_step"], s["unmask_step"] < -1)
    refuse("tokens", "in [0, 2^31)", s["tokens"], ~_in(s["tokens"], MAX_ID))

    # 2. What the call is told of all rows.
    query_len, stop_ids = _read(inputs.query_len), _read(inputs.stop_ids)
    refuse("query_len", "at least 0", query_len, query_len < 0)
    refuse("stop_ids", "in [0, 2^31)", stop_ids, ~_in(stop_ids, MAX_ID), unit="place")
    refuse("stop_ids", f"other ids than mask_id={mask_id}", stop_ids, stop_ids == mask_id, unit="place")

    # 3. What may be written: in rows that take part, and of those that choose, in lanes that may be chosen.
    enters = s["phase"] == (REFRESH if kind == "refresh" else COMMIT)
    enters &= (query_len > 0) & (rule.cache == "commit")
    if rule.first_token:
        first = _read(inputs.first_token)
        refuse("first_token", f"in [0, 2^31) and not mask_id={mask_id}", first, enters & ~_is_token(first, mask_id))
    may_be_chosen, in_region = _choosable(s, rule, inputs, kind, query_len, enters)
    pred = _read(inputs.pred)
    refuse("pred", f"in [0, 2^31) and not mask_id={mask_id}", pred, may_be_chosen & ~_is_token(pred, mask_id))
    if rule.renoise:
        refill = _read(inputs.refill)
        refuse("refill", "in [0, 2^31)", refill, in_region & ~_in(refill, MAX_ID))


def _choosable(
    s: dict[str, np.ndarray],
    rule: UnmaskRule,
    inputs: UnmaskInputs,
    kind: Kind,
    query_len: np.ndarray,
    enters: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """[B, W] bool each, of rows that choose: lanes that may receive their prediction, and lanes of the region. A row
    that fails by its statistics or its steps chooses nothing."""
    # 1. The rows.
    phase, start, end = s["phase"], s["block_start"], s["block_end"]
    lane_start = start if inputs.lane_start is None else _read(inputs.lane_start)
    (L, W), selects = (
        (s["tokens"].shape[1], inputs.score.shape[1]),
        phase == (REFRESH if kind == "refresh" else DENOISE),
    )
    if rule.cache == "delayed" and kind == "denoise":
        selects = selects | (phase == COMMIT)
    selects = selects & ~enters & (query_len > 0) & (lane_start <= start) & (end <= lane_start + W)
    if inputs.max_steps is not None:
        selects = selects & (s["step"] < _read(inputs.max_steps))

    # 2. The lanes, as `reference.unmask` says.
    lane = lane_start[:, None] + np.arange(W)
    in_region = (lane >= start[:, None]) & (lane < end[:, None])
    in_canvas = (lane >= 0) & (lane < s["canvas_len"][:, None])
    lane = lane.clip(0, L - 1)
    masked = in_canvas & (np.take_along_axis(s["tokens"], lane, 1) == inputs.mask_id)
    chosen = in_region if rule.renoise else in_region & masked
    if inputs.allowed is not None and not rule.renoise:
        chosen = chosen & _read(inputs.allowed)
    needed = chosen
    if rule.edit or rule.remask != "none":
        written = in_region & (np.take_along_axis(s["unmask_step"], lane, 1) >= 0)
        needed = needed | written
        chosen = chosen | written if rule.edit else chosen
    if inputs.exits is not None:
        needed = needed | masked
        chosen = np.where(_read(inputs.exits)[:, None], in_region if rule.renoise else masked, chosen)
    if inputs.stat_error is not None:
        selects = selects & ~(needed & (_read(inputs.stat_error) != 0)).any(1)
    return chosen & selects[:, None], in_region & selects[:, None]


def read_draft_build(source: DraftSource, tokens: Tensor, eligible: Tensor, ready: Tensor, D: int) -> None:
    """The ids that drafts receive, and those that they keep, are ids."""
    if not tokens.numel() or not _can_be_read(tokens):
        return
    refuse = functools.partial(_refuse, "draft_build")
    held, token, written = _read(tokens), _read(source.token), _read(eligible) & _read(ready)[:, None]
    refuse("tokens", "in [0, 2^31)", held, ~_in(held, MAX_ID))
    refuse("source.token", "in [0, 2^31)", token, written & ~_in(token, MAX_ID))


def read_verify(
    source: DraftSource,
    held: Tensor,
    token: Tensor,
    score: Tensor,
    confidence: Tensor,
    eligible: Tensor,
    ready: Tensor,
    drafting: Tensor,
    selects: Tensor,
    mask_id: int,
) -> None:
    """The ids that are written are ids other than the mask's, and counts are not negative."""
    if not held.numel() or not _can_be_read(held):
        return
    refuse = functools.partial(_refuse, "verify")
    drafts, predicted, own, lanes = (_read(x) for x in (held, token, source.token, eligible))
    has_source, chooses = _read(ready), _read(ready) | _read(selects)
    rule = f"in [0, 2^31) and not mask_id={mask_id}"
    refuse("held", "in [0, 2^31)", drafts, ~_in(drafts, MAX_ID))
    refuse("source.token", rule, own, lanes & has_source[:, None] & ~_is_token(own, mask_id))
    # A draft predicts the lanes that it holds a mask in.
    needed = (lanes & chooses[:, None])[:, None] & (drafts == mask_id)
    refuse("token", rule, predicted, needed & ~_is_token(predicted, mask_id))
    for name in ("tried", "accepted"):
        count = _read(getattr(source, name))
        refuse(f"source.{name}", "at least 0", count, count < 0)


def _in(values: np.ndarray, end: int) -> np.ndarray:
    """Whether the values are in [0, end)."""
    return (values >= 0) & (values < end)


def _is_token(values: np.ndarray, mask_id: int) -> np.ndarray:
    return _in(values, MAX_ID) & (values != mask_id)


# By the op, what reads its calls: called with the arguments of the op's check.
READERS: dict[str, Callable[..., None]] = {
    "block_attention": read_attention,
    "unmask": read_unmask,
    "draft_build": read_draft_build,
    "verify": read_verify,
}

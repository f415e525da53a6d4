"""The forward of a step, and what some decoders add to it: guidance, drafts, shadows, first tokens, rows that predict
the position behind them.

`Forward` is the plain one. Each addition is a subclass that `forward_of` chooses when a decode is opened, so that a
plain step meets none of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlm_kernels import RowState, UnmaskRule, Window
from dlm_kernels.reference.select import select
from dlm_kernels.state import COMMIT, DENOISE, REFRESH

from ..patching import PatchHandle
from ..policies import Choice, Sampling, Setting, View
from .drafts import Drafts
from .measure import History, Wanted, filtered, measure, stats_of, wanted_of
from .plan import Plan
from .window import Step, sub_block

FACTOR = UnmaskRule("factor")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a forward gave.

    Attributes:
        hidden: [B, W, d] last hidden states of the window.
        logits: [B * lanes, V] that predict the lanes, [B * drafts * lanes, V] with drafts; None of a prefill.
        query_len: [B] int32 positions that were computed for each row.
        inputs: fields of `UnmaskInputs` that came of it besides.
    """

    hidden: Tensor
    logits: Tensor | None
    query_len: Tensor
    inputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PredictingRow:
    """Which row of a window predicts a position: its own.

    Attributes:
        canvas: length of the canvas buffer.
    """

    canvas: int

    def of(self, window: Window, hidden: Tensor, position: Tensor) -> Tensor:
        """Hidden states [B, N, d] of the rows that predict `position` [B, N]; some row's where the window has none."""
        return gathered(hidden, self.index(window, position))

    def index(self, window: Window, position: Tensor) -> Tensor:
        """[B, N] int64: where the window computes a position, its width where it does not."""
        (B, W), L = window.q_pos.shape, self.canvas
        offset = torch.arange(W, device=position.device).expand(B, W)
        place = torch.where(self.live(window, offset), window.q_pos, L).long()
        index = torch.full((B, L + 1), W, dtype=torch.int64, device=position.device).scatter(1, place, offset)
        index[:, L] = W
        return index.gather(1, torch.where((position >= 0) & (position < L), position, L).long())

    def live(self, window: Window, offset: Tensor) -> Tensor:
        """[B, W] bool rows of the window that may predict."""
        return offset < window.q_len[:, None]

    def keep(self, window: Window, hidden: Tensor, state: RowState) -> None:
        """Called after a step, for what later steps need of its rows."""

    def of_rows(self, rows: Tensor) -> PredictingRow:
        """The same for some rows [n] int64 of the batch."""
        return self

    def put_rows(self, rows: Tensor, part: PredictingRow) -> None:
        """Takes over what `part`, that of the rows [n], has kept."""


@dataclasses.dataclass(frozen=True)
class RowBefore(PredictingRow):
    """The row before it, as in an autoregressive model; position 0 has its own.

    Attributes:
        last_hidden: [B, d] hidden state of the position before every row's region, kept from an earlier forward.
    """

    last_hidden: Tensor

    def of(self, window: Window, hidden: Tensor, position: Tensor) -> Tensor:
        """Hidden states [B, N, d] of the rows before `position` [B, N]."""
        # What the window does not hold is the position before the region.
        hidden = torch.cat([hidden, self.last_hidden[:, None]], 1)
        return gathered(hidden, self.index(window, torch.where(position > 0, position - 1, position)))

    def keep(self, window: Window, hidden: Tensor, state: RowState) -> None:
        """Keeps the hidden state of the position before every row's region, if this forward computed it."""
        index = self.index(window, state.block_start[:, None] - 1)
        inside = (index < hidden.shape[1]) & (window.q_len > 0)[:, None]
        self.last_hidden.copy_(torch.where(inside, gathered(hidden, index)[:, 0], self.last_hidden))

    def of_rows(self, rows: Tensor) -> RowBefore:
        return dataclasses.replace(self, last_hidden=self.last_hidden.index_select(0, rows))

    def put_rows(self, rows: Tensor, part: RowBefore) -> None:
        self.last_hidden.index_copy_(0, rows, part.last_hidden)


@dataclasses.dataclass(frozen=True)
class UnshadowedRow(PredictingRow):
    """Its own row in the canvas, not in the shadow of the block.

    Attributes:
        shadow_block: block id of the shadows.
    """

    shadow_block: int

    def live(self, window: Window, offset: Tensor) -> Tensor:
        return super().live(window, offset) & (window.q_block < self.shadow_block)


def gathered(hidden: Tensor, index: Tensor) -> Tensor:
    """Rows [B, N, d] of hidden states [B, W, d]; an index beyond them is the last one."""
    index = index.clamp(0, hidden.shape[1] - 1).long()
    return hidden.gather(1, index[..., None].expand(*index.shape, hidden.shape[2]))


@dataclasses.dataclass(frozen=True)
class Forward:
    """A plain step: one canvas per row, one forward, the logits of the lanes.

    Attributes:
        handle: the patched model.
        plan: what is the same for every step of the decode.
        state: where every row stands.
        sampling: how the rows draw.
        setting: what its policies may read.
        cache: key/value buffers; None where nothing is kept.
        row: which row predicts a position.
        wanted: what is measured.
        history: the distributions of the step before; None where no policy compares with them.
        cache_rows: rows of the cache that belong to the batch, one for each of its rows.
    """

    handle: PatchHandle
    plan: Plan
    state: RowState
    sampling: Sampling
    setting: Setting
    cache: Any
    row: PredictingRow
    wanted: Wanted
    history: History | None
    cache_rows: int

    def of_rows(self, rows: Tensor) -> Forward:
        """The forward of some rows [n] int64 of the batch, on copies of what it keeps for them; the cache is shared."""
        first = self.plan.first.index_select(0, rows)
        sampling = self.sampling.of_rows(rows)
        return dataclasses.replace(
            self,
            plan=dataclasses.replace(self.plan, first=first),
            state=self.state.of_rows(rows),
            sampling=sampling,
            setting=dataclasses.replace(self.setting, first=first, sampling=sampling),
            row=self.row.of_rows(rows),
            history=None if self.history is None else self.history.of_rows(rows, self.state.tokens.shape[0]),
        )

    def put_rows(self, rows: Tensor, part: Forward) -> None:
        """Takes over what a step of `part`, the forward of the rows [n], has changed."""
        self.state.put_rows(rows, part.state)
        self.row.put_rows(rows, part.row)
        if self.history is not None:
            self.history.put_rows(rows, self.state.tokens.shape[0], part.history)

    def run(self, step: Step) -> Result:
        """The forward of a step that chooses tokens."""
        hidden = self.hidden(step.window, self.state.tokens)
        return Result(hidden, self.predicting(self.logits(step, hidden)), step.window.q_len)

    def prefill(self, step: Step) -> Result:
        """The forward of a step that only fills the cache."""
        return Result(self.hidden(step.window, self.state.tokens), None, step.window.q_len)

    def admitted(self, step: Step) -> Step:
        """The step without the rows that it cannot serve though they fit its window."""
        return step

    def hidden(self, window: Window, canvases: Tensor) -> Tensor:
        """Last hidden states [rows, W, d] of a window on canvases [rows, L]."""
        return self.handle.window_hidden(self.input_ids(window, canvases), window, self.cache)

    def input_ids(self, window: Window, canvases: Tensor) -> Tensor:
        """Tokens [rows, W] of a window."""
        return canvases.gather(1, window.q_pos.long())

    def logits(self, step: Step, hidden: Tensor) -> Tensor:
        """Logits [B * lanes, V] that predict the lanes."""
        return self.head(self.row.of(step.window, hidden, step.lanes.position))

    def head(self, rows: Tensor) -> Tensor:
        """Logits of hidden states [..., d], one row each."""
        return self.handle.adapter.head(self.handle.model, rows.flatten(0, -2))

    def predicting(self, logits: Tensor) -> Tensor:
        """The logits by which the decoder predicts: without the EOS where the preset excludes it."""
        return logits.index_fill(-1, self.sampling.eos[:1], -torch.inf) if self.plan.preset.exclude_eos else logits

    def needed(self, step: Step) -> Tensor:
        """[B, W] bool: the lanes whose statistics anybody reads."""
        needed = step.lanes.eligible
        for policy in self.plan.preset.policies:
            needed = needed | policy.needed(self.setting, step.lanes, self.state)
        return needed & step.selects[:, None]

    def look(self, step: Step, result: Result) -> View:
        """The step as a policy sees it."""
        return self.viewed(step, result, self.needed(step), self.history)

    def viewed(
        self,
        step: Step,
        result: Result,
        needed: Tensor,
        history: History | None,
        bias: tuple[Tensor, Tensor] | None = None,
    ) -> View:
        """The statistics of the lanes that are needed, after `bias` if there is one."""
        preset, sampling, state = self.plan.preset, self.sampling, self.state
        copies = step.bucket.drafts
        statistics, rule_fields = measure(
            self.handle.ops,
            preset,
            self.wanted,
            state,
            sampling,
            result.logits,
            step.lanes,
            needed,
            history=history,
            bias=bias,
            copies=copies,
        )
        return View(
            setting=self.setting,
            state=state,
            lanes=step.lanes,
            selects=step.selects,
            rows=step.window.cache_row,
            logits=result.logits.unflatten(0, (-1, step.lanes.position.shape[1])),
            rule_fields=rule_fields,
            restate=lambda ids, values: self.viewed(step, result, needed, None, (ids, values)),
            **statistics,
        )

    def choose(self, step: Step, result: Result, view: View) -> Choice:
        """What the preset's rule makes of the step, before its policies."""
        return rule_choice(self.plan, self.wanted, view)

    def drafting(self) -> Tensor:
        """[B] bool rows whose next step has drafts to verify."""
        return torch.zeros_like(self.state.phase, dtype=torch.bool)

    def after(self, step: Step, result: Result) -> None:
        """Called when the step has written, for what later steps need of this one."""
        self.row.keep(step.window, result.hidden, self.state)


@dataclasses.dataclass(frozen=True)
class Guided(Forward):
    """Classifier-free guidance: a second copy of every row without its given tokens. LLaDA, arXiv:2502.09992."""

    def run(self, step: Step) -> Result:
        pairs = self.hidden(*self._pairs(step.window))
        conditional, unconditional = (self.logits(step, hidden) for hidden in pairs.chunk(2))
        scale = self.plan.preset.cfg_scale + 1
        logits = unconditional + scale * (conditional - unconditional)
        return Result(pairs.chunk(2)[0], self.predicting(logits), 2 * step.window.q_len)

    def prefill(self, step: Step) -> Result:
        pairs = self.hidden(*self._pairs(step.window))
        return Result(pairs.chunk(2)[0], None, 2 * step.window.q_len)

    def _pairs(self, window: Window) -> tuple[Window, Tensor]:
        """The window of both copies, on cache rows of their own, and their canvases [2 * B, L]."""
        state = self.state
        in_canvas = torch.arange(state.tokens.shape[1], device=state.tokens.device) < state.canvas_len[:, None]
        given = (state.unmask_step < 0) & in_canvas
        canvases = torch.cat([state.tokens, torch.where(given, self.plan.mask_id, state.tokens)])
        rows = window.cache_row
        window = repeat_rows(window, lambda x: torch.cat([x, x]))
        return dataclasses.replace(window, cache_row=torch.cat([rows, rows + self.cache_rows])), canvases


@dataclasses.dataclass(frozen=True)
class Shadowed(Forward):
    """A shadow of the block verifies what it holds: it predicts every written token from all others. WINO,
    arXiv:2507.18578."""

    def input_ids(self, window: Window, canvases: Tensor) -> Tensor:
        input_ids = super().input_ids(window, canvases)
        return torch.where(window.q_block >= self.plan.shadow_block, self.plan.mask_id, input_ids)

    def look(self, step: Step, result: Result) -> View:
        view = super().look(step, result)
        return dataclasses.replace(view, back=self._back(step, result.hidden))

    def _back(self, step: Step, hidden: Tensor) -> Tensor:
        """[B, W] fp32 probability of the token that a written lane holds, predicted by the shadow of its position."""
        # The shadow of the block's j-th position lies j behind the canvas; block lanes begin at the block.
        state, lanes = self.state, step.lanes
        behind = step.window.q_len - (state.block_end - state.block_start)
        index = behind[:, None] + torch.arange(lanes.position.shape[1], device=hidden.device)
        logits = self.predicting(self.head(gathered(hidden, index)))
        written = (lanes.written & self.needed(step)).flatten()
        rows = torch.where(written, torch.arange(written.shape[0], dtype=torch.int32, device=hidden.device), -1).int()
        query = torch.where(written, lanes.tokens.flatten(), 0)
        banned = self.sampling.banned
        stats = stats_of(self.handle.ops, logits, rows=rows, outputs=("query",), banned=banned, query=query)
        return stats.query_confidence.view(lanes.position.shape)


@dataclasses.dataclass(frozen=True)
class Opening(Forward):
    """Prefills and commits predict the token behind them, which opens the next block. Fast-dLLM v2,
    arXiv:2509.26328."""

    def run(self, step: Step) -> Result:
        return self._with_first_token(step, super().run(step))

    def prefill(self, step: Step) -> Result:
        return self._with_first_token(step, super().prefill(step))

    def _with_first_token(self, step: Step, result: Result) -> Result:
        """The result with the token behind the window's last position, per row: the most likely one, or a draw."""
        window, state, sampling = step.window, self.state, self.sampling
        last = (window.q_len - 1).clamp(min=0).long()[:, None]
        logits = self.predicting(self.head(gathered(result.hidden, last)))
        opens = step.takes_part & ((state.phase == REFRESH) | (state.phase == COMMIT))
        rows = torch.where(opens, torch.arange(opens.shape[0], dtype=torch.int32, device=logits.device), -1).int()
        banned, position = sampling.banned, window.q_pos.gather(1, last)[:, 0] + 1
        if sampling.no_eos_before is not None:
            banned_eos = torch.where((position < sampling.no_eos_before)[:, None], sampling.eos, -1)
            banned = torch.cat([banned.expand(opens.shape[0], -1), banned_eos], -1)
        token, confidence = self._first_tokens(logits, rows, opens, banned, position)
        return dataclasses.replace(result, inputs={"first_token": token, "first_token_confidence": confidence})

    def _first_tokens(
        self, logits: Tensor, rows: Tensor, opens: Tensor, banned: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The tokens [B] that logits [B, V] give the positions [B], and their probabilities."""
        preset, sampling, wanted = self.plan.preset, self.sampling, self.wanted
        draws, temperature = preset.draws_first_token and wanted.draws, sampling.temperature
        if preset.draws_first_token and wanted.filters:
            narrowed = temperature >= 0 if preset.greedy_filters else temperature > 0
            logits = filtered(logits, preset, sampling, temperature, banned, opens, narrowed)
        arguments: dict[str, Any] = {}
        if draws:
            noise = torch.stack([sampling.request, position, self.state.step], -1)
            arguments |= {"sample_temperature": temperature, "seed": sampling.seed, "noise": noise}
        if draws and wanted.tempered:
            arguments["temperature"] = torch.where(temperature > 0, temperature, 1.0)
        outputs = ("sampled",) if draws else ()
        stats = stats_of(self.handle.ops, logits, rows=rows, outputs=outputs, banned=banned, **arguments)
        return (stats.sampled_token, stats.sampled_confidence) if draws else (stats.token, stats.confidence)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftedResult(Result):
    """What a forward of drafts gave.

    Attributes:
        tokens: [B, drafts, W] what every draft holds at the lanes.
        ready: [B] bool rows that had drafts to verify.
    """

    tokens: Tensor
    ready: Tensor


@dataclasses.dataclass(frozen=True)
class Drafted(Forward):
    """A step verifies several canvases per row, each one token further along the static decoder's path. FreeDave,
    arXiv:2510.00294.

    Attributes:
        drafts: where the next ones come from.
    """

    drafts: Drafts

    def of_rows(self, rows: Tensor) -> Drafted:
        return dataclasses.replace(super().of_rows(rows), drafts=self.drafts.of_rows(rows))

    def put_rows(self, rows: Tensor, part: Drafted) -> None:
        super().put_rows(rows, part)
        self.drafts.put_rows(rows, part.drafts)

    def run(self, step: Step) -> Result:
        count, position = step.bucket.drafts, step.lanes.position
        ready = self.drafts.ready(self.state, step.bucket.kind) & step.selects
        tokens = self.drafts.tokens(self.handle.ops, step.lanes, ready, count)
        verified = torch.where(ready & ~self.drafts.suspended(), count, 1)
        hidden = self.hidden(self._window(step.window, count), with_lanes(self.state.tokens, position, tokens))
        by_draft = hidden.view(-1, count, *hidden.shape[1:])
        rows = [self.row.of(step.window, draft, position) for draft in by_draft.unbind(1)]
        query_len = step.window.q_len * verified.int()
        logits = self.predicting(self.head(torch.stack(rows, 1)))
        return DraftedResult(by_draft[:, 0], logits, query_len, tokens=tokens, ready=ready)

    def admitted(self, step: Step) -> Step:
        """A row with drafts to verify sits a step without drafts out: what it costs would depend on its neighbours."""
        if step.bucket.drafts > 1 or step.bucket.kind == "refresh":
            return step
        rows = ~self.drafting()
        window = dataclasses.replace(step.window, q_len=torch.where(rows, step.window.q_len, 0))
        return dataclasses.replace(step, window=window, takes_part=step.takes_part & rows, selects=step.selects & rows)

    def drafting(self) -> Tensor:
        return (self.state.phase == DENOISE) & self.drafts.ready(self.state, "denoise") & ~self.drafts.suspended()

    def _window(self, window: Window, count: int) -> Window:
        """The window of every draft: all read their row's cache, and leave storing to the first."""
        if count == 1:
            return window
        window = repeat_rows(window, lambda x: x.repeat_interleave(count, 0))
        first = torch.arange(window.q_pos.shape[0], device=window.q_pos.device) % count == 0
        return dataclasses.replace(window, kv_slot=torch.where(first[:, None], window.kv_slot, -1))

    def look(self, step: Step, result: DraftedResult) -> View:
        """The statistics of every draft, [B * drafts, W]; an error of one draft is the lane's."""
        masked = result.tokens == self.plan.mask_id
        needed = (self.needed(step)[:, None] & masked).flatten(0, 1)
        view = self.viewed(step, result, needed, self.history)
        return dataclasses.replace(view, error=view.error.view(masked.shape).amax(1))

    def choose(self, step: Step, result: DraftedResult, view: View) -> Choice:
        """Accepts the drafts that agree with what is predicted for them."""
        by_draft = (x.view(result.tokens.shape) for x in (view.token, view.rule_fields["score"], view.confidence))
        return self.drafts.choose(
            self.handle.ops, step.lanes, result.ready, step.selects, result.tokens, *by_draft, self.plan.mask_id
        )


def repeat_rows(window: Window, repeat: Callable[[Tensor], Tensor]) -> Window:
    """The window with `repeat` applied to the rows of every tensor."""
    rows = {name: repeat(tensor).contiguous() for name, tensor in window.tensors().items()}
    return dataclasses.replace(window, **rows)


def with_lanes(tokens: Tensor, position: Tensor, held: Tensor) -> Tensor:
    """[B * drafts, L] canvases that hold `held` [B, drafts, W] at the lanes' positions [B, W]."""
    (B, L), (_, count, W) = tokens.shape, held.shape
    place = torch.where(position < L, position, L).long()[:, None].expand(B, count, W)
    canvases = torch.nn.functional.pad(tokens, (0, 1))[:, None].expand(B, count, L + 1)
    return canvases.scatter(2, place, held)[:, :, :L].flatten(0, 1)


def rule_choice(plan: Plan, wanted: Wanted, view: View) -> Choice:
    """What the preset's rule makes of a step, before its policies."""
    preset, state, sampling = plan.preset, view.state, view.setting.sampling
    value, min_unmask = sampling.value, sampling.min_unmask
    if plan.quota_of_view:
        min_unmask = view.quota()
    if sampling.transfer is not None:
        last = state.step >= sampling.steps - 1
        share = sampling.transfer.gather(1, torch.minimum(state.step, sampling.steps - 1).long()[:, None])[:, 0]
        if wanted.chance:
            value = -torch.where(last, 1.0, share)
            min_unmask = torch.zeros_like(min_unmask)
        else:
            masks = view.lanes.eligible.sum(1)
            count = (masks.to(torch.float32) * share).floor().to(torch.int32)
            count = count if preset.strict_reference else count.clamp(min=1)
            min_unmask = torch.where(last, masks.to(torch.int32), count)
    allowed = None
    if preset.sub_block_length is not None:
        start, end = sub_block(plan, state)
        allowed = (view.lanes.position >= start[:, None]) & (view.lanes.position < end[:, None])
    return Choice(
        **view.rule_fields,
        value=value,
        min_unmask=min_unmask,
        allowed=allowed,
        run_value=None if preset.run_threshold is None else torch.full_like(value, preset.run_threshold),
    )


def with_last_rank(view: View, choice: Choice) -> Choice:
    """The choice of rule "factor" as Fast-dLLM's code has it: if the last position alone fails, it is written too.

    That code never tests the best position, so that the last of two is always written.
    """
    eligible = view.lanes.eligible if choice.allowed is None else view.lanes.eligible & choice.allowed
    count, one = eligible.sum(1, dtype=torch.int32), torch.ones_like(choice.min_unmask)
    passing = select(FACTOR, eligible, choice.score, choice.value, one, choice.rank).sum(1)
    lacks_one = passing == count - 1
    fallback = None if choice.fallback is None else torch.where(lacks_one, count, choice.fallback)
    return dataclasses.replace(choice, min_unmask=torch.where(lacks_one, count, choice.min_unmask), fallback=fallback)


def forward_of(handle: PatchHandle, plan: Plan, state: RowState, sampling: Sampling) -> Forward:
    """The forward of a decode, with the buffers that live as long as it does."""
    preset, model = plan.preset, handle.model
    (B, L), device, dtype = state.tokens.shape, state.tokens.device, handle.adapter.compute_dtype(model)
    row = PredictingRow(L)
    if plan.previous:
        row = RowBefore(L, torch.zeros(B, model.config.hidden_size, dtype=dtype, device=device))
    elif preset.shadow:
        row = UnshadowedRow(L, plan.shadow_block)
    wanted, history = wanted_of(preset, sampling), None
    if wanted.divergence:
        logits = torch.zeros(B * plan.lanes, model.config.vocab_size, dtype=dtype, device=device)
        history = History(logits, torch.zeros(B * plan.lanes, dtype=torch.float32, device=device))
    copies = 2 if preset.cfg_scale else 1
    cache = handle.adapter.new_cache(model, copies * B, plan.capacity) if plan.cache.stores else None
    parts = {
        "handle": handle,
        "plan": plan,
        "state": state,
        "sampling": sampling,
        "setting": plan.setting(sampling),
        "cache": cache,
        "row": row,
        "wanted": wanted,
        "history": history,
        "cache_rows": B,
    }
    if preset.drafts > 1:
        return Drafted(**parts, drafts=Drafts.empty(state, plan.lanes))
    if preset.cfg_scale:
        return Guided(**parts)
    if preset.shadow:
        return Shadowed(**parts)
    return Opening(**parts) if preset.first_token else Forward(**parts)

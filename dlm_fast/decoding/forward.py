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
from dlm_kernels.state import DENOISE

from ..models.cache import KVCache
from ..patching import PatchHandle
from ..policies import Choice, Lanes, Policy, Sampling, Setting, View
from .drafts import Drafts
from .measure import (
    Banned,
    History,
    Question,
    Wanted,
    filtered,
    measure,
    question_of,
    softmax_temperature,
    stats_of,
    wanted_of,
)
from .plan import Plan
from .window import Step, input_ids_of

FACTOR = UnmaskRule("factor")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a forward gave.

    Attributes:
        hidden: [B, W, d] last hidden states of the window, `extended` by the predicting row.
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

    def extended(self, hidden: Tensor) -> Tensor:
        """The hidden states [..., W, d] of a window, and before them what predicts besides."""
        return hidden

    def of(self, step: Step, hidden: Tensor) -> Tensor:
        """Of `extended` hidden states, those that predict the lanes, [..., lanes, d]; some row's where the window has
        none."""
        layout, place, last = step.layout, step.lanes.place, hidden.shape[-2] - 1
        if step.lanes_first:
            return hidden[..., : step.bucket.lanes, :]
        if layout.order is not None:
            place = layout.order.gather(1, place)
        elif layout.position is not None:
            place = place - step.window.q_pos[:, :1]
        elif last + 1 >= self.canvas:
            return gathered(hidden, place)
        if layout.leaves_lanes_out:
            place = torch.where((place >= 0) & (place < step.window.q_len[:, None]), place, last)
        return gathered(hidden, place.clamp(0, last))

    def behind(self, window: Window, hidden: Tensor) -> Tensor:
        """Of `extended` hidden states of a range, those [B, 1, d] that predict the position behind it."""
        return gathered(hidden, (window.q_len[:, None] - 1).clamp(min=0).long())

    def keep(self, step: Step, hidden: Tensor, state: RowState) -> None:
        """Called after a step, for what later steps need of its `extended` hidden states."""

    def keep_behind(self, hidden: Tensor, rows: Tensor) -> None:
        """The same of a step after which the `rows` [B] bool begin their region behind the window, and no other row
        moves; `hidden` [B, 1, d] is what predicts the position behind it."""

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
        counted: [canvas] int64: 0, 1, 2, ...
    """

    last_hidden: Tensor
    counted: Tensor

    def extended(self, hidden: Tensor) -> Tensor:
        # What the window does not hold is the position before the region.
        last = self.last_hidden.view(-1, *[1] * (hidden.dim() - 2), hidden.shape[-1])
        return torch.cat([last.expand(*hidden.shape[:-2], 1, -1), hidden], -2)

    def of(self, step: Step, hidden: Tensor) -> Tensor:
        if step.lanes_first:
            return gathered(hidden, self.counted[: step.bucket.lanes] + (step.lanes.place == 0))
        place = self._place(step, step.lanes.place.clamp(min=1))
        if step.layout.leaves_lanes_out:
            place = place * (place <= step.window.q_len[:, None])
        return gathered(hidden, place.clamp(0, hidden.shape[-2] - 1))

    def behind(self, window: Window, hidden: Tensor) -> Tensor:
        return gathered(hidden, window.q_len[:, None].long())

    def keep(self, step: Step, hidden: Tensor, state: RowState) -> None:
        """Keeps the hidden state of the position before every row's region, if this forward computed it."""
        place = self._place(step, state.block_start[:, None].long())
        inside = place <= step.layout.unbroken[:, None]
        self.last_hidden.copy_(gathered(hidden, (place * inside).clamp(min=0))[:, 0])

    def keep_behind(self, hidden: Tensor, rows: Tensor) -> None:
        torch.where(rows[:, None], hidden[:, 0], self.last_hidden, out=self.last_hidden)

    def of_rows(self, rows: Tensor) -> RowBefore:
        return dataclasses.replace(self, last_hidden=self.last_hidden.index_select(0, rows))

    def put_rows(self, rows: Tensor, part: RowBefore) -> None:
        self.last_hidden.index_copy_(0, rows, part.last_hidden)

    def _place(self, step: Step, position: Tensor) -> Tensor:
        """[B, N] int64: where `extended` hidden states have the row before `position` [B, N] int64; 0 or less where
        the window begins behind it or leaves it out, and 0 where it begins at the position."""
        layout = step.layout
        if layout.order is None:
            return position - step.window.q_pos[:, :1]
        before = (position - 1).clamp(min=0)
        inside = layout.computed.gather(1, before) & (position > 0)
        return (layout.order.gather(1, before) + 1) * inside


def gathered(hidden: Tensor, place: Tensor) -> Tensor:
    """Rows [..., N, d] of hidden states [..., W, d] at the places [B, N] int64."""
    place = place.view(-1, *[1] * (hidden.dim() - 3), place.shape[1], 1)
    return hidden.gather(-2, place.expand(*hidden.shape[:-2], -1, hidden.shape[-1]))


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
        banned: the ids that no draw gives.
        cache_rows: rows of the cache that belong to the batch, one for each of its rows.
    """

    handle: PatchHandle
    plan: Plan
    state: RowState
    sampling: Sampling
    setting: Setting
    cache: KVCache | None
    row: PredictingRow
    wanted: Wanted
    history: History | None
    banned: Banned
    cache_rows: int

    def of_rows(self, rows: Tensor) -> Forward:
        """The forward of some rows [n] int64 of the batch, on copies of what it keeps for them; the cache is shared."""
        first, prefilled = self.plan.first.index_select(0, rows), self.plan.prefilled
        if prefilled is not None:
            prefilled = prefilled.index_select(0, rows)
        sampling = self.sampling.of_rows(rows)
        return dataclasses.replace(
            self,
            plan=dataclasses.replace(self.plan, first=first, prefilled=prefilled),
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

    def with_sampling(self, sampling: Sampling) -> Forward:
        """The same forward with other numbers of its rows."""
        return dataclasses.replace(
            self,
            sampling=sampling,
            setting=dataclasses.replace(self.setting, sampling=sampling),
            wanted=wanted_of(self.plan.preset, sampling),
            banned=Banned.of(sampling),
        )

    def run(self, step: Step) -> Result:
        """The forward of a step that chooses tokens."""
        hidden = self.row.extended(self.hidden(step))
        return Result(hidden, self.predicting(self.logits(step, hidden)), step.window.q_len)

    def prefill(self, step: Step) -> Result:
        """The forward of a step that only fills the cache."""
        return Result(self.row.extended(self.hidden(step)), None, step.window.q_len)

    def admitted(self, step: Step) -> Step:
        """The step without the rows that it cannot serve though they fit its window."""
        return step

    def hidden(self, step: Step) -> Tensor:
        """Last hidden states [B, W, d] of the step's window."""
        return self.handle.window_hidden(step.input_ids, step.window, self.cache)

    def logits(self, step: Step, hidden: Tensor) -> Tensor:
        """Logits [B * lanes, V] that predict the lanes."""
        return self.head(self.row.of(step, hidden))

    def head(self, rows: Tensor) -> Tensor:
        """Logits of hidden states [..., d], one row each."""
        return self.handle.adapter.head(self.handle.model, rows.flatten(0, -2))

    def predicting(self, logits: Tensor) -> Tensor:
        """The logits by which the decoder predicts: without the EOS where the preset excludes it."""
        return logits.index_fill(-1, self.sampling.eos[:1], -torch.inf) if self.plan.preset.exclude_eos else logits

    def needed(self, step: Step) -> Tensor:
        """[B, W] bool: the lanes whose statistics anybody reads."""
        eligible = needed = step.lanes.eligible
        for policy in self.plan.preset.policies:
            lanes = policy.needed(self.setting, step.lanes, self.state)
            if needed is eligible and type(policy).needed is Policy.needed:
                needed = lanes  # the eligible ones are among them
            elif lanes is not eligible:
                needed = needed | lanes
        return needed & step.selects[:, None]

    def look(self, step: Step, result: Result) -> View:
        """The step as a policy sees it."""
        return self.viewed(step, result, self.question(step, self.needed(step)), self.history)

    def question(self, step: Step, needed: Tensor) -> Question:
        """What the step asks of `confidence`, of the lanes that are `needed` [B, W] (or [B * drafts, W]) bool."""
        return question_of(
            self.wanted,
            self.state,
            self.sampling,
            step.lanes,
            needed,
            banned=self.banned,
            constants=self.plan.constants,
            copies=step.bucket.drafts,
        )

    def viewed(
        self,
        step: Step,
        result: Result,
        question: Question,
        history: History | None,
        bias: tuple[Tensor, Tensor] | None = None,
    ) -> View:
        """The statistics of the lanes that the question is about, after `bias` if there is one."""
        statistics, rule_fields = measure(
            self.handle.ops,
            self.plan.preset,
            self.wanted,
            self.state,
            self.sampling,
            result.logits,
            step.lanes,
            question,
            history=history,
            bias=bias,
        )
        return View(
            setting=self.setting,
            state=self.state,
            lanes=step.lanes,
            selects=step.selects,
            rows=step.window.cache_row,
            logits=result.logits.unflatten(0, (-1, step.lanes.position.shape[1])),
            rule_fields=rule_fields,
            restate=lambda ids, values: self.viewed(step, result, question, None, (ids, values)),
            **statistics,
        )

    def choose(self, step: Step, result: Result, view: View) -> Choice:
        """What the preset's rule makes of the step, before its policies."""
        return rule_choice(self.plan, self.wanted, view)

    def drafting(self) -> Tensor:
        """[B] bool rows whose next step has drafts to verify."""
        return self.plan.constants.zeros(self.state.phase.shape[0], dtype=torch.bool)

    def after(self, step: Step, result: Result) -> None:
        """Called when the step has written, for what later steps need of this one."""
        self.row.keep(step, result.hidden, self.state)


@dataclasses.dataclass(frozen=True)
class Guided(Forward):
    """Classifier-free guidance: a second copy of every row without its given tokens. LLaDA, arXiv:2502.09992."""

    def run(self, step: Step) -> Result:
        pairs = [self.row.extended(hidden) for hidden in self.hidden(step).chunk(2)]
        conditional, unconditional = (self.logits(step, hidden) for hidden in pairs)
        scale = self.plan.preset.cfg_scale + 1
        logits = unconditional + scale * (conditional - unconditional)
        return Result(pairs[0], self.predicting(logits), 2 * step.window.q_len)

    def prefill(self, step: Step) -> Result:
        return Result(self.row.extended(self.hidden(step).chunk(2)[0]), None, 2 * step.window.q_len)

    def hidden(self, step: Step) -> Tensor:
        """Last hidden states [2 * B, W, d]: of the rows, and of their copies, which have cache rows of their own."""
        state, window = self.state, step.window
        in_canvas = self.plan.constants.places(state.tokens.shape[1]) < state.canvas_len[:, None]
        given = (state.unmask_step < 0) & in_canvas
        blank = torch.where(given, self.plan.mask_id, state.tokens)
        input_ids = torch.cat([step.input_ids, input_ids_of(step.layout, blank, step.bucket.width, self.plan.mask_id)])
        rows = window.cache_row
        rows = torch.cat([rows, rows + self.cache_rows])
        window = repeat_rows(window, lambda x: torch.cat([x, x]), cache_row=rows)
        return self.handle.window_hidden(input_ids, window, self.cache)


@dataclasses.dataclass(frozen=True)
class Shadowed(Forward):
    """A shadow of the block verifies what it holds: it predicts every written token from all others. WINO,
    arXiv:2507.18578."""

    def look(self, step: Step, result: Result) -> View:
        needed = self.needed(step)
        view = self.viewed(step, result, self.question(step, needed), self.history)
        return dataclasses.replace(view, back=self._back(step, result.hidden, needed))

    def _back(self, step: Step, hidden: Tensor, needed: Tensor) -> Tensor:
        """[B, W] fp32 probability of the token that a written lane holds, predicted by the shadow of its position."""
        # The shadow of the block's j-th position lies j behind the canvas; block lanes begin at the block.
        lanes, constants = step.lanes, self.plan.constants
        place = self.state.canvas_len[:, None] + constants.counted(step.bucket.lanes)
        if step.bucket.width < self.plan.denoise_width:
            place = place.clamp(max=hidden.shape[1] - 1)  # of rows that the window is too narrow for
        logits = self.predicting(self.head(gathered(hidden, place)))
        written = (lanes.written & needed).flatten()
        rows = torch.where(written, constants.places(written.shape[0]), constants.nothing(1))
        tokens, banned = lanes.tokens.flatten(), self.sampling.banned
        stats = stats_of(self.handle.ops, logits, rows=rows, outputs=("query",), banned=banned, query=tokens)
        return stats.query_confidence.view(lanes.position.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpeningResult(Result):
    """What a forward that may open blocks gave.

    Attributes:
        behind: [B, 1, d] hidden states that predict the position behind the window.
        opens: [B] bool rows whose next block begins there.
    """

    behind: Tensor
    opens: Tensor


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
        window, sampling, constants = step.window, self.sampling, self.plan.constants
        behind = self.row.behind(window, result.hidden)
        logits = self.predicting(self.head(behind))
        # Rows that take part and choose no tokens fill the cache, or commit their block.
        opens = step.takes_part ^ step.selects
        rows = torch.where(opens, constants.places(opens.shape[0]), constants.nothing(1))
        position = window.q_pos[:, 0] + window.q_len
        banned = self.banned.at(position, sampling.no_eos_before)
        token, confidence = self._first_tokens(logits, rows, opens, banned, position)
        inputs = {"first_token": token, "first_token_confidence": confidence}
        return OpeningResult(result.hidden, result.logits, result.query_len, inputs, behind=behind, opens=opens)

    def after(self, step: Step, result: OpeningResult) -> None:
        self.row.keep_behind(result.behind, result.opens)

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
            arguments |= {"sample_temperature": temperature, "seed": sampling.seeds(1), "noise": noise}
        if draws and wanted.tempered:
            arguments["temperature"] = softmax_temperature(temperature)
        outputs = ("sampled",) if draws else ()
        stats = stats_of(self.handle.ops, logits, rows=rows, outputs=outputs, banned=banned, **arguments)
        return (stats.sampled_token, stats.sampled_confidence) if draws else (stats.token, stats.confidence)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftedResult(Result):
    """What a forward of drafts gave.

    Attributes:
        tokens: [B, drafts, W] what every draft holds at the lanes.
        ready: [B] bool rows that had drafts to verify.
        drafting: [B] bool rows that go on drafting.
    """

    tokens: Tensor
    ready: Tensor
    drafting: Tensor


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

    def admitted(self, step: Step) -> Step:
        """A row with drafts to verify sits a step without drafts out: what it costs would depend on its neighbours."""
        if step.bucket.drafts > 1 or step.bucket.kind == "refresh":
            return step
        rows = ~self.drafting()
        window = dataclasses.replace(step.window, q_len=step.window.q_len * rows)
        return dataclasses.replace(step, window=window, takes_part=step.takes_part & rows, selects=step.selects & rows)

    def run(self, step: Step) -> Result:
        count, query_len = step.bucket.drafts, step.window.q_len
        if step.bucket.kind == "refresh":
            # It opens a block: its forward is what makes the first drafts.
            ready = drafting = self.plan.constants.zeros(query_len.shape[0], dtype=torch.bool)
            tokens, hidden = step.lanes.tokens[:, None], self.hidden(step)
        else:
            ready, drafting = self.drafts.ready(self.state, step.selects), ~self.drafts.suspended()
            tokens = self.drafts.tokens(self.handle.ops, step.lanes, ready, count)
            # The window is the block (`CacheOperation.frozen_around`), and so are the lanes.
            assert step.lanes_first and step.bucket.width == step.bucket.lanes
            window = self._window(step.window, count)
            hidden = self.handle.window_hidden(tokens.flatten(0, 1), window, self.cache)
        hidden = self.row.extended(hidden.unflatten(0, (-1, count)))
        if count > 1:
            query_len = torch.add(query_len, query_len * (ready & drafting), alpha=count - 1)
        logits = self.predicting(self.head(self.row.of(step, hidden)))
        return DraftedResult(hidden[:, 0], logits, query_len, tokens=tokens, ready=ready, drafting=drafting)

    def drafting(self) -> Tensor:
        return self.drafts.ready(self.state, self.state.phase == DENOISE) & ~self.drafts.suspended()

    def _window(self, window: Window, count: int) -> Window:
        """The window of every draft: all read their row's cache, and leave storing to the first."""
        if count == 1:
            return window
        (B, W), constants = window.shape, self.plan.constants
        slots = torch.cat([window.kv_slot[:, None], constants.nothing(B, count - 1, W)], 1).flatten(0, 1)
        fields = {"kv_slot": slots}
        if not self.plan.diffusion.causal_prefix:
            fields["q_block"] = constants.zeros(B * count, W)  # all of one block
        return repeat_rows(window, lambda x: x.repeat_interleave(count, 0), **fields)

    def look(self, step: Step, result: DraftedResult) -> View:
        """The statistics of every draft, [B * drafts, W]; an error of one draft is the lane's."""
        needed, shape = self.needed(step), result.tokens.shape
        if step.bucket.kind == "denoise":
            needed = (needed[:, None] & (result.tokens == self.plan.mask_id)).flatten(0, 1)
        view = self.viewed(step, result, self.question(step, needed), self.history)
        return dataclasses.replace(view, error=view.error.view(shape).amax(1)) if shape[1] > 1 else view

    def choose(self, step: Step, result: DraftedResult, view: View) -> Choice:
        """Accepts the drafts that agree with what is predicted for them."""
        shape = result.tokens.shape
        return self.drafts.choose(
            self.handle.ops,
            step.lanes,
            result.ready,
            result.drafting,
            step.selects,
            result.tokens,
            view.token.view(shape),
            view.rule_fields["score"].view(shape),
            view.confidence.view(shape),
            self.plan,
        )


def repeat_rows(window: Window, repeat: Callable[[Tensor], Tensor], **fields: Tensor) -> Window:
    """The window with `repeat` applied to the rows of every tensor but the `fields`, which are given."""
    rows = {name: repeat(tensor) for name, tensor in window.tensors().items() if name not in fields}
    return dataclasses.replace(window, **rows, **fields)


def rule_choice(plan: Plan, wanted: Wanted, view: View) -> Choice:
    """What the preset's rule makes of a step, before its policies."""
    preset, state, sampling = plan.preset, view.state, view.setting.sampling
    value, min_unmask = sampling.value, sampling.min_unmask
    if plan.quota_of_view:
        min_unmask = view.quota()
    if sampling.transfer is not None:
        step = state.step.clamp(max=sampling.transfer.shape[1] - 1).long()
        share = sampling.transfer.gather(1, step[:, None])[:, 0]
        if wanted.chance:
            value, min_unmask = -share, plan.constants.zeros(step.shape[0])
        else:
            min_unmask = (view.lanes.eligible.sum(1) * share).to(torch.int32)  # rounded down
            min_unmask = min_unmask if preset.strict_reference else min_unmask.clamp(min=1)
    allowed = None
    if preset.sub_block_length is not None:
        allowed = in_sub_block(plan, state, view.lanes)
    return Choice(
        **view.rule_fields,
        value=value,
        min_unmask=min_unmask,
        allowed=allowed,
        run_value=None if preset.run_threshold is None else torch.full_like(value, preset.run_threshold),
    )


def in_sub_block(plan: Plan, state: RowState, lanes: Lanes) -> Tensor:
    """[B, W] bool (or [W]): the lanes of the leftmost sub-block with masks of every row's block."""
    offset = plan.constants.places(lanes.position.shape[1])
    if plan.whole_row:
        offset = lanes.position - state.block_start[:, None]
    number = torch.div(offset, plan.preset.sub_block_length, rounding_mode="floor")
    none = plan.constants.places(1, lanes.position.shape[1])
    return number == torch.where(lanes.eligible, number, none).amin(1, keepdim=True)


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


def forward_of(
    handle: PatchHandle, plan: Plan, state: RowState, sampling: Sampling, cache: KVCache | None = None
) -> Forward:
    """The forward of a decode, with the buffers that live as long as it does; `cache` where there is one already."""
    preset, model = plan.preset, handle.model
    (B, L), device, dtype = state.tokens.shape, state.tokens.device, handle.adapter.compute_dtype(model)
    row = PredictingRow(L)
    if plan.previous:
        last_hidden = torch.zeros(B, model.config.hidden_size, dtype=dtype, device=device)
        row = RowBefore(L, last_hidden, plan.constants.counted(L))
    wanted, history = wanted_of(preset, sampling), None
    if wanted.divergence:
        logits = torch.zeros(B * plan.lanes, model.config.vocab_size, dtype=dtype, device=device)
        history = History(logits, torch.zeros(B * plan.lanes, dtype=torch.float32, device=device))
    if cache is None and plan.cache.stores:
        cache = handle.adapter.new_cache(model, plan.copies * B, plan.capacity)
    parts = {
        "handle": handle,
        "plan": plan,
        "state": state,
        "sampling": sampling,
        "setting": plan.setting(sampling),
        "cache": cache,
        "row": row,
        "wanted": wanted,
        "cache_rows": B,
        "history": history,
        "banned": Banned.of(sampling),
    }
    if preset.drafts > 1:
        return Drafted(**parts, drafts=Drafts.empty(state, plan.lanes))
    if preset.cfg_scale:
        return Guided(**parts)
    if preset.shadow:
        return Shadowed(**parts)
    return Opening(**parts) if preset.first_token else Forward(**parts)

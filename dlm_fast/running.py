"""The run of a decode: rows from a source go through slots, and come out as they finish."""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlm_kernels import RowState
from dlm_kernels.state import DONE, REFRESH

from .call import Decoder
from .decoding.pages import Pages, Prefix, common, copy_page, ends_with_a_block, set_pages
from .decoding.plan import Bucket, Plan, placed_rows
from .decoding.progress import StepTooLarge, is_out_of_memory
from .decoding.shapes import Grid
from .decoding.slots import Needs, Slots, idle_canvas
from .draws import sampling_of
from .models.cache import Paging
from .output import Completion, Failure, completions_of
from .requests import Requests
from .stopper import Stopper
from .stops import StopStrings


@dataclasses.dataclass(frozen=True)
class Row:
    """One row that is to be decoded.

    Attributes:
        batch: what it asks for, as a batch of one row.
        number: number of its request.
        sample: number of the row among those of its request.
        id: what the request is called.
    """

    batch: Requests
    number: int
    sample: int = 0
    id: Any = None

    @property
    def opened(self) -> Tensor:
        return self.batch.opened[0]

    @property
    def needs(self) -> Needs:
        batch = self.batch
        return Needs(batch.temperature[0] > 0, batch.min_new_tokens[0] > 0, batch.seeds[0])


@dataclasses.dataclass(frozen=True)
class Place:
    """What a row that is admitted has of the cache.

    Attributes:
        pages: for each of its canvases, its pages.
        prefix: the beginning of its prompt that was there already.
        kind: what the keys of its prompt depend on beside its ids.
        shared: token ids of the prompt that other rows may share; empty where none may.
    """

    pages: list[list[int]] = dataclasses.field(default_factory=list)
    prefix: Prefix = dataclasses.field(default_factory=Prefix)
    kind: Hashable = None
    shared: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a response that is final.

    Attributes:
        index: number of the request.
        sample: number of the answer among those to the request.
        id: what the request is called.
        ids: token ids, 1-D int64, that were added to those before; without an EOS.
        text: the text that they add; None without a tokenizer. A part of a character waits for the rest of it, and so
            does what may be the beginning of a stop string.
        last: whether the row is done.
    """

    index: int
    sample: int
    id: Any
    ids: Tensor
    text: str | None
    last: bool


class Feed:
    """The closed blocks of one row, as they are told.

    Attributes:
        row: the row.
        start: position behind the last one that was told.
        told: characters that were told.
    """

    def __init__(self, row: Row, tokenizer: Any) -> None:
        self.row, self.tokenizer = row, tokenizer
        self.start, self.told = row.batch.prompt_lengths[0], 0
        stops = row.batch.stop_strings[0]
        self.stops = stops if stops is not None or tokenizer is None else StopStrings.none(tokenizer)

    def closed(self, tokens: Tensor, steps: Tensor, end: int) -> Block | None:
        """What the canvas [L] adds up to a position; None if nothing."""
        row, first = self.row, self.row.batch.prompt_lengths[0]
        end = min(end, len(row.batch.canvases[0]))
        ids, written = tokens[first:end].tolist(), (steps[first:end] >= 0).tolist()
        ends = [j for j, token in enumerate(ids) if written[j] and token in row.batch.eos_token_ids]
        if end <= self.start or ends or self.stops is not None and self.stops.ids & set(ids):
            return None  # the last block tells the rest
        text = None
        if self.stops is not None:
            settled = self.stops.settled(ids)
            if self.stops.find(settled) is not None:
                return None
            settled = (
                settled[: max(self.told, len(settled) - self.stops.longest + 1)] if self.stops.strings else settled
            )
            text, self.told = settled[self.told :], max(self.told, len(settled))
        added, self.start = tokens[self.start : end].clone(), end
        return Block(row.number, row.sample, row.id, added, text, False)

    def last(self, done: Completion) -> Block:
        """What a row adds that is done."""
        row, told = self.row, self.start - self.row.batch.prompt_lengths[0]
        text = None if done.text is None else done.text[self.told :]
        return Block(row.number, row.sample, row.id, done.ids[told:], text, True)


class Runner:
    """The buffers of a decoder, and the rows that go through them.

    Attributes:
        decoder: the model and its decoder.
        asked: a batch that asks for what is the same for all rows; its own rows do not count.
        plan: what is the same for every step.
        grid: the shapes of the steps.
        paging: how the cache is cut into pages; None = it is in one piece.
        shares: whether rows share the beginnings of their prompts.
        slots: the slots; None until the first row comes.
        pages: the pool of the cache's pages; None of a cache in one piece.
        shapes: how many steps of every shape there were.
        in_work: the row of every slot that has one.
        on_block: a function that is called with every block of a row that is closed.
        on_step: a function that is called with the state of all slots after every step.
        cancelled: a function that says before every step whether the caller wants no more of them.
    """

    def __init__(
        self,
        decoder: Decoder,
        asked: Requests,
        plan: Plan,
        grid: Grid,
        paging: Paging | None = None,
        shares: bool = False,
    ) -> None:
        self.decoder, self.asked, self.plan, self.grid = decoder, asked, plan, grid
        self.paging, self.shares = paging, shares
        self.pages = None if paging is None else Pages(paging)
        self.slots: Slots | None = None
        self.shapes: Counter[Bucket] = Counter()
        self.on_step: Callable[[RowState], None] | None = None
        self.cancelled: Callable[[], bool] | None = None
        self.in_work: dict[int, tuple[Row, Place]] = {}
        self.on_block: Callable[[Block], None] | None = None
        self._ready: deque[tuple[Completion, Failure | None]] = deque()
        self._feeds: dict[int, Feed] = {}
        self._filling: set[int] = set()
        self._coming: dict[int, tuple[Row, Place]] = {}
        self._head: tuple[Row, tuple[Hashable, tuple[int, ...], int]] | None = None
        self._stopper = Stopper(plan.mask_id, bool(plan.preset.families & {"edit", "revise"}))

    @property
    def dtype(self) -> torch.dtype:
        """What the model computed in when the slots were opened."""
        return self._dtype

    def open(self) -> Slots:
        """The slots, whose buffers are allocated once. Raises StepTooLarge if the memory does not suffice."""
        if self.slots is not None:
            return self.slots
        handle, plan, device = self.decoder.handle, self.plan, self.decoder.device
        rows = plan.first.shape[0]
        idle = self.asked.idle([idle_canvas(plan)] * rows)
        try:
            # Buffers of the inference mode could not be written in a later call outside it.
            with torch.inference_mode(False):
                written = {
                    name: torch.zeros_like(x)
                    for name in ("first", "prefilled")
                    if (x := getattr(plan, name)) is not None
                }
                self.plan = plan = dataclasses.replace(plan, **written)
                cache = None
                if plan.cache.stores:
                    cache = handle.adapter.new_cache(handle.model, plan.copies * rows, plan.capacity, self.paging)
                self.slots = Slots(handle, plan, self.grid, sampling_of(idle, plan, device), cache)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise StepTooLarge(None) from error
        self.slots.rounds.ran, self._dtype = self.shapes, handle.adapter.compute_dtype(handle.model)
        return self.slots

    def run(
        self, source: Iterable[Row | Completion], *, at_once: bool = True
    ) -> Iterator[tuple[Completion, Failure | None]]:
        """Decodes rows, as many together as there are slots, and gives each when it is done; without `at_once` when all
        that are in work are done, which costs the device fewer stops. What the source has of a row already is given as
        it is.

        Whoever closes the iterator, or sees it raise, gets the rows that were in work by `stopped`.
        """
        waiting, head = iter(source), None
        while True:
            # 1. Free slots take the next rows, in order: one that must wait lets nobody pass.
            admitted: list[tuple[int, Row, Place]] = []
            free = list(range(self.plan.first.shape[0])) if self.slots is None else list(self.slots.free)
            while len(admitted) < len(free):
                head = next(waiting, None) if head is None else head
                if head is None:
                    break
                if isinstance(head, Completion):
                    given, head = head, None
                    yield given, None
                    continue
                slots = self.open()
                place = self._place(head)
                if place is None:
                    break
                admitted.append((free[len(admitted)], head, place))
                self._coming[free[len(admitted) - 1]] = (head, place)
                head = None
            if admitted:
                self._admit(slots, admitted)
            if self.slots is None or not self.in_work:
                assert head is None, "a row that fits alone was not admitted"
                return

            # 2. A round of steps.
            rounds = self.slots.rounds
            rounds.after_step, rounds.cancelled = self._after_step, self.cancelled
            rounds.run()

            # 3. What it has finished.
            self._keep_prefixes()
            self._tell_blocks()
            done = self.slots.done()
            if done and (at_once or len(done) == len(self.in_work)):
                feeds = [self._feeds.get(slot) or Feed(self.in_work[slot][0], self.decoder.tokenizer) for slot in done]
                found = self.take(done)
                self._ready.extend(found)
                for feed, (row, _) in zip(feeds, found) if self.on_block is not None else ():
                    self.on_block(feed.last(row))
                while self._ready:
                    yield self._ready.popleft()

    def _place(self, row: Row) -> Place | None:
        """What a row gets of the cache; None if it must wait for it."""
        if self.pages is None:
            return Place()
        # 1. The beginning of its prompt that is there, or that a row in work is about to compute.
        if self._head is None or self._head[0] is not row:
            self._head = (row, self._shared(row))  # a row that waits is asked again after every round
        kind, shared, offset = self._head[1]
        block = 1 if self.plan.diffusion.causal_prefix else self.plan.block_length
        prefix = Prefix()
        if shared:
            prefix = self.pages.find(kind, shared, block, offset)
            for other in (*self._coming.values(), *(self.in_work[slot] for slot in self._filling)):
                if other[1].kind == kind:
                    alike = ends_with_a_block(common(other[1].shared, shared), block, offset)
                    if alike > prefix.length:
                        return None

        # 2. Pages of its own for all the rest. What it would share may itself be in the way.
        count, choices = self.pages.needed(len(row.opened)), [prefix]
        if prefix.rest is not None:
            choices.append(prefix.of_whole_pages(self.pages.page_size, block, offset))
        if prefix.length and not self.in_work and not self._coming:
            choices.append(Prefix())
        for prefix in choices:
            own = self.pages.take(self.plan.copies * count - len(prefix.pages), beside=prefix)
            if own is not None:
                break
        else:
            return None
        if prefix.rest is not None:
            copy_page(self.slots.cache, prefix.rest, own[0])
        mine = [*prefix.pages, *own]
        pages = [mine[copy * count : (copy + 1) * count] for copy in range(self.plan.copies)]
        return Place(pages, prefix, kind, shared)

    def _shared(self, row: Row) -> tuple[Hashable, tuple[int, ...], int]:
        """What the keys of a row's prompt depend on beside its ids, the ids that may be shared, and where a block ends.

        A prompt that its model sees as one block is shared as a whole, and only by equal prompts.
        """
        if not self.shares:
            return None, (), 0
        plan, diffusion = self.plan, self.plan.diffusion
        start = int(placed_rows([row.opened], len(row.opened), plan.block_length, plan.preset, diffusion).block_start)
        # What predicts the first position behind the prompt is the prompt's last row, which is then computed anyway.
        most, ids = start - int(plan.previous or plan.preset.first_token), row.opened.tolist()
        if diffusion.causal_prefix:
            return None, tuple(ids[:most]), 0
        if diffusion.block_alignment == "abs":
            return None, tuple(ids[:most]), 0
        if diffusion.block_alignment == "both":
            return start % plan.block_length, tuple(ids[:most]), start
        return tuple(ids[:start]), tuple(ids[:start]) if most == start else (), start

    def _admit(self, slots: Slots, admitted: list[tuple[int, Row, Place]]) -> None:
        batch = Requests.joined([row.batch for _, row, _ in admitted])
        numbers = [slot for slot, _, _ in admitted]
        rows = self.plan.first.shape[0]
        for slot, _, place in admitted:
            for copy, pages in enumerate(place.pages):
                set_pages(slots.cache, copy * rows + slot, pages)
        slots.admit(
            numbers,
            batch.opened,
            partial(sampling_of, batch, device=self.decoder.device),
            [row.needs for _, row, _ in admitted],
            [place.prefix.length for _, _, place in admitted] if self.shares else None,
        )
        self._stopper.admit(numbers, batch)
        self.in_work |= self._coming
        self._filling |= {slot for slot, _, place in admitted if place.shared}
        self._coming.clear()

    @property
    def _after_step(self) -> Callable[[RowState], None] | None:
        """What the loop calls after a step: stop strings end rows first, then the user's function sees the state."""
        if not self._stopper.rows:
            return self.on_step
        stopper, on_step = self._stopper, self.on_step

        def after_step(state: RowState) -> None:
            stopper(state)
            if on_step is not None:
                on_step(state)

        return after_step

    def _keep_prefixes(self) -> None:
        """Keeps the prompts that have been computed, for rows that begin alike."""
        phases = self.slots.rounds.progress.needs[0]
        for slot in [slot for slot in self._filling if phases[slot] != REFRESH]:
            self._filling.remove(slot)
            place = self.in_work[slot][1]
            self.pages.keep(place.kind, place.shared, place.pages[0])

    def take(self, slots: list[int]) -> list[tuple[Completion, Failure | None]]:
        """The rows of some slots as far as they are, and what failed of each; the slots are free."""
        rows = [self.in_work[slot][0] for slot in slots]
        found = self._completions(rows, self.slots.rows(slots))
        self.release(slots)
        return found

    def _tell_blocks(self) -> None:
        """Tells what was closed since the last round, of rows that are not done."""
        if self.on_block is None:
            return
        phases, begins = (self.slots.rounds.progress.needs[n] for n in (0, 5))
        feeds = {
            slot: self._feeds.get(slot) or Feed(row, self.decoder.tokenizer) for slot, (row, _) in self.in_work.items()
        }
        self._feeds = feeds
        closed = [slot for slot, feed in feeds.items() if phases[slot] != DONE and begins[slot] > feed.start]
        if closed:
            state = self.slots.rows(closed)
            for b, slot in enumerate(closed):
                block = feeds[slot].closed(state.tokens[b], state.unmask_step[b], int(state.block_start[b]))
                if block is not None:
                    self.on_block(block)

    def stopped(self) -> list[tuple[Completion, Failure | None]]:
        """What was finished and not given, and the rows in work as far as they got; all slots are free."""
        given = list(self._ready)
        self._ready.clear()
        self._coming = {slot: row for slot, row in self._coming.items() if slot not in self.in_work}
        given += self.take(sorted(self.in_work)) if self.in_work else []
        # Rows that were stopped on their way into a slot, which may hold a part of them.
        coming = [row for row, _ in self._coming.values()]
        for place in [place for _, place in self._coming.values()]:
            self._give_back(place)
        if self._coming:
            self.slots.clear(sorted(self._coming))
        self._coming.clear()
        return given + self.untouched(coming)

    def untouched(self, rows: list[Row]) -> list[tuple[Completion, Failure | None]]:
        """Rows that no step was taken of."""
        plan, width = self.plan, max((len(row.opened) for row in rows), default=0)
        state = placed_rows([row.opened for row in rows], width, plan.block_length, plan.preset, plan.diffusion)
        return self._completions(rows, state)

    def _completions(self, rows: list[Row], state: RowState) -> list[tuple[Completion, Failure | None]]:
        if not rows:
            return []
        batch, numbers = (
            Requests.joined([row.batch for row in rows]),
            [(row.number, row.sample, row.id) for row in rows],
        )
        return completions_of(batch, state, numbers, self.decoder.tokenizer, self.decoder.handle.diffusion)

    def release(self, slots: list[int]) -> None:
        """Frees slots, with the pages of their rows."""
        for slot in slots:
            _, place = self.in_work.pop(slot)
            self._filling.discard(slot)
            self._feeds.pop(slot, None)
            self._stopper.rows.pop(slot, None)
            self._give_back(place)
        self.slots.release(slots)

    def _give_back(self, place: Place) -> None:
        for pages in place.pages:
            self.pages.give(pages)

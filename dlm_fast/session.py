"""`Session`: buffers that outlive a call, and slots that stay full."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from dlm_kernels import RowState

from .call import check_cancel, check_function, check_mode, read_decoder, read_rows
from .decoding.budget import MemoryPlan
from .decoding.progress import StepsCancelled, StepTooLarge
from .limits import flag, heat, shown, whole
from .models.changes import Look, watch_optimizers
from .output import Completion, DecodeCancelled, DecodeInterrupted, DecodeOutOfMemory, stopped
from .patching import handle_of
from .presets import Preset
from .requests import Requests
from .running import Block, Row, Runner
from .sizing import Capacity, check_memory, planned, planned_memory
from .stops import StopReader

# The most positions of a row where nobody says how many, whatever the model could have: a cache of all positions that
# a model has room for is larger than the model.
MAX_POSITIONS = 4096
# What an error of a batch calls its only row.
_ROW = re.compile(r"\b(prompt|canvas)s?\[0\]")
SETTINGS = ("max_new_tokens", "min_new_tokens", "temperature", "seed", "stop_strings")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is decoded for one prompt; None = as the session says.

    Attributes:
        prompt: a string, a chat, or token ids, as for `generate`.
        canvas: a row to fill in, instead of a prompt; of a session with `infill=True`.
        max_new_tokens: number of masks behind the prompt, at most those of the session.
        min_new_tokens: number of response tokens before which no EOS is drawn.
        temperature: temperature of the draws; 0 = greedy.
        seed: random seed.
        stop_strings: strings that end the text.
        request_id: number that keys the noise. Default: the request's number in its call times `n`, plus the number of
            the sample.
        id: any value, which the result repeats.
    """

    prompt: Any = None
    canvas: Any = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    stop_strings: Sequence[str] | None = None
    request_id: int | None = None
    id: Any = None


class Session:
    """A decoder with slots that stay full: a slot whose row is done takes the next prompt at once.

    The buffers are made at the first call and serve all calls: the canvases, the cache, what the decoder keeps. Each
    row gets the tokens that `generate` gives it alone, with the same number of forwards and of positions, whatever
    comes before it, beside it or after it (for 16 bits see `generate`).

    By default the cache has room for `max_positions` in every slot. With `cache_positions` it is cut into pages: a row
    takes pages for its own length when it is admitted, and gives them back when it is done. Where too few pages are
    free, the next row waits until others are done. So `cache_positions` may be far less than `slots * max_positions`.

    With `share_prefixes` the keys of a prompt are kept after its row is done, and a prompt that begins alike does not
    compute them again. Shared is up to the last block that ends inside the common beginning. The kept pages are
    forgotten when rows need them, and when a weight was changed between two calls.

    Every call decodes the weights that the model has when it begins: changed in place by an optimizer or another op of
    torch, replaced by other parameters, or with other adapters of peft. A model that is decoded through a native twin
    (`patch`) takes changes in place, and a replaced parameter is an error of the call. A change that torch does not
    count, through `.data` or by a kernel of one's own, is taken too, but kept prompts do not notice it: call
    `forget_prefixes` after it. Do not change weights while a call is at work.

        session = dlm_fast.Session(model, preset="d2f", slots=8, max_positions=1024)
        for index, row in session.generate(prompts, stream=True):
            print(index, row.text)
    """

    def __init__(
        self,
        model: nn.Module,
        preset: str | Preset | None = None,
        *,
        slots: int = 8,
        max_positions: int | None = None,
        max_new_tokens: int = 128,
        infill: bool = False,
        share_prefixes: bool = False,
        page_size: int = 64,
        cache_positions: int | None = None,
        memory: int | None = None,
        lengths: Sequence[tuple[int, int]] | None = None,
        policy: Any = None,
        min_new_tokens: int = 0,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float | None = None,
        seed: int = 0,
        stop_strings: Sequence[str] = (),
        banned_token_ids: Sequence[int] = (),
        eos_token_ids: Sequence[int] | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        """
        Args:
            model: a patched or loaded model, as for `generate`.
            preset: the decoder, as for `generate`.
            slots: how many rows are decoded together.
            max_positions: the most positions of a row, prompt and new tokens. Default: those that the model was opened
                with, else those of the model, 4096 at most.
            max_new_tokens: the most new tokens of a request, and the number where a request has none of its own. Of a
                canvas, the positions from its first mask on count.
            infill: whether requests may be canvases.
            share_prefixes: whether the beginnings of prompts are shared. For block-causal models and caches that never
                change a key.
            page_size: positions of a page of the cache, a power of two from 32 on.
            cache_positions: positions that the cache holds of all rows together, rounded up to pages. Default:
                `slots * max_positions`, not in pages unless beginnings are shared.
            memory: the most bytes that weights and buffers may take on a device. Default: what is free.
            lengths: (prompt, new tokens) of requests as they are expected, for which the shapes of steps are planned.
                Default: all lengths up to `max_positions`, short ones more densely. Whatever the lengths, all rows fit.
            policy: as for `generate`, and so are the other arguments; those of a row hold where its request has none.
        Raises:
            ValueError, TypeError: as `generate`.
            BatchTooLarge: the buffers and the largest step cannot fit the memory; the message says what would.
        """
        # 1. The decoder, and what all requests have in common.
        check = [("slots", slots, 1), ("max_new_tokens", max_new_tokens, 1), ("min_new_tokens", min_new_tokens, 0)]
        for name, value, low in check:
            whole("Session", name, value, low)
        whole("Session", "cache_positions", cache_positions, 1, none=True)
        whole("Session", "memory", memory, 1, 2**60, none=True)
        for name, value in (("infill", infill), ("share_prefixes", share_prefixes)):
            flag("Session", name, value)
        if not isinstance(page_size, int) or isinstance(page_size, bool) or page_size < 32 or page_size & page_size - 1:
            raise ValueError(f"Session: page_size must be a power of two >= 32, got page_size={shown(page_size)}")
        self._decoder = decoder = read_decoder(
            model,
            preset=preset,
            policy=policy,
            temperature=temperature,
            top_p=top_p,
            tokenizer=tokenizer,
            options=options,
        )
        heat("Session", "temperature", decoder.temperature)
        if lengths is not None and not isinstance(lengths, Sequence):
            raise TypeError(f"Session: lengths must be a list of pairs or None, got lengths={shown(lengths)}")
        self._model = model
        self._common = {
            "attention_mask": None,
            "top_k": top_k,
            "banned_token_ids": banned_token_ids,
            "eos_token_ids": eos_token_ids,
        }
        self._defaults = dict(zip(SETTINGS, (max_new_tokens, min_new_tokens, decoder.temperature, seed, stop_strings)))
        self._stops = StopReader(decoder.tokenizer, decoder.handle.diffusion.mask_token_id)
        self._defaults["stop_strings"] = self._stops(stop_strings)
        asked = self._read([], None, {}, [])

        # 2. Sizes.
        handle = decoder.handle
        config = handle.model.config
        limit = min(x for x in (handle.max_positions, config.max_position_embeddings) if x is not None)
        whole("Session", "max_positions", max_positions, 2, limit, none=True)
        if max_positions is None:
            max_positions = limit if handle.max_positions is not None else min(limit, MAX_POSITIONS)
        if max_new_tokens >= max_positions:
            raise ValueError(
                f"Session: max_new_tokens must be below max_positions={max_positions}, got "
                f"max_new_tokens={max_new_tokens}"
            )
        if handle.max_rows is not None and slots > handle.max_rows:
            raise ValueError(f"Session: slots must be <= max_rows={handle.max_rows} of the model, got slots={slots}")
        capacity = Capacity(slots, max_positions, max_new_tokens, infill, share_prefixes, page_size, cache_positions)
        plan, grid, paging = planned(decoder, asked, capacity, lengths)
        self.capacity = capacity
        self._runner = Runner(decoder, asked, plan, grid, paging, share_prefixes)
        self._memory_plan: MemoryPlan | None = None
        check_memory(decoder, asked, capacity, (plan, grid, paging), lengths, memory)
        self._look: Look | None = None
        if share_prefixes:
            watch_optimizers()
        self._open = False
        #: Rows that were finished and not handed out when the last call was closed or interrupted.
        self.undelivered: list[Completion] = []

    def plan(self) -> MemoryPlan:
        """What the session takes of the memory of each device, by what takes it; nothing is allocated for it."""
        if self._memory_plan is None:
            runner = self._runner
            self._memory_plan = planned_memory(runner.decoder, runner.asked, runner.plan, runner.grid, runner.paging)
        return self._memory_plan

    @property
    def shapes(self) -> dict:
        """How many steps of every shape all calls took (`GenerateOutput.shapes`)."""
        return dict(self._runner.shapes)

    def generate(
        self,
        requests: Iterable[Any],
        *,
        n: int = 1,
        stream: bool = False,
        on_block: Callable[[Block], None] | None = None,
        on_step: Callable[[RowState], None] | None = None,
        cancel: Any = None,
    ) -> list[Completion] | Iterator[tuple[int, Completion]]:
        """Decodes requests; a slot whose row is done takes the next one, which is read only then.

        Args:
            requests: an iterable of `Request`, of mappings with its fields, or of prompts.
            n: answers to each request, each with noise of its own.
            stream: whether rows are handed out as they are done.
            on_block: a function that is called with a `Block` for each row whenever a block of its response is closed,
                and once when the row is done. The texts of a row's blocks add up to its text.
            on_step: a function that is called with the state of all slots after every step.
            cancel: as for `generate`.
        Returns:
            The rows in the order of the requests, `n` for each; with `stream` an iterator of (number of the request,
            row) in the order in which they are done. A request that cannot be decoded has finish "error" and its
            `error`, and the others are decoded; so has a row whose logits hold NaN or whose policy makes no progress.
        Raises:
            DecodeCancelled, DecodeOutOfMemory, DecodeInterrupted: as `generate`; `output` is a list of `Completion`:
                the rows that are done (with `stream`: and were not handed out), and those in work as far as they got.
            RuntimeError: the session is at work on another call, or the model was unpatched or moved.
        """
        whole("generate", "n", n, 1)
        flag("generate", "stream", stream)
        for name, function in (("on_block", on_block), ("on_step", on_step)):
            if function is not None:
                check_function(name, f"a function of {'a block' if name == 'on_block' else 'the state'}", function, 1)
        check_cancel(cancel)
        if isinstance(requests, (str, bytes, Mapping, Request)) or not isinstance(requests, Iterable):
            raise TypeError(f"generate: requests must be an iterable of requests, got requests={shown(requests)}")
        rows = self._rows(requests, n, on_block, on_step, None if cancel is None else cancel.is_set)
        if stream:
            return ((row.index, row) for row in rows)
        found: list[Completion] = []
        try:
            found.extend(rows)
        except (DecodeCancelled, DecodeOutOfMemory, DecodeInterrupted) as error:
            error.output = sorted([*found, *error.output], key=_order)
            raise
        return sorted(found, key=_order)

    def forget_prefixes(self) -> None:
        """Forgets the prompts that are kept, after a change of weights that nobody counts."""
        if self._open:
            raise RuntimeError("Session: forget_prefixes must follow the end of generate, which is at work")
        self._look = None

    def close(self) -> None:
        """Frees the buffers. A later call makes new ones."""
        if self._open:
            raise RuntimeError("Session: close must follow the end of generate, which is at work")
        self._renew()

    def _renew(self) -> None:
        """Frees the buffers."""
        runner = self._runner
        self._runner = Runner(runner.decoder, runner.asked, runner.plan, runner.grid, runner.paging, runner.shares)
        self._runner.shapes.update(runner.shapes)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _rows(
        self,
        requests: Iterable[Any],
        n: int,
        on_block: Callable[[Block], None] | None,
        on_step: Callable[[RowState], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> Iterator[Completion]:
        """The rows as they are done."""
        if self._open:
            raise RuntimeError("Session: generate must end, or its iterator be closed, before the next call")
        self._check()
        runner = self._runner
        self._open, self.undelivered = True, []
        runner.on_step, runner.cancelled, runner.on_block = on_step, cancelled, on_block
        finished = False
        try:
            for row, _ in runner.run(self._source(requests, n)):
                yield row
            finished = True
        except (StepTooLarge, StepsCancelled, KeyboardInterrupt) as error:
            output, finished = [row for row, _ in runner.stopped()], True
            raise stopped(error, sorted(output, key=_order), runner.shapes, "slots") from error.__cause__ or error
        finally:
            self._open = False
            if not finished:
                self.undelivered = self._given_up()
            runner.on_step = runner.cancelled = runner.on_block = None

    def _given_up(self) -> list[Completion]:
        """What was finished and not handed out; all slots are free."""
        try:
            return [row for row, _ in self._runner.stopped() if row.finish != "unfinished"]
        except Exception:  # what went wrong before is what the caller must see; the buffers may be of no use any more
            self._renew()
            return []

    def _source(self, requests: Iterable[Any], n: int) -> Iterator[Row | Completion]:
        """The rows of requests, and the result of a request that cannot be decoded."""
        for number, item in enumerate(requests):
            name = None
            try:
                request = _request(item)
                name = request.id
                keys = [number * n + sample for sample in range(n)]
                if request.request_id is not None:
                    keys = [request.request_id + sample for sample in range(n)]
                batch = self._batch(request, keys)
            except Exception as error:  # also what a tokenizer or a chat template raises
                yield Completion.refused(number, name, problem_of(error))
                continue
            for sample in range(n):
                yield Row(batch.of_rows([sample]), number, sample, name)

    def _batch(self, request: Request, keys: list[int]) -> Requests:
        """A request as rows, one for each key of noise. Raises ValueError and TypeError."""
        own = {name: value for name in SETTINGS if (value := getattr(request, name)) is not None}
        if "stop_strings" in own:
            own["stop_strings"] = self._stops(own["stop_strings"])
        if (request.prompt is None) == (request.canvas is None):
            raise ValueError("a request must have exactly one of prompt and canvas")
        for name in ("prompt", "canvas"):
            value = getattr(request, name)
            if value is not None and not isinstance(value, Iterable):
                raise TypeError(f"{name} must be a string, a chat or token ids, got {shown(value)}")
        if request.canvas is not None and not self.capacity.infill:
            raise ValueError("canvas needs a session with infill=True")
        rows = ([request.prompt], None) if request.canvas is None else (None, [request.canvas])
        batch = self._read(*rows, own, keys[:1])
        self.capacity.check(batch, self._decoder)
        pages = self._runner.pages
        if pages is not None:
            needed = self._runner.plan.copies * pages.needed(len(batch.opened[0]))
            if needed > pages.count:
                raise ValueError(
                    f"a row must fit the cache, of {pages.count} pages of {pages.page_size} positions, got one of "
                    f"{len(batch.opened[0])} positions, which needs {needed}"
                )
        if keys[-1] >= 2**31:
            raise ValueError(f"request_id must be below 2^31 for every sample, got {keys[-1]}")
        return dataclasses.replace(batch.of_rows([0] * len(keys)), request_ids=keys)

    def _read(self, prompts: list | None, canvas: list | None, own: Mapping[str, Any], keys: list[int]) -> Requests:
        arguments = {**self._defaults, **own}
        if canvas is not None:
            if "max_new_tokens" in own:
                raise ValueError("max_new_tokens goes with a prompt; a canvas says itself where tokens are wanted")
            arguments["max_new_tokens"] = None
        if "temperature" not in own:
            arguments["temperature"] = None  # that of the decoder, which was read before
        return read_rows(self._decoder, prompts=prompts, canvas=canvas, request_ids=keys, **self._common, **arguments)

    def _check(self) -> None:
        """Raises where the model is not as it was when the session was made; forgets prefixes of other weights."""
        decoder = self._decoder
        if handle_of(self._model) is not decoder.handle:
            raise RuntimeError("Session: the model was unpatched, or patched again; make a new session")
        check_mode(self._model)
        model = decoder.handle.checked_model()
        if next(model.parameters()).device != decoder.device:
            raise RuntimeError("Session: the model was moved to another device; make a new session")
        runner = self._runner
        dtype = decoder.handle.adapter.compute_dtype(model)
        if runner.slots is not None and runner.dtype != dtype:
            raise RuntimeError(f"Session: the model was cast from {runner.dtype} to {dtype}; make a new session")
        if runner.shares:
            look, before = Look(model), self._look
            if before is None or not look.equals(before):
                runner.pages.forget()
            self._look = look


def problem_of(error: Exception) -> str:
    """What is wrong with a request, as its result says it."""
    problem = _ROW.sub(r"\1", str(error)).removeprefix("generate: ")
    return problem if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: {problem}"


def _order(row: Completion) -> tuple[int, int]:
    return row.index, row.sample


def _request(item: Any) -> Request:
    """A request from what the caller gave."""
    if isinstance(item, Request):
        return item
    if isinstance(item, Mapping) and "input_ids" not in item and "role" not in item:
        known = {field.name for field in dataclasses.fields(Request)}
        unknown = sorted(str(name) for name in set(item) - known)
        if unknown:
            raise ValueError(f"a request may have {', '.join(sorted(known))}, got {', '.join(unknown)}")
        return Request(**item)
    return Request(item)

"""The lines of a job as rows of one decoder."""

from __future__ import annotations

import dataclasses
import heapq
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..call import read_call, read_rows
from ..decoding.memory import Batch, check_steps
from ..decoding.plan import first_mask
from ..generate import generate
from ..limits import shown
from ..requests import Requests
from ..running import Runner
from ..sizing import MOST_LENGTHS, Capacity, planned
from ..stops import StopReader
from .lines import LINE_SETTINGS, Line

SIGNATURE = inspect.signature(generate)
# What a job gives `generate` itself, so that no setting may be called like it.
OWN_ARGUMENTS = (
    "model",
    "prompts",
    "canvas",
    "attention_mask",
    "request_ids",
    "batch_size",
    "on_step",
    "cancel",
    "tokenizer",
)
# What an error calls the only row.
_ROW = re.compile(r"\b(prompts|canvas)\[0\]")
# Positions of a page of the cache.
PAGE_SIZE = 64


class Rows:
    """Reads lines as rows of the decoder that the settings of a job name.

    Attributes:
        decoder: the model and the decoder.
        asked: a batch without rows, which asks for what is the same for all.
    """

    def __init__(self, model: nn.Module, settings: Mapping[str, Any], wrap_prompt: Callable[[Any], Any]) -> None:
        """Raises ValueError or TypeError for what is wrong with the settings, as `generate` does."""
        bound = SIGNATURE.bind(model, **settings, prompts=[])
        bound.apply_defaults()
        names = ("on_step", "cancel", "batch_size")
        call = read_call(**{name: value for name, value in bound.arguments.items() if name not in names})
        self.decoder, self.asked = call.decoder, call.batch
        self._settings, self._wrap = settings, wrap_prompt
        # A canvas has its own end, so that what becomes of a last block is a matter of prompts.
        self._of_canvases = dataclasses.replace(call.decoder, last_block=None)
        shared = ("attention_mask", "top_k", "banned_token_ids", "eos_token_ids")
        self._common = {name: bound.arguments[name] for name in shared}
        self._read_stops = StopReader(call.decoder.tokenizer, call.decoder.handle.diffusion.mask_token_id)
        self._stops = self._read_stops(tuple(bound.arguments["stop_strings"]))

    def read(self, line: Line, index: int) -> Requests:
        """A line as a batch of one row. Raises whatever keeps it from being decoded."""
        given, decoder = line.record[line.kind], self.decoder
        own = {name: line.setting(self._settings, name) for name in LINE_SETTINGS}
        stops = self._stops if line.stop is None else self._read_stops(tuple(line.stop))
        if line.kind == "prompt":
            prompts, canvas = [self._chat(line, self._wrap(given))], None
        else:
            prompts, canvas, own["max_new_tokens"], decoder = None, [given], None, self._of_canvases
        ids = {"request_ids": [index], "stop_strings": stops}
        return read_rows(decoder, prompts=prompts, canvas=canvas, **own, **ids, **self._common)

    def problem(self, line: Line, error: Exception) -> str:
        """What an error says of a line."""
        problem = _ROW.sub(line.kind, str(error)).removeprefix("generate: ")
        if line.stop is not None:
            problem = problem.replace("stop_strings need ", "stop needs ").replace("stop_strings", "stop")
        return problem if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: {problem}"

    def _chat(self, line: Line, prompt: Any) -> Any:
        """A prompt with the line's system message before it."""
        system = line.record.get("system")
        if system is None:
            return prompt
        if not isinstance(prompt, list) or not prompt or not all(isinstance(part, Mapping) for part in prompt):
            raise ValueError(
                "system goes with a prompt that becomes a chat: one of text, or a chat, for a tokenizer with a chat "
                f"template and without --raw; got system={shown(system)}"
            )
        if any(message.get("role") == "system" for message in prompt):
            raise ValueError("system goes with a chat that has no system message of its own, got one with both")
        return [{"role": "system", "content": system}, *prompt]


class Sizes:
    """How long the rows of a job are: what its buffers must hold, and the lengths that its steps are planned for.

    The sizes are those of all lines, whichever of them are there already and whichever rank decodes them, so that a
    resumed job takes the same steps.

    Attributes:
        longest: indices of the longest rows, as many as are decoded together, by their number of positions.
    """

    def __init__(self, lines: int, together: int) -> None:
        self._lengths = np.zeros((lines, 2), dtype=np.int32)  # of each row the positions before and from its first mask
        self._together = together
        self._largest: list[tuple[int, int]] = []
        self._positions = self._new = 1
        self._infill = False

    def add(self, index: int, batch: Requests, mask_id: int, infill: bool) -> None:
        """Counts a row."""
        canvas, positions = batch.canvases[0], len(batch.opened[0])
        first = first_mask(canvas, mask_id)
        self._lengths[index] = max(1, first), max(1, len(canvas) - max(1, first))
        self._positions = max(self._positions, positions, int(self._lengths[index].sum()))
        self._new, self._infill = max(self._new, len(canvas) - first), self._infill or infill
        push = heapq.heappush if len(self._largest) < self._together else heapq.heappushpop
        push(self._largest, (positions, -index))

    @property
    def longest(self) -> list[int]:
        return [-index for _, index in sorted(self._largest, reverse=True)]

    def open(self, rows: Rows, canvases: list[Tensor]) -> Runner:
        """The slots for rows of these sizes. Raises BatchTooLarge if the longest rows, `canvases`, cannot fit together.

        The cache has pages for the longest rows together, so that none ever waits for another.
        """
        decoder, together = rows.decoder, len(self._largest)
        pages = sum(-(-positions // PAGE_SIZE) for positions, _ in self._largest)
        cache = pages * PAGE_SIZE if decoder.preset.operation.stores else None
        capacity = Capacity(together, self._positions, self._new, self._infill, False, PAGE_SIZE, cache)
        good = self._lengths[self._lengths[:, 0] > 0]
        lengths = [tuple(pair) for pair in good[:: -(-len(good) // MOST_LENGTHS)].tolist()]
        plan, grid, paging = planned(decoder, rows.asked, capacity, lengths)
        batch = Batch(decoder.handle, canvases, together, decoder.preset, decoder.handle.diffusion, decoder.device)
        check_steps(batch, plan, grid, paging)
        return Runner(decoder, rows.asked, plan, grid, paging)

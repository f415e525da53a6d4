"""Per-row decode state: a struct of device tensors that `unmask` advances in place."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .checks.named import shown

# What a row needs next. A row that needs another kind of step than the one being run sits it out unchanged.
REFRESH, DENOISE, COMMIT, DONE = 0, 1, 2, 3

# Bits of `RowState.error`.
ERROR_LOGITS = 1  # a needed row of logits held NaN or +inf, or no token that may be drawn
ERROR_STALLED = 2  # the row took more denoise steps than its decoder allows


@dataclasses.dataclass(frozen=True)
class RowState:
    """Where every row of the batch stands. No field is read by the host inside a step.

    A state is written in three places: where a decode is opened, by `unmask`, and by `amend`, through which goes
    whatever else a decoder does to a row. A step of some rows works on a copy of them (`of_rows`), which `put_rows`
    writes back.

    `L` is the width of the canvas buffer; row `b` uses positions [0, canvas_len[b]). The current region of row `b` is
    [block_start[b], block_end[b]): its current block or, in a pipeline, the blocks that were appended and are not yet
    committed. int32 unless said otherwise.

    Attributes:
        tokens: [B, L] int64 canvas; masked positions hold the mask id.
        unmask_step: [B, L] the row's own denoise step at which the position was unmasked, -1 = given or still masked.
        unmask_confidence: [B, L] fp32 probability of the token when it was written; 0 where none was.
        canvas_len: [B] end of the row's canvas.
        block_start, block_end: [B] current region.
        block_masks: [B] masked positions of the current block when it was opened (the quota's m0).
        block_step: [B] denoise steps taken in the current block; in a delayed pipeline, those that found the first
            finished.
        step: [B] denoise steps taken by the row.
        phase: [B] REFRESH, DENOISE, COMMIT or DONE: what the row needs next.
        nfe: [B] forwards the row took part in, cache refreshes and commits included.
        query_tokens: [B] positions computed over those forwards.
        error: [B] error bits; a row with an error is DONE.
    """

    tokens: Tensor
    unmask_step: Tensor
    unmask_confidence: Tensor
    canvas_len: Tensor
    block_start: Tensor
    block_end: Tensor
    block_masks: Tensor
    block_step: Tensor
    step: Tensor
    phase: Tensor
    nfe: Tensor
    query_tokens: Tensor
    error: Tensor

    def clone(self) -> RowState:
        return RowState(**{f.name: getattr(self, f.name).clone() for f in dataclasses.fields(self)})

    @classmethod
    def empty(cls, B: int, L: int, device: torch.device | str) -> RowState:
        """A state of zeros (no row has a canvas yet), to be filled by the loop. Its [B] fields lie in one buffer.

        Raises:
            TypeError, ValueError: B or L is no whole number, or below 0.
        """
        for name, size in (("B", B), ("L", L)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"RowState.empty: {name} must be an int, got {name}={shown(size)}")
            if not 0 <= size < 2**31:
                raise ValueError(f"RowState.empty: {name} must be in [0, 2^31), got {name}={shown(size)}")
        # A field begins at a multiple of 16 bytes, as a tensor of its own would.
        buffer = torch.zeros(len(ROW_FIELDS), -(-B // 4) * 4, dtype=torch.int32, device=device)
        return cls(
            tokens=torch.zeros(B, L, dtype=torch.int64, device=device),
            unmask_step=torch.full((B, L), -1, dtype=torch.int32, device=device),
            unmask_confidence=torch.zeros(B, L, dtype=torch.float32, device=device),
            **dict(zip(ROW_FIELDS, buffer.narrow(1, 0, B).unbind())),
        )

    def of_rows(self, rows: Tensor) -> RowState:
        """A copy of some rows [n] int64, in their order."""
        buffer = self._buffer()
        if buffer is None:
            buffer = torch.stack([getattr(self, name) for name in ROW_FIELDS])
        canvases = {name: getattr(self, name).index_select(0, rows) for name in CANVAS_FIELDS}
        return RowState(**canvases, **dict(zip(ROW_FIELDS, columns_of(buffer, rows))))

    def put_rows(self, rows: Tensor, part: RowState) -> None:
        """Writes `part`, a state of n rows, over the rows [n] int64, which are n different ones."""
        fields = [(getattr(self, name), getattr(part, name)) for name in CANVAS_FIELDS]
        buffer, new = self._buffer(), part._buffer()
        if buffer is None or new is None:
            fields += [(getattr(self, name), getattr(part, name)) for name in ROW_FIELDS]
        else:
            buffer.index_copy_(1, rows, new)
        for field, values in fields:
            field.index_copy_(0, rows, values)

    def _buffer(self) -> Tensor | None:
        """[F, B]: the [B] fields, if they lie in one buffer in their order."""
        buffer, (B, _) = self.phase._base, self.tokens.shape
        if type(self.phase) is not Tensor:  # a FakeTensor lies nowhere
            return None
        if buffer is None or buffer.dim() != 2 or buffer.shape[0] != len(ROW_FIELDS):
            return None
        fields = [getattr(self, name) for name in ROW_FIELDS]
        in_order = all(field.data_ptr() == row.data_ptr() for field, row in zip(fields, buffer))
        return buffer[:, :B] if in_order and all(field.shape == (B,) for field in fields) else None


def columns_of(buffer: Tensor, columns: Tensor) -> Tensor:
    """[F, n] a copy of some columns [n] int64 of a buffer [F, B]. Each of its rows begins at a multiple of 16 bytes,
    as a tensor of its own would: no kernel is compiled again for it."""
    n = columns.shape[0]
    part = buffer.new_empty(buffer.shape[0], -(-n // 4) * 4)[:, :n]
    return part.copy_(buffer.index_select(1, columns))


def amend(state: RowState, rows: Tensor, **values: Tensor | int) -> None:
    """Overwrites fields of some rows in place, between two calls of `unmask`: the only other way to write a state.

    A stop string ends a row, a stale cache sends one to a refresh, an editing policy moves tokens, a prediction of the
    text's end shortens a canvas.

    Args:
        rows: [B] bool rows that change.
        values: by the field's name, a tensor of its dtype and of a shape that broadcasts to its own, or a whole number.
    Raises:
        ValueError: a name is no field, `rows` or a value has another shape, or a number is beyond int32. TypeError:
        `rows` is no tensor of bools, a tensor is of another dtype than its field, or a number is not whole. Nothing is
        written then.
    """
    if not isinstance(rows, Tensor) or rows.dtype != torch.bool:
        given = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"amend: rows must be a tensor of bools, got {given}")
    if rows.shape != state.phase.shape:
        raise ValueError(f"amend: rows must have shape {tuple(state.phase.shape)}, got {tuple(rows.shape)}")
    for name, value in values.items():
        if name not in (field.name for field in dataclasses.fields(state)):
            raise ValueError(f"amend: a value must be named by a field of RowState, got {name}")
        _check_value(name, value, getattr(state, name))
    for name, value in values.items():
        field = getattr(state, name)
        changes = rows.view(-1, *[1] * (field.dim() - 1))
        if isinstance(value, Tensor):
            field.copy_(torch.where(changes, value, field))
        else:
            field.masked_fill_(changes, value)


def _check_value(name: str, value: Tensor | int, field: Tensor) -> None:
    """Raise unless `amend` can write the value to the field."""
    if isinstance(value, Tensor):
        if value.dtype != field.dtype:
            raise TypeError(f"amend: {name} must be {field.dtype}, got {value.dtype}")
        sizes = zip(reversed(value.shape), reversed(field.shape))
        if value.dim() > field.dim() or any(size not in (1, whole) for size, whole in sizes):
            raise ValueError(f"amend: {name} must broadcast to {tuple(field.shape)}, got shape {tuple(value.shape)}")
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"amend: {name} must be a tensor or a whole number, got {shown(value)}")
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"amend: {name} must be a number of int32, got {shown(value)}")


CANVAS_FIELDS = ("tokens", "unmask_step", "unmask_confidence")
ROW_FIELDS = (
    "canvas_len",
    "block_start",
    "block_end",
    "block_masks",
    "block_step",
    "step",
    "phase",
    "nfe",
    "query_tokens",
    "error",
)


@dataclasses.dataclass(frozen=True)
class DraftSource:
    """What the drafts of every row are made from, and how drafting went so far. `verify` writes it in place.

    token [B, W] int64, score, confidence [B, W] fp32: predictions of the accepted canvas, lane by lane; 2-D fields may
    have any row stride. tried, accepted [B] int32: steps that verified drafts, and drafts accepted beyond the first.
    """

    token: Tensor
    score: Tensor
    confidence: Tensor
    tried: Tensor
    accepted: Tensor

"""Predicted times: what the machine code of sm_90 takes at the rates of the card's units. This is arithmetic on
compiled code, and no measurement; it says where a kernel would be bound and what a change of its code should change.

A program of attention goes from tile to tile of keys: it issues its instructions, and waits for its two products. The
programs that fit a multiprocessor together overlap these; one alone does not. Beside that every program starts and
ends, and programs that do not fit at once follow in waves. Memory moves what the floors say at the assumed rate. The
longer of the two, and the launches, are the time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import dlm_fast  # noqa: F401  in a checkout it puts the dlm_kernels that lies beside it in place
from dlm_kernels.tiles import AttentionTile, attention_prefill_tile, attention_tile, confidence_parts, confidence_tile

from . import floors
from .shapes import Model

TARGET, CAPABILITY = "sm_90", 90
# An H100 SXM; an H200 has the same multiprocessors. Per clock and multiprocessor: 4 instructions of a warp, 2,048
# multiply-adds in bf16 on tensor cores, 16 exponentials.
MULTIPROCESSORS, CLOCK_MHZ, SCHEDULERS, TENSOR, EXPONENTIALS = 132, 1755, 4, 2048, 16
REGISTERS, SHARED, THREADS = 65536, 228 * 1024, 2048
# Small launches of a layer beside its products and its attention (docs/launches.md).
SMALL = 5
# Assumed: a launch within a graph beside its work (an H200 took 0.73 for an empty one); what a program takes before its
# first and after its last tile; a barrier of a reduction; a small launch with little work in a graph.
LAUNCH_US, PROGRAM_US, BARRIER_CLOCKS, SMALL_US = 0.75, 3.0, 250, 2.0
# Rows below which `confidence` has a program for every part of a row.
SPLIT_BELOW = 2 * MULTIPROCESSORS
ASSUMED = (
    f"{MULTIPROCESSORS} multiprocessors at {CLOCK_MHZ} MHz, {LAUNCH_US} us a launch in a graph, {PROGRAM_US} us before "
    f"and after the tiles of a program, {BARRIER_CLOCKS} clocks a barrier, {SMALL_US} us a small launch"
)


@dataclasses.dataclass(frozen=True)
class Code:
    """What the predictions need of a row of the static table."""

    registers: int
    shared: int
    barriers: int
    loop: int
    per_element: float | None

    def resident(self, warps: int) -> int:
        """Programs that fit a multiprocessor together."""
        registers = -(-self.registers // 8) * 8 * 32 * warps
        return max(1, min(REGISTERS // registers, SHARED // (self.shared + 1024), THREADS // (32 * warps)))


def code_of(rows: Sequence[Mapping[str, Any]], kernel: str, *words: str) -> Code | None:
    """The first row of a kernel on the target whose configuration has these words, those at the end if need be left
    out."""
    chosen = [row for row in rows if row["kernel"] == kernel and row["target"] == TARGET]
    for count in range(len(words), 0, -1):
        for row in chosen:
            if all(word in f" {row['config']} " for word in words[:count]):
                loop = min((instructions for instructions, _ in row["loops"]), default=0)
                return Code(
                    row["registers"], row["shared_bytes"], row["barriers"], loop, row["instructions_per_element"]
                )
    return None


def tile_clocks(code: Code, tile: AttentionTile, D: int, together: int) -> float:
    """Clocks in which the programs that run together on a multiprocessor go through a tile of keys each."""
    issue = code.loop * tile.num_warps / SCHEDULERS
    rows = tile.BLOCK_M if tile.SWAP else max(64, tile.BLOCK_M)
    tensor = 2 * rows * tile.BLOCK_N * D / TENSOR
    exponentials = rows * tile.BLOCK_N / EXPONENTIALS
    return max(together * max(issue, tensor, exponentials), issue + tensor)


def attention_us(
    code: Code, tile: AttentionTile, D: int, programs: int, tiles: float, nbytes: float, launches: int, copy_tb_s: float
) -> float:
    """Microseconds of a call whose programs go through so many tiles each."""
    together = min(code.resident(tile.num_warps), -(-programs // MULTIPROCESSORS))
    waves = math.ceil(programs / (MULTIPROCESSORS * together))
    working = waves * (tiles * tile_clocks(code, tile, D, together) / CLOCK_MHZ + PROGRAM_US)
    return launches * LAUNCH_US + max(working, nbytes / copy_tb_s / 1e6)


def decode_us(rows: Sequence[Mapping[str, Any]], model: Model, B: int, prefix: int, copy_tb_s: float) -> float | None:
    """Microseconds of decode attention over prefixes of one length."""
    G, D, W = model.group, model.head_dim, model.window
    tile = attention_tile(CAPABILITY, D=D, G=G, dtype=torch.bfloat16)
    mode = " full " if model.visibility == "full" else " block "
    code = code_of(rows, "attention", f" D={D} ", f" G={G} ", " cache ", mode)
    if code is None or W * G > tile.PREFILL_ROWS:
        return None
    splits = max(1, min(tile.MAX_SPLITS, -(-prefix // tile.SPLIT)))
    query_tiles = -(-W * G // tile.BLOCK_M)
    partials = 0 if splits == 1 else 2 * 4 * B * model.kv_heads * splits * query_tiles * tile.BLOCK_M * D
    tiles = math.ceil(prefix / splits / tile.BLOCK_N) + 1
    nbytes = floors.decode(model, [prefix] * B).nbytes + partials
    return attention_us(
        code, tile, D, B * model.kv_heads * query_tiles * splits, tiles, nbytes, 1 + (splits > 1), copy_tb_s
    )


def prefill_us(rows: Sequence[Mapping[str, Any]], model: Model, L: int, copy_tb_s: float) -> float | None:
    """Microseconds of attention over one window of L positions."""
    G, D = model.group, model.head_dim
    tile = attention_prefill_tile(CAPABILITY, D=D, dtype=torch.bfloat16)
    code = code_of(rows, "attention prefill", f" bf16 D={D} ", f" G={G} ")
    if code is None:
        return None
    programs = model.kv_heads * -(-L * G // tile.BLOCK_M)
    pairs = floors.visible_pairs(model.prefill_visibility, L, model.window)
    return attention_us(
        code, tile, D, programs, pairs / L / tile.BLOCK_N, floors.prefill(model, L).nbytes, 2, copy_tb_s
    )


def confidence_us(
    rows: Sequence[Mapping[str, Any]], N: int, V: int, itemsize: int, outputs: Sequence[str], copy_tb_s: float
) -> float | None:
    """Microseconds of `confidence`."""
    split, dtype = N < SPLIT_BELOW, {2: "bf16", 4: "fp32"}[itemsize]
    config = f"{dtype} {'+'.join(outputs) or 'bare'}{' split' if split else ''}"
    code = code_of([row for row in rows if row["config"] == config], "confidence", config)
    if code is None or code.per_element is None:
        return None
    tile = confidence_tile(CAPABILITY, itemsize, "kl" in outputs, False, "sampled" in outputs)
    programs = N * (confidence_parts(V, tile, itemsize)[1] if split else 1)
    waves = math.ceil(programs / (MULTIPROCESSORS * code.resident(tile.num_warps)))
    issue = code.per_element * N * V / (32 * SCHEDULERS * MULTIPROCESSORS * CLOCK_MHZ)
    moving = floors.confidence(N, V, itemsize, "kl" in outputs).nbytes / copy_tb_s / 1e6
    return (1 + split) * LAUNCH_US + waves * code.barriers * BARRIER_CLOCKS / CLOCK_MHZ + max(issue, moving)


def step_us(
    rows: Sequence[Mapping[str, Any]], model: Model, B: int, prefix: int, copy_tb_s: float, small: int = SMALL
) -> float | None:
    """Microseconds of a denoise step in a graph, with so many small launches a layer beside 7 products and
    attention."""
    attention = decode_us(rows, model, B, prefix, copy_tb_s)
    measure = confidence_us(rows, B * model.window, model.vocab, 2, ("second",), copy_tb_s)
    if attention is None or measure is None:
        return None
    weights = 2 * floors.matrices(model) / copy_tb_s / 1e6
    return weights + model.layers * (attention + 7 * LAUNCH_US + small * SMALL_US) + measure


def predicted_us(
    rows: Sequence[Mapping[str, Any]], model: Model | None, facts: Mapping[str, Any], copy_tb_s: float
) -> float | None:
    """Microseconds of a timed shape, by its facts; None where nothing is predicted."""
    kind = facts.get("kind")
    if kind == "confidence":
        itemsize = 4 if facts["dtype"] == "fp32" else 2
        return confidence_us(rows, facts["N"], facts["V"], itemsize, facts["outputs"], copy_tb_s)
    if model is None or model.reach is not None:
        return None  # ops without a model, and layers that see a part of the prefix
    if kind == "decode" and facts["equal"]:
        return decode_us(rows, model, facts["B"], facts["prefix"], copy_tb_s)
    if kind == "prefill":
        return prefill_us(rows, model, facts["L"], copy_tb_s)
    if kind == "step":
        return step_us(rows, model, facts["B"], facts["prefix"], copy_tb_s)
    return None

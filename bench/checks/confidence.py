"""Is `confidence` its float64 reference, on every group of outputs and every dtype? Does a row depend on the other
rows, or on how many there are?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from dlm_fast import Ops
from dlm_kernels import reference
from dlm_kernels.checks.confidence import OUTPUTS
from dlm_kernels.testing import Failure, GuardedMemory, clear_draws, no_worse_than_torch, poisoned, same_bits
from dlm_kernels.testing.confidence_calls import HOSTILE, Options, random_call

from .run import Case, Sizes, Skip, generator

GROUPS = ((), *((name,) for name in OUTPUTS), ("second", "logsumexp", "entropy"), OUTPUTS)
IDS = ("token", "second_token", "error")
PER_OUTPUT = ("rows", "banned", "temperature", "sample_temperature", "seed", "noise", "query", "bias_ids", "bias")


def cases(ops: Ops, device: torch.device, sizes: Sizes, seed: int) -> Iterator[Case]:
    for dtype in sizes.logits_dtypes:
        kind = str(dtype).removeprefix("torch.")
        for outputs in GROUPS:
            name = f"{kind} V={sizes.vocab} outputs={'+'.join(outputs) or 'none'}"
            yield name, partial(equals_reference, ops, device, seed, name, sizes.rows, sizes.vocab, dtype, outputs)
        for V in sizes.vocabs:
            name = f"{kind} V={V} everything"
            yield name, partial(equals_reference, ops, device, seed, name, sizes.rows, V, dtype, OUTPUTS, plain=False)
        name = f"{kind} row alone = row in the batch"
        yield name, partial(rows_are_independent, ops, device, seed, name, max(4, sizes.rows // 2), sizes.vocab, dtype)
        if device.type == "cuda":
            name = f"{kind} few rows, split = many rows, not split"
            yield name, partial(forms_are_equal, ops, device, seed, name, sizes.rows, sizes.vocab, dtype)
    if sizes.far:
        yield "offsets beyond 2^31 elements", partial(far_rows, ops, device, seed)


def call_of(
    random: torch.Generator,
    R: int,
    V: int,
    dtype: torch.dtype,
    outputs: tuple[str, ...] = OUTPUTS,
    *,
    plain: bool = False,
    aligned: bool = True,
    device: torch.device,
) -> dict:
    """A ragged call whose rows are hostile in every way where there are enough rows; a quarter of the rows is ordinary.

    plain: what a decoder passes (one banned id, one seed, no temperature, no cap); else every optional argument, and a
    seed for each output.
    aligned: the rows of logits are 16-byte aligned, as a model's head makes them.
    """
    options = Options(entries=R + 4, bans=1, shared_bans=True, errors=True)
    if not plain:
        options = Options(
            entries=R + 4, bans=4, biases=6, temperature=True, soft_cap=True, seeds=True, errors=True
        )  # fmt: skip
    padding = -V % 16 + 16 if aligned else 3
    hostile = min(len(HOSTILE), R * 3 // 4)
    return random_call(random, R, V, dtype, outputs, options, hostile=hostile, padding=padding, device=device)


def equals_reference(
    ops: Ops,
    device: torch.device,
    seed: int,
    name: str,
    R: int,
    V: int,
    dtype: torch.dtype,
    outputs: tuple[str, ...],
    plain: bool = True,
) -> None:
    random = generator(seed, name)
    aligned = bool(torch.randint(2, (1,), generator=random)) or plain
    call = call_of(random, R, V, dtype, outputs, plain=plain, aligned=aligned, device=device)
    before = call["logits"].clone()
    memory = GuardedMemory()
    with poisoned(memory):
        ours = ops.confidence(**call)
    memory.check()
    same_bits("logits (an input)", call["logits"], before)
    compare(ours, call)


def compare(ours: reference.Confidence, call: dict) -> None:
    """Raises Failure unless `ours` is what the reference makes of the call."""
    low = reference.confidence(**call)
    exact = reference.confidence(
        **call | {name: call[name].double() for name in ("logits", "previous") if name in call}
    )
    fields = ours._asdict()
    for field, expected in exact._asdict().items():
        if (fields[field] is None) != (expected is None):
            raise Failure(f"{field}: {'absent' if fields[field] is None else 'present'}, should be the other way")
    for field in IDS:
        if fields[field] is not None:
            same_bits(field, fields[field], getattr(exact, field))
    clear = torch.ones_like(ours.token, dtype=torch.bool)
    if "sampled" in call["outputs"]:
        clear = clear_draws(call) | (exact.error != 0)
        if clear.double().mean() < 0.9:
            raise Failure(f"sampled_token: only {int(clear.sum())} of {len(clear)} draws are clear enough to compare")
        same_bits(
            "sampled_token", torch.where(clear, ours.sampled_token, 0), torch.where(clear, exact.sampled_token, 0)
        )
    # A capped logit is cap * tanh(.): fp32 rounds on the scale of the cap, however small the logit. A probability moves
    # by at most a quarter of what its logit does.
    unit = max(1.0, call.get("soft_cap") or 0.0)
    for field, expected in exact._asdict().items():
        if expected is None or field in IDS or field == "sampled_token":
            continue
        keep = clear if field == "sampled_confidence" else torch.ones_like(clear)
        units = dict.fromkeys(("logit", "second_logit", "logsumexp"), unit)
        # A divergence is a mean of differences of log-probabilities; they are of size 2^6 here, and fp32 rounds each to
        # 2^-18.
        units["kl"] = max(4.0, unit)
        no_worse_than_torch(
            field,
            fields[field][keep],
            getattr(low, field)[keep],
            expected[keep],
            unit=units.get(field, max(1.0, unit / 4)),
        )


def rows_are_independent(
    ops: Ops, device: torch.device, seed: int, name: str, R: int, V: int, dtype: torch.dtype
) -> None:
    """Every row, bit for bit: alone, in the batch, and in the batch turned round."""
    random = generator(seed, name)
    call = call_of(random, R, V, dtype, device=device)
    N = len(call["rows"])
    together = ops.confidence(**call)

    def taking(index: Tensor) -> dict:
        return call | {k: call[k][index].contiguous() for k in PER_OUTPUT}

    turned = ops.confidence(**taking(torch.arange(N - 1, -1, -1, device=device)))
    for field, values in turned._asdict().items():
        same_bits(f"{field}, batch turned round", values.flip(0), getattr(together, field))
    for n in range(0, N, max(1, N // 6)):
        row = int(call["rows"][n])
        if not 0 <= row < R:
            continue
        # Alone also means: in a logits tensor of one row.
        own = {name: call[name][row : row + 1] for name in ("logits", "previous", "previous_logsumexp")}
        single = taking(torch.tensor([n], device=device)) | own | {"rows": None}
        for field, values in ops.confidence(**single)._asdict().items():
            same_bits(f"{field} of output {n} alone", values, getattr(together, field)[n : n + 1])


def forms_are_equal(ops: Ops, device: torch.device, seed: int, name: str, R: int, V: int, dtype: torch.dtype) -> None:
    """The same rows, so few that each is split, and again and again until there are enough to give each one program."""
    random = generator(seed, name)
    call = call_of(random, R, V, dtype, device=device)
    few = ops.confidence(**call)
    copies = 2 * torch.cuda.get_device_properties(device).multi_processor_count // len(call["rows"]) + 1
    many = ops.confidence(**call | {k: torch.cat([call[k]] * copies) for k in PER_OUTPUT})
    for field, values in many._asdict().items():
        same_bits(field, values, torch.cat([getattr(few, field)] * copies))


def far_rows(ops: Ops, device: torch.device, seed: int) -> None:
    """Rows whose offset does not fit 32 bits. Only the rows that are asked for are filled; the others are never
    read."""
    V, dtype = 126464, torch.bfloat16
    R = 2**31 // V + 40
    torch.cuda.empty_cache()  # what earlier cases left reserved is free too
    if torch.cuda.mem_get_info(device)[0] < 2 * R * V * 1.2:
        raise Skip(f"needs {2 * R * V / 1e9:.1f} GB of free device memory")
    rows = torch.tensor([0, R // 2, R - 3, R - 1], dtype=torch.int32, device=device)
    logits = torch.empty(R, V, dtype=dtype, device=device)
    logits[rows.long()] = torch.randn(len(rows), V, generator=generator(seed, "far")).to(device, dtype) * 4
    here = {"logits": logits[rows.long()].contiguous(), "rows": None, "outputs": ("second", "logsumexp", "entropy")}
    compare(ops.confidence(**here | {"logits": logits, "rows": rows}), here)
